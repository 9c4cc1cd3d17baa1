// Vectors of any strides, or computed, as aligned rows; unit length for cosine. A thread per vector: its sums
// are chains over the channels as on the CPU.
#pragma once

#include <type_traits>

#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "cuda/resample.cuh"
#include "ops/nearest_code.h"

namespace var_ext::cuda {

constexpr unsigned nearest_code_pack_threads = NearestCodeLayout::pack_rows;
constexpr float nearest_code_shortest = 1e-12f;  // the floor that torch's normalize has

// Rows of a matrix in memory.
struct MatrixRows {
    const float* data;
    int64_t stride_row, stride_channel;
    __device__ float operator()(int64_t row, int c) const {
        return data[row * stride_row + c * stride_channel];
    }
};

// The larger one; NaN if one is.
__device__ inline float larger(float x, float y) {
    return x > y || x != x ? x : y;
}

struct PackedRows {
    float* to;       // (rows, channels_packed + 4)
    float* largest;  // of each block the largest sum |e|; null if not needed
    int64_t rows;
    int channels, channels_packed;
    bool codes;  // else vectors of x: the CPU does not fuse their squares into the sum
    bool cosine;
};

// Destination of the codes' bf16 copy: see NearestCodeLayout.
struct FilterCodes {
    uint32_t* low;
    float *minus, *norms;
    int groups;
};
struct NoFilter {};

__host__ __device__ inline int filter_groups(int channels) {
    return (channels + 31) / 32;
}

// Two channels in bf16. Denormals become 0: a matrix instruction may treat them as 0.
__device__ inline uint32_t low_pair(float first, float second) {
    const uint32_t bits = pack<__nv_bfloat16>(first, second);
    return (bits & 0x7f80 ? bits & 0xffff : 0) | (bits & 0x7f800000 ? bits & 0xffff0000 : 0);
}

// Eight channels in bf16; adds to the squares of the result and of its rounding error.
__device__ inline uint4 low_channels(const float* from, float& square, float& lost) {
    uint32_t words[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 bits = ptx::load_16(from + 4 * half);
        float quad[4];
        memcpy(quad, &bits, 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t pair = low_pair(quad[2 * i], quad[2 * i + 1]);
            const float2 kept = unpack<__nv_bfloat16>(pair);
            const float first = quad[2 * i] - kept.x, second = quad[2 * i + 1] - kept.y;
            square += kept.x * kept.x + kept.y * kept.y;
            lost += first * first + second * second;
            words[2 * half + i] = pair;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// An upper bound of a norm from its sum of squares: 2^-125 a square for underflow, 2^-10 for rounding.
__device__ inline float norm_bound(float squares, int channels) {
    return sqrtf(squares + static_cast<float>(channels) * 0x1p-125f) * (1.0f + 0x1p-10f);
}

// A packed row into the filter's codes; to sizes[1] and sizes[2] its norm and that of the rounding error.
__device__ inline void pack_low(const FilterCodes& to, const PackedRows& p, int64_t row, const float* from,
                                float (&sizes)[3]) {
    constexpr int tile = static_cast<int>(NearestCodeLayout::code_tile);
    float square = 0.0f, lost = 0.0f;
    const auto place = [&](int first) {
        return to.low + ((row / tile * to.groups + first / 32) * tile + row % tile) * 16 + first % 32 / 2;
    };
    for (int first = 0; first < p.channels_packed; first += 8) {
        ptx::store_16(place(first), low_channels(from + first, square, lost));
    }
    for (int first = p.channels_packed; first < 32 * to.groups; first += 8) {
        ptx::store_16(place(first), make_uint4(0, 0, 0, 0));
    }
    to.minus[row] = -from[p.channels_packed];
    sizes[2] = norm_bound(lost, p.channels);
    sizes[1] = norm_bound(square, p.channels) + sizes[2];
}

// budget: threads <= 64, registers <= 64, shared <= 256, blocks >= 16
// sass: LDG.E.128, STG.E.128
template <class Source, class Filter>
__global__ void __launch_bounds__(nearest_code_pack_threads, 16)
    nearest_code_pack_kernel(const Source source, const PackedRows p, const Filter filter) {
    ptx::wait_for_previous();
    constexpr bool filters = std::is_same_v<Filter, FilterCodes>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * nearest_code_pack_threads + threadIdx.x;
    const bool here = row < p.rows;  // mask
    float size = 0.0f;
    float* const to = p.to + row * (p.channels_packed + 4);
    if (here) {
        float square = 0.0f;
        for (int first = 0; first < p.channels_packed; first += 4) {
            float quad[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool inside = first + i < p.channels;  // mask
                quad[i] = inside ? source(row, first + i) : 0.0f;
                square =
                    p.codes ? add_product(square, quad[i], quad[i]) : plus(square, times(quad[i], quad[i]));
                size = plus(size, fabsf(quad[i]));
            }
            uint4 bits;
            memcpy(&bits, quad, 16);
            ptx::store_16(to + first, bits);
        }
        if (p.cosine) {
            const float norm = sqrtf(square),
                        length = norm < nearest_code_shortest ? nearest_code_shortest : norm;
            size = 0.0f;
            for (int first = 0; first < p.channels_packed; first += 4) {
                uint4 bits = ptx::load_16(to + first);
                float quad[4];
                memcpy(quad, &bits, 16);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    quad[i] = quad[i] / length;
                    size = plus(size, fabsf(quad[i]));
                }
                memcpy(&bits, quad, 16);
                ptx::store_16(to + first, bits);
            }
            square = 0.0f;
        }
        const float last[4] = {p.codes ? square / 2.0f : 0.0f, size, 0.0f, 0.0f};
        uint4 bits;
        memcpy(&bits, last, 16);
        ptx::store_16(to + p.channels_packed, bits);
    }
    if (p.largest == nullptr) return;

    const bool fills = !here;
    if (fills) {
        for (int first = 0; first < p.channels_packed; first += 4) {
            ptx::store_16(to + first, make_uint4(0, 0, 0, 0));
        }
        ptx::store_16(to + p.channels_packed, make_uint4(0x7f800000, 0, 0, 0));  // infinitely far
    }
    float sizes[3] = {size};
    if constexpr (filters) pack_low(filter, p, row, to, sizes);
    constexpr int count = filters ? 3 : 1;
    constexpr unsigned warps = nearest_code_pack_threads / 32;
    float* const of_warps = reinterpret_cast<float*>(ptx::shared_memory());  // (count, warps)
#pragma unroll
    for (int i = 0; i < count; ++i) {
        for (int distance = 16; distance > 0; distance /= 2) {
            sizes[i] = larger(sizes[i], __shfl_xor_sync(0xffffffff, sizes[i], distance));
        }
        if (threadIdx.x % 32 == 0) of_warps[i * warps + threadIdx.x / 32] = sizes[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            for (unsigned w = 1; w < warps; ++w) sizes[i] = larger(sizes[i], of_warps[i * warps + w]);
        }
        p.largest[blockIdx.x] = sizes[0];
        if constexpr (filters) {
            filter.norms[2 * blockIdx.x] = sizes[1];
            filter.norms[2 * blockIdx.x + 1] = sizes[2];
        }
    }
}

// Of codes with `largest`, then whole tiles of them are written; else of vectors.
template <class Source, class Filter>
void pack_rows(const char* op, const CudaStream& stream, const Source& source, const PackedRows& p,
               const Filter& filter, int64_t rows_in_memory) {
    const int64_t blocks = (rows_in_memory + nearest_code_pack_threads - 1) / nearest_code_pack_threads;
    launch(op, stream, dim3(static_cast<unsigned>(blocks)), nearest_code_pack_threads,
           3 * nearest_code_pack_threads / 32 * sizeof(float), nearest_code_pack_kernel<Source, Filter>,
           source, p, filter);
}

}  // namespace var_ext::cuda
