#include "ops/cached_attention.h"

namespace var_ext {

AttentionParams cached_attention_params(const TensorView& q, const TensorView& k_cache,
                                        const TensorView& v_cache, const TensorView& out, int64_t length,
                                        float scale) {
    const char* op = "cached_attention";
    check_dtype(op, "q", q, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "q", q, {{"B", any_size}, {"Lq", any_size}, {"H", any_size}, {"D", any_size}});
    const int64_t b = q.shape[0], h = q.shape[2], d = q.shape[3];
    check_dtype(op, "k_cache", k_cache, {q.dtype});
    check_shape(op, "k_cache", k_cache, {{"B", b}, {"Lmax", any_size}, {"H", h}, {"D", d}});
    check_dtype(op, "v_cache", v_cache, {q.dtype});
    check_shape(op, "v_cache", v_cache, {{"B", b}, {"Lmax", k_cache.shape[1]}, {"H", h}, {"D", d}});
    check_dtype(op, "out", out, {q.dtype});
    check_shape(op, "out", out, {{"B", b}, {"Lq", q.shape[1]}, {"H", h}, {"D", d}});
    check_output(op, "out", out);
    if (length < 1 || length > k_cache.shape[1]) {
        contract_error(op, "length must be in 1.." + std::to_string(k_cache.shape[1]) + ", got " +
                               std::to_string(length));
    }
    AttentionParams p;
    p.q = attention_heads(op, "q", q);
    p.k = attention_heads(op, "k_cache", k_cache);
    p.v = attention_heads(op, "v_cache", v_cache);
    p.out = attention_heads(op, "out", out);
    p.lse = nullptr;
    p.batch = b;
    p.queries = q.shape[1];
    p.keys = length;
    p.heads = h;
    p.dim = d;
    p.scale = scale;
    p.dtype = q.dtype;
    return p;
}

}  // namespace var_ext
