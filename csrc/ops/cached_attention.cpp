#include "ops/cached_attention.h"

namespace var_ext {

namespace {

constexpr const char* op = "cached_attention";

void check_heads(const char* name, const TensorView& view, const TensorView& qkv, Dim length) {
    check_dtype(op, name, view, {qkv.dtype});
    check_shape(op, name, view, {{"B", qkv.shape[0]}, length, {"H", qkv.shape[3]}, {"D", qkv.shape[4]}});
    check_output(op, name, view);
}

// Entries [first, first + count) of a cache.
TensorView entries(const TensorView& cache, int64_t first, int64_t count) {
    TensorView part = cache;
    part.data = static_cast<char*>(cache.data) + first * cache.strides[1] * dtype_size(cache.dtype);
    part.shape[1] = count;
    return part;
}

}  // namespace

CachedAttentionParams cached_attention_params(const TensorView& qkv, const TensorView& q_bias,
                                              const TensorView& v_bias, const TensorView* log_scale,
                                              const TensorView& k_cache, const TensorView& v_cache,
                                              const TensorView& out, int64_t offset, float scale) {
    check_dtype(op, "qkv", qkv, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(op, "qkv", qkv,
                {{"B", any_size}, {"l", any_size}, {"3", 3}, {"H", any_size}, {"D", any_size}});
    const int64_t length = qkv.shape[1];
    check_heads("out", out, qkv, {"l", length});
    check_heads("k_cache", k_cache, qkv, {"Lmax", any_size});
    const int64_t room = k_cache.shape[1];
    check_heads("v_cache", v_cache, qkv, {"Lmax", room});
    if (offset < 0 || offset > room - length) {
        contract_error(op, "offset must leave room for " + std::to_string(length) + " tokens in " +
                               std::to_string(room) + ", got " + std::to_string(offset));
    }
    CachedAttentionParams p;
    AttentionParams& a = p.attention;
    a.q = a.out = attention_heads(op, "out", out);
    a.k = attention_heads(op, "k_cache", k_cache);
    a.v = attention_heads(op, "v_cache", v_cache);
    a.lse = nullptr;
    a.batch = qkv.shape[0];
    a.queries = length;
    a.keys = offset + length;
    a.heads = qkv.shape[3];
    a.dim = qkv.shape[4];
    a.scale = scale;
    a.dtype = qkv.dtype;
    p.norm = qk_norm_params_of(op, qkv, q_bias, v_bias, log_scale, out, entries(k_cache, offset, length),
                               entries(v_cache, offset, length));
    return p;
}

}  // namespace var_ext
