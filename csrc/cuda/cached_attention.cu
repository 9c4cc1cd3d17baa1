#include "ops/cached_attention.h"

#include "cuda/attention.cuh"
#include "cuda/cached_attention_norm.cuh"
#include "cuda/qk_norm.cuh"

namespace var_ext::cuda {

namespace {

constexpr const char* op = "cached_attention";

// Whether a block of the 16-bit kernel has room for all queries of a head.
bool fits_block(const CachedAttentionParams& p) {
    const AttentionParams& a = p.attention;
    return a.dtype != DType::float32 && a.queries <= (a.dim > 64 ? 64 : 128) && has_aligned_rows(p.norm);
}

void launch_together(const CachedAttentionParams& p, const CudaStream& stream) {
    const AttentionParams& a = p.attention;
    const PackedQueries queries = {p.norm};
    const auto tile_of = [&](int32_t) {
        return OneTile{static_cast<int32_t>(a.queries), static_cast<int32_t>(a.keys)};
    };
    for_heads(a, [&](auto element, auto dim) {
        using T = decltype(element);
        constexpr int D = decltype(dim)::value;
        if constexpr (!std::is_same_v<T, float>) {
            if constexpr (D <= 64) {
                if (a.queries > 64)
                    return launch_attention_forward_of<D, 2, T>(op, a, stream, tile_of, queries);
            }
            launch_attention_forward_of<D, 1, T>(op, a, stream, tile_of, queries);
        }
    });
}

}  // namespace

void cached_attention(const CachedAttentionParams& p, const CudaStream& stream) {
    const AttentionParams& a = p.attention;
    check_rows(op, "k_cache", a.k, a.dtype);
    check_rows(op, "v_cache", a.v, a.dtype);
    check_rows(op, "out", a.out, a.dtype);
    check_attention(op, a);
    if (fits_block(p)) return launch_together(p, stream);
    launch_qk_norm(op, p.norm, stream);
    launch_attention_forward(op, a, stream, [&](int32_t rows) {
        return FullTiles{static_cast<int32_t>(a.queries), static_cast<int32_t>(a.keys), rows};
    });
}

}  // namespace var_ext::cuda
