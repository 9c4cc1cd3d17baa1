#include "ops/group_norm_silu.h"

#include <algorithm>

#include "cuda/group_norm_silu_groups.cuh"
#include "cuda/group_norm_silu_maps.cuh"
#include "cuda/group_norm_silu_rows.cuh"
#include "cuda/launch.cuh"

namespace var_ext::cuda {

namespace {

// Can all pixels, or all maps, be read and written in 16 bytes?
bool is_aligned(const GroupNormSiluParams& p) {
    const int64_t step = 16 / dtype_size(p.dtype);
    for (const void* pointer : {p.x, p.grad, static_cast<const void*>(p.out)}) {
        if (!at_16_bytes(pointer)) return false;
    }
    return (p.channels_last ? p.channels : p.pixels) % step == 0;
}

// Calls body(T{}, N) for the element type and the number of elements that a thread has.
template <class Body>
void for_access(const GroupNormSiluParams& p, const Body& body) {
    for_element(p.dtype, [&](auto element) {
        if (is_aligned(p)) {
            body(element, std::integral_constant<int, per_lane<decltype(element)>>());
        } else {
            body(element, std::integral_constant<int, 1>());
        }
    });
}

// Grids of the kernels over chunks.
uint32_t windows_of(const GroupNormSiluParams& p, int width) {
    return ceil_div(static_cast<uint32_t>(p.channels), group_norm_silu_threads * width);
}
dim3 blocks_of(const char* op, const GroupNormSiluParams& p, int width) {
    const int64_t shares = p.channels_last ? windows_of(p, width) : p.channels;
    return dim3(counted(op, "blocks", p.batch * p.partials * shares));
}

// Does each block of the map add up the chunks of its image itself, instead of a separate launch? Each block
// reads 8 bytes per chunk and channel: at most 64 blocks with 64 chunks, or as much over more images. At 640
// channels that is 21 MB from the L2 cache, a few microseconds, as long as a launch; estimated, not measured.
bool map_adds_up(const GroupNormSiluParams& p) {
    constexpr int64_t few = 64, room = 1024;  // channels and groups in shared memory
    return p.channels_last && p.channels <= room && p.partials <= few &&
           p.batch * p.partials * p.partials <= few * few;
}

// Whole warps, N pixels per thread as far as a chunk has them.
unsigned map_threads_of(const GroupNormSiluParams& p, int width) {
    const int64_t most = (p.pixels / p.partials + 8 + width - 1) / width;
    return static_cast<unsigned>(std::min<int64_t>((most + 31) / 32 * 32, group_norm_silu_threads));
}

void check_scratch(const char* op, const GroupNormSiluParams& p, bool backward) {
    counted(op, "C", p.channels);
    counted(op, "B * groups", p.batch * p.groups);
    if (p.batch * p.channels * p.pixels == 0) return;  // memory without elements may have no address
    if (p.stats == nullptr) contract_error(op, "stats must have shape (B, groups, 2) on CUDA, got none");
    if (p.scratch == nullptr) contract_error(op, "scratch must have shape (B, P, C, 2) on CUDA, got none");
    counted(op, "P * C of scratch", p.partials * p.channels);
    counted(op, "elements of a chunk", chunk_size(p) * (p.channels_last ? p.channels : 1));
    if (backward && p.means == nullptr) {
        contract_error(op, "means must have shape (B, groups, 2) on CUDA, got none");
    }
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& p, const CudaStream& stream) {
    const char* op = "group_norm_silu";
    check_scratch(op, p, false);
    if (p.batch * p.channels * p.pixels == 0) return;
    for_access(p, [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int N = decltype(width)::value;
        constexpr unsigned threads = group_norm_silu_threads;
        const dim3 blocks = blocks_of(op, p, N);
        const uint32_t windows = windows_of(p, N);
        if (p.channels_last) {
            launch(op, stream, blocks, threads, 2 * threads * N * sizeof(float),
                   group_norm_silu_row_moments_kernel<T, N>, p, windows);
        } else {
            launch(op, stream, blocks, map_threads_of(p, N), 64 * sizeof(float),
                   group_norm_silu_map_moments_kernel<T, N>, p);
        }
        const bool adds_up = map_adds_up(p);
        if (!adds_up) {
            launch(op, stream, dim3(static_cast<uint32_t>(p.batch * p.groups)), threads, 64 * sizeof(float),
                   group_norm_silu_stats_kernel, p);
        }
        if (p.channels_last) {
            const size_t shared = adds_up ? (p.channels + p.groups) * sizeof(float2) : 0;
            launch(op, stream, blocks, threads, shared, group_norm_silu_rows_kernel<T, N>, p, windows,
                   adds_up);
        } else {
            launch(op, stream, blocks, map_threads_of(p, N), 0, group_norm_silu_maps_kernel<T, N>, p);
        }
    });
}

void group_norm_silu_backward(const GroupNormSiluParams& p, const CudaStream& stream) {
    const char* op = "group_norm_silu_backward";
    check_scratch(op, p, true);
    if (p.channels == 0) return;
    GroupNormSiluParams none = p;  // gradients of parameters are zero where there is nothing to add up
    if (p.batch * p.pixels == 0) none.batch = 0;
    for_access(p, [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int N = decltype(width)::value;
        constexpr unsigned threads = group_norm_silu_threads;
        const uint32_t windows = windows_of(p, N), columns = ceil_div(static_cast<uint32_t>(p.channels), 16);
        if (none.batch > 0) {
            const dim3 blocks = blocks_of(op, p, N);
            if (p.channels_last) {
                launch(op, stream, blocks, threads, 2 * threads * N * sizeof(float),
                       group_norm_silu_row_slopes_kernel<T, N>, p, windows);
            } else {
                launch(op, stream, blocks, map_threads_of(p, N), 64 * sizeof(float),
                       group_norm_silu_map_slopes_kernel<T, N>, p);
            }
            launch(op, stream, dim3(static_cast<uint32_t>(p.batch * p.groups)), threads, 64 * sizeof(float),
                   group_norm_silu_slopes_kernel<T>, p);
            if (p.channels_last) {
                launch(op, stream, blocks, threads, 0, group_norm_silu_rows_backward_kernel<T, N>, p,
                       windows);
            } else {
                launch(op, stream, blocks, map_threads_of(p, N), 0,
                       group_norm_silu_maps_backward_kernel<T, N>, p);
            }
        }
        launch(op, stream, dim3(columns), sum_columns_threads, sum_columns_threads * sizeof(float),
               group_norm_silu_add_kernel<T>, none);
    });
}

}  // namespace var_ext::cuda
