// The search after a filter on the tensor cores; its tokens equal those of the plain search.
//
// The filter computes g' ~ x.e - |e|^2 / 2 for every code from x' and e', x and e rounded to bf16. The plain
// search computes g, in fp32 and with another rounding. With Euclidean norms and dx = x - x', de = e - e':
//   |x.e - x'.e'| = |dx.e + x'.de| <= |dx| |e| + |x'| |de|.
// Products of bf16 are exact. For sums inside a matrix instruction PTX promises single precision at least,
// and leaves order and rounding open: each of its 17 summands is taken to cost 2^-21 of |x| |e| + |e|^2 / 2,
// which bounds them all, and each step of the plain search 2^-23. So rounding takes the two apart by
// (C + 2) 2^-20 (|x| |e| + |e|^2 / 2) at most, C filled up to groups of 32, and underflow by
// (C + 2) 2^-125. The sum B of these, with the largest |e| and |de|, bounds |g - g'|. The code that the plain
// search would choose has g >= g of the filter's best, hence g' >= max g' - 2B: codes below are neither it
// nor tie with it. The others are searched again by the plain search's own arithmetic.
//
// Codes are judged in panels of eight, those that a lane has of 32. Counted for normal vectors, 4096 codes,
// 32 channels: 2B is 0.36, and 1.4 panels a vector remain, 11 codes; of 8 splits of the codebook 1.3 each.
// With bf16 split in two (three products) 2B would be 0.012 and 1.01 panels remain: three times the filter to
// save a quarter of the panels. A warp has two products of 16 x 8 x 16 for 128 scores, 3.3 cycles of an H100
// at the 60% that mma.sync reaches, and about as many for maxima and the loads of codes; the plain search
// takes 32.
#pragma once

#include "cuda/nearest_code_search.cuh"

namespace var_ext::cuda {

constexpr int filter_rows = NearestCodeLayout::filter_row_tile;  // of a block; a warp has a quarter of them
constexpr int filter_warps = search_threads / 32;
// Candidates of a warp. If there are more, the block searches directly: 16 panels per vector take as long.
constexpr int filter_candidates = 512;

// Words of shared memory: two stages of codes and of -|e|^2 / 2; candidates; bounds; counts.
__host__ __device__ inline int filter_shared(int groups) {
    return 2 * search_codes_of_tile * (16 * groups + 1) + filter_warps * (2 * filter_candidates + 32 + 1);
}

// The largest |e|, |e - e'| and sum |e|: the first two of a split, the third of the whole codebook.
struct CodeNorms {
    float e, de, size;
};
__device__ inline CodeNorms largest_norms(const CodeSearch& p, int first_tile, int end_tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    CodeNorms most = {0.0f, 0.0f, 0.0f};
    for (int i = 2 * first_tile + lane; i < 2 * end_tile; i += 32) {
        most.e = larger(most.e, p.norms[2 * i]);
        most.de = larger(most.de, p.norms[2 * i + 1]);
    }
    for (int i = lane; i < 2 * p.tiles; i += 32) most.size = larger(most.size, p.largest[i]);
    for (int distance = 16; distance > 0; distance /= 2) {
        most.e = larger(most.e, __shfl_xor_sync(0xffffffff, most.e, distance));
        most.de = larger(most.de, __shfl_xor_sync(0xffffffff, most.de, distance));
        most.size = larger(most.size, __shfl_xor_sync(0xffffffff, most.size, distance));
    }
    return most;
}

// 2B; infinite or NaN if there is no bound: then nothing is below it.
__device__ inline float filter_margin(const CodeNorms& codes, float x, float dx, int channels) {
    const float steps = static_cast<float>(channels + 2);
    const float size = (x + dx) * codes.e + codes.e * codes.e;
    return 2.0f * (dx * codes.e + x * codes.de + steps * (0x1p-20f * size + 0x1p-125f)) * (1.0f + 0x1p-10f);
}

// No code below it can be the nearest. The subtraction rounds.
__device__ inline float filter_bound(float highest, float margin) {
    const float bound = highest - margin;
    return bound - fabsf(bound) * 0x1p-22f;
}

// A candidate in two words: 5 bits of its vector and 26 of its panel, later of its code; what the filter
// found, later the score.
struct Candidate {
    unsigned place;
    float value;
    __device__ static unsigned at(int row, int code) {
        return static_cast<unsigned>(row) << 26 | static_cast<unsigned>(code);
    }
    __device__ int row() const { return static_cast<int>(place >> 26); }
    __device__ int code() const { return static_cast<int>(place & 0x3ffffff); }
};

// Those of a warp; padded to avoid bank conflicts.
struct Candidates {
    unsigned* places;  // (filter_candidates,), the values behind them
    __device__ float* values() const { return reinterpret_cast<float*>(places) + filter_candidates; }
    __device__ Candidate get(int i) const { return {places[i], values()[i]}; }
    __device__ void set(int i, const Candidate& candidate) const {
        places[i] = candidate.place;
        values()[i] = candidate.value;
    }
};

// Appends the candidates of lanes that have one; returns how many there are, even if not all have room.
__device__ inline int append(const Candidates& list, int count, bool mine, const Candidate& candidate) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned all = __ballot_sync(0xffffffff, mine);
    const int place = count + __popc(all & ((1u << lane) - 1));
    const bool has_room = place < filter_candidates;  // mask
    if (mine && has_room) list.set(place, candidate);
    return count + __popc(all);
}

// The scores of the panels in a warp's list as the plain search computes them, four lanes a panel, and the
// lowest of each vector to `found`. `bound`: of vector `lane` of the warp.
__device__ inline void search_candidates(const CodeSearch& p, int split, int64_t first_row,
                                         const Candidates& list, int count, float bound) {
    const int lane = static_cast<int>(threadIdx.x) % 32, memory_row = p.channels_packed + 4;
    int kept = 0;  // the bounds have risen since
    for (int first = 0; first < count; first += 32) {
        const bool there = first + lane < count;  // mask
        Candidate candidate = {};
        if (there) candidate = list.get(first + lane);
        const float bound_here = __shfl_sync(0xffffffff, bound, candidate.row());
        const bool stays = there && !(candidate.value < bound_here);
        __syncwarp();
        kept = append(list, kept, stays, candidate);
        __syncwarp();
    }
    const int first_code = first_tile_of(p, split) * search_codes_of_tile;
    for (int first = 0; first < kept; first += 8) {
        const bool there = first + lane / 4 < kept;  // mask
        Candidate candidate = {};
        if (there && lane % 4 == 0) candidate = list.get(first + lane / 4);
        candidate.place = __shfl_sync(0xffffffff, candidate.place, lane & ~3);
        float low = INFINITY;
        int code = 0;
        if (there) {
            const int panel = candidate.code(), four = lane % 4;
            const int mine = first_code + panel / 4 * 32 + panel % 4 * 2 + four / 2 * 8 + four % 2;
            const float* const x = p.rows + (first_row + candidate.row()) * memory_row;
            const float* const e = p.codes + static_cast<int64_t>(mine) * memory_row;
            const float* const other = e + 16 * memory_row;
            float dot = 0.0f, other_dot = 0.0f;
#pragma unroll 2
            for (int c = 0; c < p.channels_packed; c += 4) {
                float of_row[4], of_code[4], of_other[4];
                const uint4 bits[3] = {ptx::load_16(x + c), ptx::load_16(e + c), ptx::load_16(other + c)};
                memcpy(of_row, &bits[0], 16);
                memcpy(of_code, &bits[1], 16);
                memcpy(of_other, &bits[2], 16);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    dot = add_product(dot, of_row[k], of_code[k]);
                    other_dot = add_product(other_dot, of_row[k], of_other[k]);
                }
            }
            take_lower(low, code, e[p.channels_packed] - dot, mine);
            take_lower(low, code, other[p.channels_packed] - other_dot, mine + 16);
        }
        for (int distance = 2; distance > 0; distance /= 2) {
            const float other_low = __shfl_xor_sync(0xffffffff, low, distance);
            const int other_code = __shfl_xor_sync(0xffffffff, code, distance);
            take_lower(low, code, other_low, other_code);
        }
        if (there && lane % 4 == 0) {
            list.set(first + lane / 4, {Candidate::at(candidate.row(), code), low});
        }
    }
    __syncwarp();
    float low = INFINITY;
    int code = 0;
    for (int first = 0; first < kept; first += 32) {
        const bool there = first + lane < kept;  // mask
        Candidate mine = {};
        if (there) mine = list.get(first + lane);
        for (int i = 0; i < min(32, kept - first); ++i) {
            const Candidate candidate = {__shfl_sync(0xffffffff, mine.place, i),
                                         __shfl_sync(0xffffffff, mine.value, i)};
            if (candidate.row() == lane) take_lower(low, code, candidate.value, candidate.code());
        }
    }
    const bool writes = first_row + lane < p.n;  // mask
    if (!writes) return;
    float* const to = p.found + 2 * (split * p.n + first_row + lane);
    to[0] = low;
    to[1] = __uint_as_float(static_cast<unsigned>(code));
}

// A warp has 32 vectors in registers, two by 16, and goes through all codes of a split: lane 4 g + t holds
// vectors g, g + 8, g + 16 and g + 24, of 32 channels the eight from 8 t on. (The order of channels is free,
// if both sides have the same.) Of 32 codes it gets the scores of 8 j + 2 t and the next, j < 4: a panel.
// budget <1>: registers <= 168, shared <= 46080, blocks >= 3
// budget <2>: registers <= 168, shared <= 67584, blocks >= 2
// sass: HMMA.16816.F32.BF16, LDS.128, LDGSTS, LDG.E.128
template <int groups>
__global__ void __launch_bounds__(search_threads, groups == 1 ? 3 : 2)
    nearest_code_filter_kernel(const CodeSearch p) {
    ptx::wait_for_previous();
    constexpr int tile_words = search_codes_of_tile * 16 * groups;
    uint32_t* const low = reinterpret_cast<uint32_t*>(ptx::shared_memory());  // (2, groups, 128, 16)
    float* const minus = reinterpret_cast<float*>(low + 2 * tile_words);      // (2, 128)
    unsigned* const lists = reinterpret_cast<unsigned*>(minus + 2 * search_codes_of_tile);
    float* const bounds = reinterpret_cast<float*>(lists + filter_warps * 2 * filter_candidates);  // (128,)
    int* const counts = reinterpret_cast<int*>(bounds + filter_rows);                              // (4,)

    const int split = static_cast<int>(blockIdx.x) % p.splits;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x / p.splits) * filter_rows;
    const int first_tile = first_tile_of(p, split), tiles = first_tile_of(p, split + 1) - first_tile;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, t = lane % 4;
    const Candidates list = {lists + warp * 2 * filter_candidates};

    const auto copy = [&](int tile) {
        const uint32_t* const from = p.low + static_cast<int64_t>(first_tile + tile) * tile_words;
        for (int i = static_cast<int>(threadIdx.x); i < tile_words / 4; i += search_threads) {
            ptx::cp_async_16(low + tile % 2 * tile_words + 4 * i, from + 4 * i, true);
        }
        if (warp == 0) {
            ptx::cp_async_16(
                minus + tile % 2 * search_codes_of_tile + 4 * lane,
                p.minus + static_cast<int64_t>(first_tile + tile) * search_codes_of_tile + 4 * lane, true);
        }
        ptx::cp_async_commit();
    };
    copy(0);

    // vectors m * 16 + h * 8 + g of the warp
    uint32_t x[2][2 * groups][4];
    float margin[2][2], highest[2][2];
    bool wanted[2][2];  // the last step searches special cases
    const CodeNorms norms = largest_norms(p, first_tile, first_tile + tiles);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = first_row + warp * 32 + m * 16 + h * 8 + g;
            const bool here = row < p.n;  // mask
            const float* const from = p.rows + (here ? row : 0) * (p.channels_packed + 4);
            float square = 0.0f, lost = 0.0f;
#pragma unroll
            for (int group = 0; group < groups; ++group) {
                const int first = 32 * group + 8 * t;
                const bool inside = first < p.channels_packed;  // mask
                const uint4 words =
                    inside ? low_channels(from + first, square, lost) : make_uint4(0, 0, 0, 0);
                x[m][2 * group][h] = words.x;
                x[m][2 * group][h + 2] = words.y;
                x[m][2 * group + 1][h] = words.z;
                x[m][2 * group + 1][h + 2] = words.w;
            }
            for (int distance = 2; distance > 0; distance /= 2) {
                square += __shfl_xor_sync(0xffffffff, square, distance);
                lost += __shfl_xor_sync(0xffffffff, lost, distance);
            }
            margin[m][h] = filter_margin(norms, norm_bound(square, p.channels), norm_bound(lost, p.channels),
                                         32 * groups);
            highest[m][h] = -INFINITY;
            wanted[m][h] = here && is_ordinary(from[p.channels_packed + 1], norms.size);
        }
    }

    int count = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) copy(tile + 1);
        const uint32_t* const codes = low + tile % 2 * tile_words;
        const float* const bias = minus + tile % 2 * search_codes_of_tile;
#pragma unroll 1
        for (int panel = 0; panel < search_codes_of_tile / 32; ++panel) {
            float most[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int first = 32 * panel + 8 * j;
                uint4 e[groups];
#pragma unroll
                for (int group = 0; group < groups; ++group) {
                    e[group] = ptx::load_16(codes + (group * search_codes_of_tile + first + g) * 16 + 4 * t);
                }
                const float start[2] = {bias[first + 2 * t], bias[first + 2 * t + 1]};
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float score[4] = {start[0], start[1], start[0], start[1]};
#pragma unroll
                    for (int group = 0; group < groups; ++group) {
                        ptx::mma_16816<__nv_bfloat16>(score, x[m][2 * group], e[group].x, e[group].y);
                        ptx::mma_16816<__nv_bfloat16>(score, x[m][2 * group + 1], e[group].z, e[group].w);
                    }
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        most[m][h] = fmaxf(most[m][h], fmaxf(score[2 * h], score[2 * h + 1]));
                    }
                }
            }
            bool stays[2][2], any = false;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float over = most[m][h];
                    for (int distance = 2; distance > 0; distance /= 2) {
                        over = fmaxf(over, __shfl_xor_sync(0xffffffff, over, distance));
                    }
                    highest[m][h] = fmaxf(highest[m][h], over);
                    stays[m][h] = wanted[m][h] && !(most[m][h] < filter_bound(highest[m][h], margin[m][h]));
                    any = any || stays[m][h];
                }
            }
            if (!__any_sync(0xffffffff, any)) continue;
            const int mine = (tile * (search_codes_of_tile / 32) + panel) * 4 + t;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    count = append(list, count, stays[m][h],
                                   {Candidate::at(m * 16 + h * 8 + g, mine), most[m][h]});
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (t == 0) bounds[warp * 32 + m * 16 + h * 8 + g] = filter_bound(highest[m][h], margin[m][h]);
        }
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    bool fits = true;
    for (int w = 0; w < filter_warps; ++w) fits = fits && counts[w] <= filter_candidates;
    if (fits) {
        search_candidates(p, split, first_row + warp * 32, list, count, bounds[warp * 32 + lane]);
        return;
    }
#pragma unroll 1
    for (int first = 0; first < filter_rows; first += search_rows) {
        __syncthreads();
        search_tiles(p, split, first_row + first);
    }
}

// Instead of the plain search's second step.
inline void filter_codes(const char* op, const CudaStream& stream, const CodeSearch& search) {
    const int64_t row_blocks = (search.n + filter_rows - 1) / filter_rows;
    const int groups = filter_groups(search.channels);
    const int words = max(filter_shared(groups), search_shared(search.channels_packed));
    launch(op, stream, dim3(static_cast<unsigned>(row_blocks * search.splits)), search_threads,
           words * sizeof(float), groups == 1 ? nearest_code_filter_kernel<1> : nearest_code_filter_kernel<2>,
           search);
}

}  // namespace var_ext::cuda
