#include "ops/bias_gelu.h"

#include "cuda/bias_gelu_backward.cuh"
#include "cuda/bias_gelu_forward.cuh"
#include "cuda/launch.cuh"

namespace var_ext::cuda {

namespace {

// Can all rows be read and written in 16 bytes?
bool is_aligned(const BiasGeluParams& p) {
    const int64_t step = 16 / dtype_size(p.dtype);
    for (const void* pointer : {p.x, p.bias, p.grad, static_cast<const void*>(p.out)}) {
        if (!at_16_bytes(pointer)) return false;
    }
    return p.channels % step == 0 && (p.rows == 1 || (p.x_stride % step == 0 && p.grad_stride % step == 0));
}

// Calls body(T{}, N) for the element type and the number of elements that a lane has.
template <class Body>
void for_access(const BiasGeluParams& p, const Body& body) {
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (is_aligned(p)) {
            body(element, std::integral_constant<int, per_lane<T>>());
        } else {
            body(element, std::integral_constant<int, 1>());
        }
    });
}

}  // namespace

void bias_gelu(const BiasGeluParams& p, const CudaStream& stream) {
    const char* op = "bias_gelu";
    if (p.rows == 0) return;
    for_access(p, [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int N = decltype(width)::value;
        const int64_t column_blocks = (p.channels + 32 * N - 1) / (32 * N);
        const int64_t chunks = (p.rows + bias_gelu_chunk - 1) / bias_gelu_chunk;
        launch(op, stream, dim3(counted(op, "blocks of 32 rows", column_blocks * chunks)), bias_gelu_threads,
               0, bias_gelu_kernel<T, N>, p, static_cast<uint32_t>(column_blocks));
    });
}

void bias_gelu_backward(const BiasGeluParams& p, const CudaStream& stream) {
    const char* op = "bias_gelu_backward";
    if (p.channels == 0) return;
    if (p.scratch == nullptr) contract_error(op, "scratch must have shape (P, C) on CUDA, got none");
    const uint32_t channels = counted(op, "C", p.channels);
    for_access(p, [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int N = decltype(width)::value;
        const uint32_t column_blocks = ceil_div(channels, 32 * N);
        launch(op, stream, dim3(counted(op, "blocks", column_blocks * p.partials)), bias_gelu_threads,
               bias_gelu_threads * N * sizeof(float), bias_gelu_backward_kernel<T, N>, p, column_blocks);
        launch(op, stream, dim3(ceil_div(channels, 32)), sum_columns_threads,
               sum_columns_threads * sizeof(float), bias_gelu_add_kernel<T>, p);
    });
}

}  // namespace var_ext::cuda
