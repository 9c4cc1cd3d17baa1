// sample_tokens: guidance, top-k, top-p and one draw for every row of logits.
//
// The algorithm is exact, so that every variant and every device draws the same tokens. Each fp32 operation
// rounds to nearest: no fused multiply-add.
//   x      = fp32(logit), or with guidance (1 + cfg) cond - cfg uncond, -inf where cond is
//   m      = max x. NaN in a row, or m infinite: an error
//   top-k: keep x >= the k-th largest x
//   w      = weight(x - m), the integer nearest to 2^30 e^(x - m) up to the error of an fp32 exponential: see
//            sample_weight in cpu/sample_tokens_variant.cpp for its sequence of operations. What lies 22
//            below m weighs 0
//   top-p: S = sum w over what top-k kept. Keep w >= t, the smallest of them with
//            sum {those above t} < S - min(floor((1 - top_p) * S), S - 1)        (product in fp64)
//          Equal weights are kept or dropped together.
//   draw:  T = sum w over what is left. word = the first word of philox(counter (position, scale, 0, 0), key
//   seed).
//          The token is the first index whose inclusive prefix sum of w exceeds floor((word + 1/2) T / 2^32).
// Sums are of integers below 2^63, so their order does not matter; nor does the method that finds the
// thresholds.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

struct SampleTokensParams {
    const void* logits;    // (B, L, V), with guidance (2B, L, V): conditional half first
    const int64_t* seeds;  // (B,)
    int64_t* out;          // (B, L)
    DType dtype;           // of the logits: float32, bfloat16 or float16
    int64_t b, l, v;
    int64_t logits_stride_b, logits_stride_l, logits_stride_v;  // all strides in elements
    int64_t seeds_stride;
    int64_t out_stride_b, out_stride_l;
    uint32_t scale_index;
    bool guided;
    double cfg;
    int64_t top_k;  // 0: keep all
    double top_p;   // 0: keep all
    // (B,) each or null: per-image values that replace the one above. They are on the device of the logits,
    // so a captured CUDA graph can be replayed with others.
    const double* cfgs;
    const int64_t* top_ks;
    const double* top_ps;
    int64_t cfgs_stride, top_ks_stride, top_ps_stride;
};

// What holds for one image: see ops/sample_tokens_steps.h.
struct SampleSettings {
    float cond_factor, uncond_factor;  // 1 + cfg and cfg, rounded to fp32
    int64_t top_k;
    double top_p;
};

// One value for all images, or a tensor (B,) of this dtype.
template <class T>
using OrTensor = std::variant<T, TensorView>;

// Checks the contract; throws std::invalid_argument.
SampleTokensParams sample_tokens_params(const TensorView& logits, const TensorView& seeds,
                                        const TensorView& out, int64_t scale_index,
                                        const std::optional<OrTensor<double>>& cfg,
                                        const OrTensor<int64_t>& top_k, const OrTensor<double>& top_p);

namespace cpu {
// Throws std::invalid_argument if a row has NaN or no finite maximum, or if a value of top_ks or top_ps is
// out of range; what `out` holds then is not defined.
void sample_tokens(const SampleTokensParams& p);
}  // namespace cpu

namespace cuda {
// The host does not see device memory: where the CPU throws, the token is -1.
void sample_tokens(const SampleTokensParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
