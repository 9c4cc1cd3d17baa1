// A block per row. The row is read once and stays in registers, or is reread at each step if it is too long.
#include "ops/sample_tokens.h"

#include <algorithm>
#include <string>

#include "common/philox.h"
#include "cuda/launch.cuh"
#include "cuda/sample_tokens_row.cuh"
#include "cuda/sample_tokens_select.cuh"
#include "ops/sample_tokens_steps.h"

namespace var_ext::cuda {

namespace {

constexpr const char* op = "sample_tokens";
constexpr unsigned sample_threads = 1024, sample_shared = 2 * 32 * sizeof(uint64_t);

// The first index whose inclusive prefix sum of weights above `low` exceeds `target`, which is less than
// their sum. One thread writes it.
template <class Row>
__device__ void write_draw(const Row& row, uint32_t low, uint64_t target, BlockSums& sums, int64_t* out) {
    uint64_t before = 0;
#pragma unroll
    for (uint32_t g = 0; g < row.groups(); ++g) {
        uint32_t weights[Row::group];
        row.load(g, weights);
        uint64_t mine = 0, total;
        for (unsigned j = 0; j < Row::group; ++j) mine += weights[j] > low ? weights[j] : 0;
        const uint64_t end = before + sums.prefix(mine, total);
        if (end > target && end - mine <= target) {
            uint64_t sum = end - mine;
            unsigned passed = 0;  // elements whose prefix sum does not exceed the target
            for (unsigned j = 0; j < Row::group; ++j) {
                sum += weights[j] > low ? weights[j] : 0;
                passed += sum <= target;
            }
            *out = row.begin_of(g) + passed;
        }
        before += total;
        if (before > target) return;  // uniform over the block
    }
}

// Four blocks of 256 threads, for V = 4096, fit a multiprocessor.
// budget: registers <= 64, shared <= 512, blocks >= 1
// sass: LDG.E.128
template <class T, bool held>
__global__ void __launch_bounds__(sample_threads, 1) sample_tokens_kernel(const SampleTokensParams p) {
    ptx::wait_for_previous();
    const uint32_t image = blockIdx.x / static_cast<uint32_t>(p.l);
    const uint32_t position = blockIdx.x - image * static_cast<uint32_t>(p.l);
    const SampleSettings settings = sample_settings(p, image);
    BlockSums sums(ptx::shared_memory());
    SampleRow<T, held> row(p, settings, image, position);
    int64_t* const out = p.out + image * p.out_stride_b + position * p.out_stride_l;

    uint32_t most = 0;
    row.each([&](uint32_t key) { most = max(most, key); });
    most = sums.largest(most);
    const bool fine = most > row.key(-INFINITY) && most < row.key(INFINITY) && sample_allows(settings);
    if (!fine) {
        if (threadIdx.x == 0) *out = -1;
        return;
    }
    const float largest = row.logit(most);

    // logits more than 25 below the largest have weight 0, kept or not
    Bracket<CountOfItems> keys = {row.key(largest - 25.0f) - 1, most, 0, 0};
    const uint64_t top_k = static_cast<uint64_t>(settings.top_k);
    if (top_k > 0) {
        keys.above_low = sum_above<CountOfItems>(row, keys.low, sums);
        if (keys.above_low > top_k) {
            narrow(row, keys, top_k, sums, [&](uint32_t low, uint32_t high, float share) {
                const float from = row.logit(low), bounded = min(max(share, 0.02f), 0.98f);
                return row.key(from + bounded * (row.logit(high) - from));
            });
        }
    }
    row.weigh(keys.low, largest);

    using Mass = MassOfItems<held>;
    Bracket<Mass> weights = {0, 1u << 30, sum_above<Mass>(row, 0, sums), 0};
    if (settings.top_p > 0) {
        const uint64_t need = sample_need(settings.top_p, Mass::mass(weights.above_low));
        narrow(row, weights, need, sums,
               [](uint32_t low, uint32_t high, float) {  // weights spread over exponents
                   const uint32_t both = __float_as_uint(static_cast<float>(max(low, 1u))) / 2 +
                                         __float_as_uint(static_cast<float>(high)) / 2;
                   return static_cast<uint32_t>(__uint_as_float(both));
               });
    }
    const uint64_t seed = static_cast<uint64_t>(p.seeds[image * p.seeds_stride]);
    const uint32_t word = philox4x32({{position, p.scale_index, 0, 0}}, seed).word[0];
    write_draw(row, weights.low, sample_target(word, Mass::mass(weights.above_low)), sums, out);
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, const CudaStream& stream) {
    constexpr int64_t limit = int64_t{1} << 31;
    const int64_t rows = p.b * p.l;
    if (rows >= limit) {
        contract_error(op, "B * L must be below 2^31 on CUDA, got " + std::to_string(rows));
    }
    if (rows == 0) return;
    const int64_t warps = (p.v + 32 * sample_held - 1) / (32 * sample_held);
    const bool held = warps <= sample_threads / 32;
    const unsigned threads = held ? static_cast<unsigned>(32 * warps) : sample_threads;
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        launch(op, stream, dim3(static_cast<unsigned>(rows)), threads, sample_shared,
               held ? sample_tokens_kernel<T, true> : sample_tokens_kernel<T, false>, p);
    });
}

}  // namespace var_ext::cuda
