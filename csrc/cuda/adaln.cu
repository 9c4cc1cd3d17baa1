#include "ops/adaln.h"

#include <algorithm>

#include "cuda/adaln_backward.cuh"
#include "cuda/adaln_forward.cuh"
#include "cuda/launch.cuh"

namespace var_ext::cuda {

namespace {

constexpr const char* op = "adaln";

// Can all rows be read and written in 16 bytes? A missing tensor can.
template <class Params>
struct Aligned {
    const Params& p;
    template <class Pointer>
    bool operator()(const RowsOf<Pointer>& rows) const {
        const int64_t step = 16 / dtype_size(p.dtype);
        return at_16_bytes(rows.data) && (p.batch == 1 || rows.b % step == 0) &&
               (p.length == 1 || rows.l % step == 0);
    }
    bool channels() const {
        return p.channels % (16 / dtype_size(p.dtype)) == 0 && p.channels <= adaln_most_channels;
    }
};

bool is_aligned(const AdalnParams& p) {
    const Aligned<AdalnParams> fits{p};
    return fits.channels() && fits(p.x) && fits(p.scale) && fits(p.shift) && fits(p.branch) && fits(p.gate) &&
           fits(p.h) && fits(p.y);
}

bool is_aligned(const AdalnBackwardParams& p) {
    const Aligned<AdalnBackwardParams> fits{p};
    return fits.channels() && fits(p.grad_y) && fits(p.x) && fits(p.scale) && fits(p.grad_h) &&
           fits(p.branch) && fits(p.gate) && fits(p.grad_x) && fits(p.grad_branch) && at_16_bytes(p.scratch);
}

// Calls body(T{}, residual) with whether there is a residual as a type.
template <class Params, class Body>
void for_form(const Params& p, const Body& body) {
    for_element(p.dtype, [&](auto element) {
        if (p.gate.data != nullptr) {  // a branch without rows may have no address
            body(element, std::true_type());
        } else {
            body(element, std::false_type());
        }
    });
}

// Whole warps, 16 bytes per thread.
template <class T>
unsigned threads_of(int64_t channels) {
    return ceil_div(static_cast<uint32_t>(channels), 32 * per_lane<T>) * 32;
}

// Whole warps, one element per thread as far as possible.
unsigned any_threads_of(int64_t channels) {
    return static_cast<unsigned>(std::min<int64_t>((channels + 31) / 32 * 32, adaln_any_threads));
}

}  // namespace

void adaln(const AdalnParams& p, const CudaStream& stream) {
    const uint32_t all_rows = counted(op, "B * L", p.batch * p.length);
    if (all_rows == 0 || p.channels == 0) return;
    for_form(p, [&](auto element, auto form) {
        using T = decltype(element);
        constexpr bool residual = decltype(form)::value;
        if (is_aligned(p)) {
            // one row per block until there are 16 blocks for each of 132 multiprocessors
            const uint32_t rows = std::clamp(all_rows / 2112, 1u, 16u);
            const uint32_t chunks = ceil_div(static_cast<uint32_t>(p.length), rows);
            launch(op, stream, dim3(static_cast<uint32_t>(p.batch) * chunks), threads_of<T>(p.channels),
                   adaln_sums * sizeof(float), adaln_aligned_kernel<T, residual>, p, chunks, rows);
        } else {
            launch(op, stream, dim3(all_rows), any_threads_of(p.channels), adaln_sums * sizeof(float),
                   adaln_any_kernel<T, residual>, p);
        }
    });
}

void adaln_backward(const AdalnBackwardParams& p, const CudaStream& stream) {
    counted(op, "B * L", p.batch * p.length);
    const int64_t vectors = p.gate.data == nullptr ? 2 : 3;
    const uint32_t columns = counted(op, "B * C * vectors", p.batch * p.channels * vectors);
    if (columns == 0) return;
    if (p.scratch == nullptr)
        contract_error(op, "scratch must have shape (B, P, vectors, C) on CUDA, got none");
    const uint32_t tasks = counted(op, "B * P of scratch", p.batch * p.partials);
    for_form(p, [&](auto element, auto form) {
        using T = decltype(element);
        constexpr bool residual = decltype(form)::value;
        if (is_aligned(p)) {
            launch(op, stream, dim3(tasks), threads_of<T>(p.channels), 2 * adaln_sums * sizeof(float),
                   adaln_backward_aligned_kernel<T, residual>, p);
        } else {
            launch(op, stream, dim3(tasks), any_threads_of(p.channels), 2 * adaln_sums * sizeof(float),
                   adaln_backward_any_kernel<T, residual>, p);
        }
        launch(op, stream, dim3(ceil_div(columns, 32)), sum_columns_threads,
               sum_columns_threads * sizeof(float), adaln_add_kernel<T>, p);
    });
}

}  // namespace var_ext::cuda
