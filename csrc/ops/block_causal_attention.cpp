#include "ops/block_causal_attention.h"

namespace var_ext {

namespace {

void check_like(const char* op, const char* name, const TensorView& view, const TensorView& q) {
    check_dtype(op, name, view, {q.dtype});
    check_shape(op, name, view, {{"B", q.shape[0]}, {"L", q.shape[1]}, {"H", q.shape[2]}, {"D", q.shape[3]}});
}

BlockCausalAttentionParams checked(const char* op, const TensorView& q, const TensorView& k,
                                   const TensorView& v, const TensorView& out, const TensorView& lse,
                                   const std::vector<int64_t>& patch_nums, float scale) {
    check_dtype(op, "q", q, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "q", q, {{"B", any_size}, {"L", any_size}, {"H", any_size}, {"D", any_size}});
    check_like(op, "k", k, q);
    check_like(op, "v", v, q);
    check_like(op, "out", out, q);
    check_per_query(op, "lse", lse, q);

    BlockCausalAttentionParams p;
    int64_t total = 0;
    for (int64_t side : patch_nums) {
        if (side < 1 || side > 46340) {  // the square root of 2^31
            contract_error(op, "patch_nums must be 1 to 46340 each, got " + std::to_string(side));
        }
        p.lengths.push_back(side * side);
        total += side * side;
    }
    if (total != q.shape[1]) {
        contract_error(op, "q must have the L = " + std::to_string(total) + " of patch_nums, got " +
                               std::to_string(q.shape[1]));
    }
    AttentionParams& a = p.attention;
    a.q = attention_heads(op, "q", q);
    a.k = attention_heads(op, "k", k);
    a.v = attention_heads(op, "v", v);
    a.out = attention_heads(op, "out", out);
    a.lse = static_cast<float*>(lse.data);
    a.batch = q.shape[0];
    a.queries = a.keys = q.shape[1];
    a.heads = q.shape[2];
    a.dim = q.shape[3];
    a.scale = scale;
    a.dtype = q.dtype;
    return p;
}

}  // namespace

BlockCausalAttentionParams block_causal_attention_params(const TensorView& q, const TensorView& k,
                                                         const TensorView& v, const TensorView& out,
                                                         const TensorView& lse,
                                                         const std::vector<int64_t>& patch_nums,
                                                         float scale) {
    const char* op = "block_causal_attention";
    BlockCausalAttentionParams p = checked(op, q, k, v, out, lse, patch_nums, scale);
    check_output(op, "out", out);
    return p;
}

BlockCausalAttentionBackwardParams block_causal_attention_backward_params(
    const TensorView& grad_out, const TensorView& q, const TensorView& k, const TensorView& v,
    const TensorView& out, const TensorView& lse, const TensorView& dq, const TensorView& dk,
    const TensorView& dv, const TensorView* delta, const std::vector<int64_t>& patch_nums, float scale) {
    const char* op = "block_causal_attention_backward";
    BlockCausalAttentionBackwardParams p;
    p.forward = checked(op, q, k, v, out, lse, patch_nums, scale);
    check_like(op, "grad_out", grad_out, q);
    p.gradients.grad_out = attention_heads(op, "grad_out", grad_out);

    const TensorView* outputs[] = {&dq, &dk, &dv};
    const char* names[] = {"dq", "dk", "dv"};
    AttentionHeads* heads[] = {&p.gradients.dq, &p.gradients.dk, &p.gradients.dv};
    for (int i = 0; i < 3; ++i) {
        check_like(op, names[i], *outputs[i], q);
        check_output(op, names[i], *outputs[i]);
        *heads[i] = attention_heads(op, names[i], *outputs[i]);
    }
    if (delta != nullptr) check_per_query(op, "delta", *delta, q);
    p.gradients.delta = delta ? static_cast<float*>(delta->data) : nullptr;
    return p;
}

}  // namespace var_ext
