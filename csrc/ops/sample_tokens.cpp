#include "ops/sample_tokens.h"

#include <limits>

namespace var_ext {

SampleTokensParams sample_tokens_params(const TensorView& logits, const TensorView& seeds,
                                        const TensorView& out, int64_t scale_index, std::optional<double> cfg,
                                        int64_t top_k, double top_p) {
    const char* op = "sample_tokens";
    check_dtype(op, "logits", logits, {DType::float32, DType::bfloat16, DType::float16});
    check_dtype(op, "seeds", seeds, {DType::int64});
    check_dtype(op, "out", out, {DType::int64});
    check_shape(op, "seeds", seeds, {{"B", any_size}});
    const int64_t batch = seeds.shape[0];
    check_shape(op, "logits", logits, {{"B", cfg ? 2 * batch : batch}, {"L", any_size}, {"V", any_size}});
    check_shape(op, "out", out, {{"B", batch}, {"L", logits.shape[1]}});
    check_output(op, "out", out);
    constexpr int64_t most = std::numeric_limits<int32_t>::max();  // sums of weights stay below 2^61
    if (logits.shape[2] < 1 || logits.shape[2] > most) {
        contract_error(op, "logits must have V from 1 to 2^31 - 1, got shape " + logits.shape_text());
    }
    if (scale_index < 0 || scale_index > std::numeric_limits<uint32_t>::max()) {
        contract_error(op, "scale_index must be in [0, 2^32), got " + std::to_string(scale_index));
    }
    if (top_k < 0) contract_error(op, "top_k must be 0 or more, got " + std::to_string(top_k));
    if (!(top_p >= 0 && top_p <= 1)) {
        contract_error(op, "top_p must be in [0, 1], got " + std::to_string(top_p));
    }
    SampleTokensParams p;
    p.logits = logits.data;
    p.seeds = static_cast<const int64_t*>(seeds.data);
    p.out = static_cast<int64_t*>(out.data);
    p.dtype = logits.dtype;
    p.b = batch;
    p.l = logits.shape[1];
    p.v = logits.shape[2];
    p.logits_stride_b = logits.strides[0];
    p.logits_stride_l = logits.strides[1];
    p.logits_stride_v = logits.strides[2];
    p.seeds_stride = seeds.strides[0];
    p.out_stride_b = out.strides[0];
    p.out_stride_l = out.strides[1];
    p.scale_index = static_cast<uint32_t>(scale_index);
    p.guided = cfg.has_value();
    p.cond_factor = static_cast<float>(1 + cfg.value_or(0));
    p.uncond_factor = static_cast<float>(cfg.value_or(0));
    p.top_k = top_k < p.v ? top_k : 0;
    p.top_p = top_p;
    return p;
}

}  // namespace var_ext
