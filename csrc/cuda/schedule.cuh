// A schedule for kernels. Sides never shrink, so scales of equal length are adjacent and the whole fits into
// a kernel's parameters: 64 different sides have at least 89 440 tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "ops/block_causal_attention.h"

namespace var_ext::cuda {

struct Schedule {
    static constexpr int most = 64;
    struct Run {                // scales of one length
        int32_t first, length;  // first token of the first of them, tokens of each
    };
    Run runs[most];
    int32_t count;
    int32_t tokens;

    // One past the last token of the scale that `token` lies in: the keys that it sees.
    __host__ __device__ int32_t end_of_scale(int32_t token) const {
        const Run& run = runs[run_of(token)];
        return run.first + ((token - run.first) / run.length + 1) * run.length;
    }
    // The first token of that scale.
    __host__ __device__ int32_t start_of_scale(int32_t token) const {
        const Run& run = runs[run_of(token)];
        return run.first + (token - run.first) / run.length * run.length;
    }

  private:
    __host__ __device__ int32_t run_of(int32_t token) const {
        int32_t i = 0;
        while (i + 1 < count && runs[i + 1].first <= token) ++i;
        return i;
    }
};

// `lengths`: tokens of each scale, ascending. Throws std::invalid_argument.
inline Schedule make_schedule(const char* op, const std::vector<int64_t>& lengths) {
    Schedule s = {};
    int64_t tokens = 0;
    for (size_t k = 0; k < lengths.size(); ++k) {
        if (k > 0 && lengths[k] < lengths[k - 1]) contract_error(op, "patch_nums must not shrink");
        if (k == 0 || lengths[k] != lengths[k - 1]) {
            if (s.count == Schedule::most) {
                contract_error(op, "patch_nums must hold at most " + std::to_string(Schedule::most) +
                                       " different sides on CUDA, got more");
            }
            s.runs[s.count++] = {static_cast<int32_t>(tokens), static_cast<int32_t>(lengths[k])};
        }
        tokens += lengths[k];
    }
    if (tokens > INT32_MAX) {
        contract_error(op, "L must be below 2^31 on CUDA, got " + std::to_string(tokens));
    }
    s.tokens = static_cast<int32_t>(tokens);
    return s;
}

}  // namespace var_ext::cuda
