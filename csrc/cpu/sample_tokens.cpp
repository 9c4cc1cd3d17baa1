#include "ops/sample_tokens.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/sample_tokens.h"
#include "ops/sample_tokens_steps.h"

namespace var_ext::cpu {

namespace {

struct Scratch {
    Buffer<float> floats;
    Buffer<int32_t> integers;
    Buffer<uint64_t> sums;
    int64_t length, chunks;

    Scratch(int64_t threads, const SampleTokensParams& p)
        : length((p.v + 2 * 64) / 64 * 64), chunks(length / sample_chunk + 1) {
        floats = allocate<float>(threads * 3 * length);
        integers = allocate<int32_t>(threads * (p.logits_stride_v == 1 ? 2 : 4) * length);
        sums = allocate<uint64_t>(threads * chunks);
        copies = p.logits_stride_v != 1;
    }
    SampleScratch of(int thread) const {
        float* f = floats.get() + thread * 3 * length;
        int32_t* i = integers.get() + thread * (copies ? 4 : 2) * length;
        return {f,
                f + length,
                f + 2 * length,
                i,
                i + length,
                sums.get() + thread * chunks,
                i + 2 * length,
                i + 3 * length};
    }

  private:
    bool copies;
};

// Of 32 samples, how many may lie above a bound that has the top k above itself but for one row in 30: the
// share of k in V and two standard deviations. 0 where such a bound would not halve the row.
int prefilter_rank(int64_t top_k, int64_t size) {
    if (top_k == 0 || size < 512) return 0;
    const double share = static_cast<double>(top_k) / static_cast<double>(size);
    const int rank = static_cast<int>(std::ceil(32 * share + 2 * std::sqrt(32 * share * (1 - share))));
    return rank <= 20 ? rank : 0;
}

}  // namespace

void sample_tokens(const SampleTokensParams& p) {
    const SampleTokensKernel& kernel = VAR_EXT_SELECT(sample_tokens);
    const auto draw = p.dtype == DType::float32    ? kernel.draw_f32
                      : p.dtype == DType::bfloat16 ? kernel.draw_bf16
                                                   : kernel.draw_f16;
    const int64_t rows = p.b * p.l, size = dtype_size(p.dtype);
    if (rows == 0) return;
    for (int64_t image = 0; image < p.b; ++image) {
        if (sample_allows(sample_settings(p, image))) continue;
        contract_error("sample_tokens", "each top_k must be 0 or more and each top_p in [0, 1], got others");
    }
    const int64_t block = std::clamp<int64_t>(16384 / p.v, 1, 64);  // rows that a thread takes at a time
    const int64_t blocks = (rows + block - 1) / block;
    const int threads = thread_count(blocks, block * (p.v * 8 + 1024));
    const Scratch scratch(threads, p);
    std::vector<char> broken(threads);

    parallel_for(threads, blocks, [&](int64_t task, int thread) {
        const SampleScratch mine = scratch.of(thread);
        for (int64_t i = task * block; i < std::min(rows, (task + 1) * block); ++i) {
            const int64_t image = i / p.l, position = i % p.l;
            const char* cond = static_cast<const char*>(p.logits) +
                               (image * p.logits_stride_b + position * p.logits_stride_l) * size;
            const auto seed = static_cast<uint64_t>(p.seeds[image * p.seeds_stride]);
            const PhiloxWords random =
                philox4x32({{static_cast<uint32_t>(position), p.scale_index, 0, 0}}, seed);
            const SampleSettings settings = sample_settings(p, image);
            const SampleRow row = {cond, cond + (p.guided ? p.b * p.logits_stride_b * size : 0),
                                   random.word[0], settings};
            const int64_t token = draw(p, row, mine, prefilter_rank(settings.top_k, p.v));
            if (token < 0) broken[thread] = 1;
            p.out[image * p.out_stride_b + position * p.out_stride_l] = token;
        }
    });
    if (std::count(broken.begin(), broken.end(), 1) > 0) {
        contract_error("sample_tokens",
                       "each row of logits needs a finite maximum and no NaN, got a row without");
    }
}

}  // namespace var_ext::cpu
