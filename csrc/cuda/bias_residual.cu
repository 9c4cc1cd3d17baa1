// bias_residual: every byte moves once, N neighbouring elements per thread and step.
#include "ops/bias_residual.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace var_ext::cuda {

namespace {

constexpr unsigned bias_residual_threads = 256;
constexpr int bias_residual_steps = 4;  // in flight per thread
constexpr uint32_t bias_residual_chunk = bias_residual_threads * bias_residual_steps;

// `units`: of N elements, of all maps together; N elements share a pixel (Last: channels-last) or a channel.
// `out` may be `h` or `x`: a thread reads its own elements before it writes them.
// budget: registers <= 80, shared <= 0, blocks >= 3
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N, bool Last>
__global__ void __launch_bounds__(bias_residual_threads, 3)
    bias_residual_kernel(const BiasResidualParams p, uint32_t units) {
    ptx::wait_for_previous();
    const T* const bias = static_cast<const T*>(p.bias);
    const uint32_t channels = static_cast<uint32_t>(p.channels);
    const uint32_t size = static_cast<uint32_t>((Last ? p.channels : p.pixels) / N);  // of a pixel or a map
    const uint32_t first = blockIdx.x * bias_residual_chunk + threadIdx.x;
    Packed<T, N> h_bits[bias_residual_steps] = {}, x_bits[bias_residual_steps] = {};
#pragma unroll
    for (int i = 0; i < bias_residual_steps; ++i) {  // all loads before their first use
        const uint32_t unit = first + i * bias_residual_threads;
        const bool inside = unit < units;  // mask
        if (inside) {
            h_bits[i] = load_packed<T, N>(static_cast<const T*>(p.h) + static_cast<int64_t>(unit) * N);
            x_bits[i] = load_packed<T, N>(static_cast<const T*>(p.x) + static_cast<int64_t>(unit) * N);
        }
    }
#pragma unroll
    for (int i = 0; i < bias_residual_steps; ++i) {
        const uint32_t unit = first + i * bias_residual_threads;
        const bool inside = unit < units;  // mask
        if (!inside) continue;
        float h[N], x[N], add[N];
        widen_packed<T, N>(h_bits[i], h);
        widen_packed<T, N>(x_bits[i], x);
        if constexpr (Last) {
            widen_packed<T, N>(load_packed<T, N>(bias + unit % size * N), add);
        } else {
            const float of_map = widen(bias[unit / size % channels]);
            for (int j = 0; j < N; ++j) add[j] = of_map;
        }
        for (int j = 0; j < N; ++j) h[j] = h[j] + add[j] + x[j];
        store_packed<T, N>(static_cast<T*>(p.out) + static_cast<int64_t>(unit) * N, h);
    }
}

// Can all pixels, or all maps, be read and written in 16 bytes?
bool is_aligned(const BiasResidualParams& p) {
    for (const void* pointer : {p.h, p.x, static_cast<const void*>(p.out)}) {
        if (!at_16_bytes(pointer)) return false;
    }
    if (p.channels_last && !at_16_bytes(p.bias)) return false;
    return (p.channels_last ? p.channels : p.pixels) % (16 / dtype_size(p.dtype)) == 0;
}

template <class T, int N>
void launch_over(const BiasResidualParams& p, const CudaStream& stream) {
    const char* op = "bias_residual";
    const uint32_t units = counted(op, N == 1 ? "elements that do not lie at 16 bytes" : "units of 16 bytes",
                                   p.batch * p.channels * p.pixels / N);
    launch(op, stream, dim3(ceil_div(units, bias_residual_chunk)), bias_residual_threads, 0,
           p.channels_last ? bias_residual_kernel<T, N, true> : bias_residual_kernel<T, N, false>, p, units);
}

}  // namespace

void bias_residual(const BiasResidualParams& p, const CudaStream& stream) {
    if (p.batch * p.channels * p.pixels == 0) return;
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (is_aligned(p)) {
            launch_over<T, per_lane<T>>(p, stream);
        } else {
            launch_over<T, 1>(p, stream);
        }
    });
}

}  // namespace var_ext::cuda
