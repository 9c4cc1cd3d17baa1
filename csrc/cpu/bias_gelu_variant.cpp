// The body of bias_gelu, compiled once for each variant.
//
//   0.5 u (1 + tanh(v / 2)) = u / (1 + e^-v)   with   v = 2 sqrt(2 / pi) (u + 0.044715 u^3)
#include "cpu/bias_gelu.h"
#include "cpu/rows.h"

namespace {

using Params = var_ext::BiasGeluParams;

constexpr float slope_at_0 = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float cubic = 0.044715f, log2_e = 1.44269504f;

template <class S>
inline __attribute__((always_inline)) V exp_minus_v(V u, V square) {
    return exp2<rough<S>>(u * (square * (-log2_e * slope_at_0 * cubic) - log2_e * slope_at_0));
}

template <class S>
inline __attribute__((always_inline)) V gelu(V u) {
    return u / (1.0f + exp_minus_v<S>(u, u * u));
}

// The derivative: s + u s (1 - s) dv/du with s = 1 / (1 + e^-v). Here 1 - s = e^-v s does not cancel; beyond
// 9 the derivative is 0 or 1 to all digits, and e^-v could overflow.
template <class S>
inline __attribute__((always_inline)) V gelu_slope(V u) {
    u = u < -9.0f ? V{} - 9.0f : u > 9.0f ? V{} + 9.0f : u;
    const V square = u * u, e = exp_minus_v<S>(u, square), s = 1.0f / (1.0f + e);
    const V inner = u * (square * (3 * slope_at_0 * cubic) + slope_at_0);
    return s + s * inner * (e * s);
}

void forward(const Params& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const S* bias = static_cast<const S*>(p.bias);
        for (int64_t row = begin; row < end; ++row) {
            const S* x = static_cast<const S*>(p.x) + row * p.x_stride;
            S* out = static_cast<S*>(p.out) + row * p.channels;
            for_vectors(p.channels, [&](int64_t i, auto part) {
                const V u = load_as<V>(x + i, part) + load_as<V>(bias + i, part);
                store_as(out + i, gelu<S>(u), part);
            });
        }
    });
}

void backward(const Params& p, int64_t begin, int64_t end, float* sums) {
    for (int64_t i = 0; i < p.channels; i += lanes) store(sums + i, V{});
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        const S* bias = static_cast<const S*>(p.bias);
        for (int64_t row = begin; row < end; ++row) {
            const S* x = static_cast<const S*>(p.x) + row * p.x_stride;
            const S* grad = static_cast<const S*>(p.grad) + row * p.grad_stride;
            S* out = static_cast<S*>(p.out) + row * p.channels;
            for_vectors(p.channels, [&](int64_t i, auto part) {
                const V u = load_as<V>(x + i, part) + load_as<V>(bias + i, part);
                const V g = load_as<V>(grad + i, part) * gelu_slope<S>(u);
                store_as(out + i, g, part);
                store(sums + i, load<V>(sums + i) + g);
            });
        }
    });
}

void add_up(const Params& p, const float* sums, int64_t chunks, int64_t padded) {
    with_type(p.dtype, [&](auto type) {
        using S = decltype(type);
        S* out = static_cast<S*>(p.grad_bias);
        for_vectors(p.channels, [&](int64_t i, auto part) {
            V total = {};
            for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load<V>(sums + chunk * padded + i);
            store_as(out + i, total, part);
        });
    });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(BiasGeluKernel, bias_gelu) = {forward, backward, add_up};

}  // namespace var_ext::cpu
