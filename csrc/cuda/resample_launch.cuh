// Which kernel resamples a grid, and its launch.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/resample_kernels.cuh"

namespace var_ext::cuda {

template <class Body>
void for_resample_element(DType dtype, const Body& body) {
    dtype == DType::float64 ? body(double{}) : for_element(dtype, body);
}

// Maps p.in to p.out; `op` is the name in errors.
template <class Map>
void resample(const char* op, const ResampleParams& p, const CudaStream& stream) {
    const int64_t side = std::max({p.in_h, p.in_w, p.out_h, p.out_w});
    if (side > resample_max_side) {
        contract_error(op, "sides must be at most " + std::to_string(resample_max_side) + " on CUDA, got " +
                               std::to_string(side));
    }
    const int64_t planes = p.batch * p.channels, items = planes * p.out_h * p.out_w;
    if (planes == 0) return;
    const dim3 pixel_blocks(static_cast<unsigned>((items + resample_threads - 1) / resample_threads));
    const dim3 grid_blocks(static_cast<unsigned>((planes + resample_planes - 1) / resample_planes));
    const bool copies = p.in_h == p.out_h && p.in_w == p.out_w;  // the CPU's, too: zero times infinity is NaN
    constexpr bool mean = std::is_same<Map, Mean>::value;
    for_resample_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t height = p.in_h, wide = mean ? 0 : p.out_w;
        const int64_t kept = height * ((p.in_w | 1) + wide) + 2;  // at least what plane_step says of both
        const size_t bytes = static_cast<size_t>(resample_planes * kept) * sizeof(typename SumOf<T>::Type);
        if (copies) {
            launch(op, stream, pixel_blocks, resample_threads, 0, resample_pixel_kernel<Copy, T>, p, items);
        } else if (bytes > resample_most_shared) {
            launch(op, stream, pixel_blocks, resample_threads, 0, resample_pixel_kernel<Map, T>, p, items);
        } else if constexpr (mean) {
            launch(op, stream, grid_blocks, resample_threads, bytes, resample_grid_mean_kernel<T>, p);
        } else {
            launch(op, stream, grid_blocks, resample_threads, bytes, resample_grid_kernel<Map, T>, p);
        }
    });
}

}  // namespace var_ext::cuda
