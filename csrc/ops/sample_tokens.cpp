#include "ops/sample_tokens.h"

#include <limits>
#include <type_traits>

namespace var_ext {

namespace {

// The value; of a tensor 0 and the tensor's place.
template <class T>
T value_of(const OrTensor<T>& given, const char* name, int64_t batch, const T*& values, int64_t& stride) {
    if (const T* value = std::get_if<T>(&given)) return *value;
    const TensorView& view = std::get<TensorView>(given);
    check_dtype("sample_tokens", name, view, {std::is_same_v<T, double> ? DType::float64 : DType::int64});
    check_shape("sample_tokens", name, view, {{"B", batch}});
    values = static_cast<const T*>(view.data);
    stride = view.strides[0];
    return 0;
}

}  // namespace

SampleTokensParams sample_tokens_params(const TensorView& logits, const TensorView& seeds,
                                        const TensorView& out, int64_t scale_index,
                                        const std::optional<OrTensor<double>>& cfg,
                                        const OrTensor<int64_t>& top_k, const OrTensor<double>& top_p) {
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
    SampleTokensParams p = {};
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
    if (cfg) p.cfg = value_of(*cfg, "cfg", batch, p.cfgs, p.cfgs_stride);
    p.top_k = value_of(top_k, "top_k", batch, p.top_ks, p.top_ks_stride);
    p.top_p = value_of(top_p, "top_p", batch, p.top_ps, p.top_ps_stride);
    if (p.top_k < 0) contract_error(op, "top_k must be 0 or more, got " + std::to_string(p.top_k));
    if (!(p.top_p >= 0 && p.top_p <= 1)) {
        contract_error(op, "top_p must be in [0, 1], got " + std::to_string(p.top_p));
    }
    return p;
}

}  // namespace var_ext
