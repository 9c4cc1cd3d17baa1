// The body of bias_residual, compiled once for each variant.
#include "cpu/bias_residual.h"
#include "cpu/rows.h"

namespace {

using Params = var_ext::BiasResidualParams;

// Rows of so many elements; bias_of(row, first element, Whole or Part) is what is added to a vector of one.
template <class S, class Bias>
inline __attribute__((always_inline)) void add_rows_of(const Params& p, int64_t size, int64_t begin,
                                                       int64_t end, const Bias& bias_of) {
    for (int64_t row = begin; row < end; ++row) {
        const S *h = static_cast<const S*>(p.h) + row * size, *x = static_cast<const S*>(p.x) + row * size;
        S* out = static_cast<S*>(p.out) + row * size;
        for_vectors(size, [&](int64_t i, auto part) {
            const V sum = load_as<V>(h + i, part) + bias_of(row, i, part);
            store_as(out + i, sum + load_as<V>(x + i, part), part);
        });
    }
}

void pixels(const Params& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const S* bias = static_cast<const S*>(p.bias);
        add_rows_of<S>(p, p.channels, begin, end,
                       [&](int64_t, int64_t i, auto part) { return load_as<V>(bias + i, part); });
    });
}

void maps(const Params& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const S* bias = static_cast<const S*>(p.bias);
        for (int64_t map = begin; map < end; ++map) {
            const float of_map = load_as<V>(bias + map % p.channels, Part{1})[0];
            add_rows_of<S>(p, p.pixels, map, map + 1, [&](int64_t, int64_t, auto) { return V{} + of_map; });
        }
    });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(BiasResidualKernel, bias_residual) = {pixels, maps};

}  // namespace var_ext::cpu
