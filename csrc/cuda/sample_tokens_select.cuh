// Sums over a block, and selection without sorting: bisection of the values.
#pragma once

#include "cuda/ptx.cuh"

namespace var_ext::cuda {

// Results over all threads of a block, available to each. Two alternating buffers need one barrier per call:
// a thread that reuses a buffer has passed the barrier after its last use. 512 bytes of shared memory.
class BlockSums {
  public:
    __device__ explicit BlockSums(unsigned char* shared) : buffer_(reinterpret_cast<uint64_t*>(shared)) {}

    template <class Sum>
    __device__ Sum add(Sum mine) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            mine += __shfl_xor_sync(0xffffffff, mine, distance);
        const uint64_t* all = exchange(mine, 0);
        Sum sum = 0;
        for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += static_cast<Sum>(all[w]);
        return sum;
    }

    __device__ uint32_t largest(uint32_t mine) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            mine = max(mine, __shfl_xor_sync(0xffffffff, mine, distance));
        }
        const uint64_t* all = exchange(mine, 0);
        uint32_t most = 0;
        for (unsigned w = 0; w < blockDim.x / 32; ++w) most = max(most, static_cast<uint32_t>(all[w]));
        return most;
    }

    // The sum over this thread and those before it; `total`: over all.
    __device__ uint64_t prefix(uint64_t mine, uint64_t& total) {
        const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (unsigned distance = 1; distance < 32; distance *= 2) {
            const uint64_t before = __shfl_up_sync(0xffffffff, mine, distance);
            mine += lane >= distance ? before : 0;
        }
        const uint64_t* all = exchange(mine, 31);
        total = 0;
        for (unsigned w = 0; w < blockDim.x / 32; ++w) {
            mine += w < warp ? all[w] : 0;
            total += all[w];
        }
        return mine;
    }

  private:
    // One value of each warp, that of `lane`.
    __device__ const uint64_t* exchange(uint64_t value, unsigned lane) {
        uint64_t* const all = buffer_ + 32 * turn_;
        turn_ ^= 1;
        if (threadIdx.x % 32 == lane) all[threadIdx.x / 32] = value;
        __syncthreads();
        return all;
    }

    uint64_t* buffer_;
    unsigned turn_ = 0;
};

// Each item weighs one: top-k.
struct CountOfItems {
    using Sum = uint32_t;
    __device__ static Sum of(uint32_t) { return 1; }
    __device__ static uint64_t mass(Sum sum) { return sum; }
    __device__ static bool is_one(Sum low, Sum high) { return low - high == 1; }
};
// Each item weighs its value, at most 2^30: top-p. Where at most 2^15 are summed, their number is kept above
// bit 46.
template <bool counted>
struct MassOfItems {
    using Sum = uint64_t;
    static constexpr Sum one = counted ? Sum{1} << 46 : 0;
    __device__ static Sum of(uint32_t item) { return one + item; }
    __device__ static uint64_t mass(Sum sum) { return counted ? sum & (one - 1) : sum; }
    __device__ static bool is_one(Sum low, Sum high) { return counted && (low >> 46) - (high >> 46) == 1; }
};

// Items above `low` have at least the mass that is needed, those above `high` less.
template <class Mass>
struct Bracket {
    uint32_t low, high;
    typename Mass::Sum above_low, above_high;
};

template <class Mass, class Row>
__device__ typename Mass::Sum sum_above(const Row& row, uint32_t bound, BlockSums& sums) {
    typename Mass::Sum mine = 0;
    row.each([&](uint32_t item) { mine += item > bound ? Mass::of(item) : 0; });
    return sums.add(mine);
}

// Moves `low` up until the items above it are those of at least the threshold: the smallest item with less
// mass above it than needed. Two steps of three go where `guess(low, high, share)` says, with the share of
// the mass in the bracket that lies below the threshold; the third halves the bracket of integers.
template <class Mass, class Row, class Guess>
__device__ void narrow(const Row& row, Bracket<Mass>& b, uint64_t need, BlockSums& sums, const Guess& guess) {
    unsigned guesses = 2;
#pragma unroll 1
    while (b.high - b.low > 1 && Mass::mass(b.above_low) != need &&
           !Mass::is_one(b.above_low, b.above_high)) {
        uint32_t middle = b.low + (b.high - b.low) / 2;
        if (guesses > 0) {
            const uint64_t inside = Mass::mass(b.above_low) - Mass::mass(b.above_high);
            const float share =
                static_cast<float>(Mass::mass(b.above_low) - need) / static_cast<float>(inside);
            middle = min(max(guess(b.low, b.high, share), b.low + 1), b.high - 1);
        }
        guesses = guesses > 0 ? guesses - 1 : 2;
        const typename Mass::Sum above = sum_above<Mass>(row, middle, sums);
        const bool enough = Mass::mass(above) >= need;
        (enough ? b.low : b.high) = middle;
        (enough ? b.above_low : b.above_high) = above;
    }
}

}  // namespace var_ext::cuda
