// Tiles of 64 vectors against tiles of 128 codes, 8 x 8 scores per thread in registers.
//
// Counted for 32 channels, a tile: 16 loads of 16 bytes from shared memory for 256 fused products a thread,
// so arithmetic is the limit; copies of the next 18 KB of codes are hidden. Rows of channels + 4 floats are
// an odd number of 16-byte units: eight lanes that load from eight rows have no bank conflict.
#pragma once

#include "cuda/nearest_code.cuh"
#include "cuda/nearest_code_pack.cuh"

namespace var_ext::cuda {

constexpr int search_threads = 128, search_rows = 64, search_codes_of_tile = 128;
constexpr int search_channels = 40;  // at once; more are processed in turn

__host__ __device__ inline int search_width(int channels) {
    return channels < search_channels ? channels : search_channels;
}
// Floats of shared memory: two stages of codes, and of vectors too if they do not fit at once.
__host__ __device__ inline int search_shared(int channels) {
    const int stages = channels > search_channels ? 2 : 1;
    return (2 * search_codes_of_tile + stages * search_rows) * (search_width(channels) + 4);
}

// The lower score, of equal ones the lower index.
__device__ inline void take_lower(float& low, int& code, float other_low, int other_code) {
    if (other_low < low || (other_low == low && other_code < code)) {
        low = other_low;
        code = other_code;
    }
}

// Starts to copy `quads` times 16 bytes of `count` rows into shared memory; rows beyond `end` become zeros.
__device__ inline void copy_rows(float* to, int stride, const float* from, int64_t first, int64_t end,
                                 int64_t from_stride, int count, int quads) {
    for (int row = static_cast<int>(threadIdx.x) / 8; row < count; row += search_threads / 8) {
        const bool here = first + row < end;  // mask
        const float* const source = from + (here ? first + row : 0) * from_stride;
        for (int quad = static_cast<int>(threadIdx.x) % 8; quad < quads; quad += 8) {
            ptx::cp_async_16(to + row * stride + 4 * quad, source + 4 * quad, here);
        }
    }
}

__device__ inline int first_tile_of(const CodeSearch& p, int split) {
    return static_cast<int>(static_cast<int64_t>(p.tiles) * split / p.splits);
}

// The work of a block: vectors first_row to first_row + 63 against the tiles of a split.
__device__ inline void search_tiles(const CodeSearch& p, int split, int64_t first_row) {
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const int width = search_width(p.channels_packed), stride = width + 4, memory_row = p.channels_packed + 4;
    const int parts = (p.channels_packed + width - 1) / width;  // of the channels
    float* const codes = shared;                                // (2, 128, stride)
    float* const rows = shared + 2 * search_codes_of_tile * stride;
    const int first_tile = first_tile_of(p, split), end_tile = first_tile_of(p, split + 1);
    const int steps = (end_tile - first_tile) * parts;

    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int my_row = warp / 2 * 4 + lane / 8;   // and each eighth one after it
    const int my_code = warp % 2 * 8 + lane % 8;  // and each sixteenth

    const auto copy = [&](int step) {
        const int part = step % parts, left = p.channels_packed - part * width;
        const bool last = part == parts - 1;  // the part with |e|^2 / 2 behind the channels
        const int quads = (last ? left + 4 : width) / 4;
        const int64_t first_code = static_cast<int64_t>(first_tile + step / parts) * search_codes_of_tile;
        copy_rows(codes + step % 2 * search_codes_of_tile * stride, stride, p.codes + part * width,
                  first_code, first_code + search_codes_of_tile, memory_row, search_codes_of_tile, quads);
        if (parts > 1 || step == 0) {
            copy_rows(rows + (parts > 1 ? step % 2 * search_rows * stride : 0), stride, p.rows + part * width,
                      first_row, p.n, memory_row, search_rows, quads);
        }
        ptx::cp_async_commit();
    };

    float dot[8][8] = {}, low[8];
    int code[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] = INFINITY;
    copy(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) copy(step + 1);
        const int part = step % parts;
        const int channels = min(width, p.channels_packed - part * width);
        const float* const e = codes + (step % 2 * search_codes_of_tile + my_code) * stride;
        const float* const x = rows + ((parts > 1 ? step % 2 * search_rows : 0) + my_row) * stride;
#pragma unroll 1
        for (int c = 0; c < channels; c += 4) {
            float of_row[8][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint4 bits = ptx::load_16(x + 8 * i * stride + c);
                memcpy(of_row[i], &bits, 16);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint4 bits = ptx::load_16(e + 16 * j * stride + c);
                float of_code[4];
                memcpy(of_code, &bits, 16);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) dot[i][j] = add_product(dot[i][j], of_row[i][k], of_code[k]);
                }
            }
        }
        if (part < parts - 1) continue;
        const int first_code = (first_tile + step / parts) * search_codes_of_tile + my_code;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float bias = e[16 * j * stride + channels];
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // strictly lower: the first of equal scores stays
                const float score = bias - dot[i][j];
                if (score < low[i]) {
                    low[i] = score;
                    code[i] = first_code + 16 * j;
                }
                dot[i][j] = 0.0f;
            }
        }
    }

    // over the lanes that share vectors, and over the two warps that do
    __syncthreads();
    float* const lows = shared;  // (2, 64) and the codes behind them
    int* const found = reinterpret_cast<int*>(shared) + 2 * search_rows;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        for (int distance = 4; distance > 0; distance /= 2) {
            const float other_low = __shfl_xor_sync(0xffffffff, low[i], distance);
            const int other_code = __shfl_xor_sync(0xffffffff, code[i], distance);
            take_lower(low[i], code[i], other_low, other_code);
        }
        if (lane % 8 == 0) {
            lows[warp % 2 * search_rows + my_row + 8 * i] = low[i];
            found[warp % 2 * search_rows + my_row + 8 * i] = code[i];
        }
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    const bool writes = row < search_rows && first_row + row < p.n;  // mask
    if (!writes) return;
    float lowest = lows[row];
    int nearest = found[row];
    take_lower(lowest, nearest, lows[search_rows + row], found[search_rows + row]);
    float* const to = p.found + 2 * (split * p.n + first_row + row);
    to[0] = lowest;
    to[1] = __uint_as_float(static_cast<unsigned>(nearest));
}

// budget: registers <= 168, shared <= 67584, blocks >= 2
// sass: LDGSTS, LDS.128
__global__ void __launch_bounds__(search_threads, 2) nearest_code_search_kernel(const CodeSearch p) {
    ptx::wait_for_previous();
    const int split = static_cast<int>(blockIdx.x) % p.splits;
    search_tiles(p, split, static_cast<int64_t>(blockIdx.x / p.splits) * search_rows);
}

// The definition, for vectors or codebooks with NaN, infinities or products near the end of the fp32 range:
// by a warp, lane by lane each 32nd code, the products not fused. The first NaN wins.
__device__ inline int search_unusual(const CodeSearch& p, const float* x) {
    const int lane = static_cast<int>(threadIdx.x) % 32, none = 0x7fffffff;
    float low = INFINITY;
    int code = 0, nan = none;
    for (int64_t v = lane; v < p.v; v += 32) {
        const float* const e = p.codes + v * (p.channels_packed + 4);
        float dot = 0.0f;
        for (int c = 0; c < p.channels; ++c) dot = plus(dot, times(x[c], e[c]));
        const float score = plus(e[p.channels_packed], -dot);
        if (score != score) nan = min(nan, static_cast<int>(v));
        if (score < low) {
            low = score;
            code = static_cast<int>(v);
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other_low = __shfl_xor_sync(0xffffffff, low, distance);
        const int other_code = __shfl_xor_sync(0xffffffff, code, distance);
        take_lower(low, code, other_low, other_code);
        nan = min(nan, __shfl_xor_sync(0xffffffff, nan, distance));
    }
    return nan != none ? nan : code;
}

// Whether no score of a vector overflows or is NaN: |x.e| and |e|^2 are below this product.
__device__ inline bool is_ordinary(float sum_of_x, float largest) {
    return times(plus(sum_of_x, largest), largest) < 1e38f;
}

// A warp a vector: the lowest over the splits of the codebook.
// budget: registers <= 64, shared <= 0, blocks >= 8
__global__ void __launch_bounds__(search_threads, 8) nearest_code_finish_kernel(const CodeSearch p) {
    ptx::wait_for_previous();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (search_threads / 32) + threadIdx.x / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool here = row < p.n;  // mask
    if (!here) return;
    float largest = 0.0f;
    for (int i = lane; i < p.tiles * 2; i += 32) largest = larger(largest, p.largest[i]);
    for (int distance = 16; distance > 0; distance /= 2) {
        largest = larger(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    }
    const float* const x = p.rows + row * (p.channels_packed + 4);
    const bool ordinary = is_ordinary(x[p.channels_packed + 1], largest);
    float low = INFINITY;
    int code = 0;
    if (ordinary) {
        for (int split = lane; split < p.splits; split += 32) {
            const float* const found = p.found + 2 * (split * p.n + row);
            take_lower(low, code, found[0], static_cast<int>(__float_as_uint(found[1])));
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            const float other_low = __shfl_xor_sync(0xffffffff, low, distance);
            const int other_code = __shfl_xor_sync(0xffffffff, code, distance);
            take_lower(low, code, other_low, other_code);
        }
    } else {
        code = search_unusual(p, x);
    }
    if (lane == 0) p.out[row / p.image * p.image_stride + row % p.image * p.stride] = code;
}

}  // namespace var_ext::cuda
