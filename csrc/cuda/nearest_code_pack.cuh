// Vectors of any strides, or computed, as aligned rows; for cosine at unit length. A thread a vector: its
// sums are chains over the channels as on the CPU.
#pragma once

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
    float* largest;  // of each block the largest sum |e|; null where it is not wanted
    int64_t rows;
    int channels, channels_packed;
    bool codes;  // else vectors of x: their squares do not fuse with the sum on the CPU
    bool cosine;
};

// budget: threads <= 64, registers <= 64, shared <= 256, blocks >= 16
// sass: LDG.E.128, STG.E.128
template <class Source>
__global__ void __launch_bounds__(nearest_code_pack_threads, 16)
    nearest_code_pack_kernel(const Source source, const PackedRows p) {
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
    for (int distance = 16; distance > 0; distance /= 2) {
        size = larger(size, __shfl_xor_sync(0xffffffff, size, distance));
    }
    float* const sizes = reinterpret_cast<float*>(ptx::shared_memory());  // (warps,)
    if (threadIdx.x % 32 == 0) sizes[threadIdx.x / 32] = size;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned w = 1; w < nearest_code_pack_threads / 32; ++w) size = larger(size, sizes[w]);
        p.largest[blockIdx.x] = size;
    }
}

// Of codes with `largest`, then whole tiles of them are written; else of vectors.
template <class Source>
void pack_rows(const char* op, const CudaStream& stream, const Source& source, const PackedRows& p,
               int64_t rows_in_memory) {
    const int64_t blocks = (rows_in_memory + nearest_code_pack_threads - 1) / nearest_code_pack_threads;
    launch(op, stream, dim3(static_cast<unsigned>(blocks)), nearest_code_pack_threads,
           nearest_code_pack_threads / 32 * sizeof(float), nearest_code_pack_kernel<Source>, source, p);
}

}  // namespace var_ext::cuda
