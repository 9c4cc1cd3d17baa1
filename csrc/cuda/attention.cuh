// Launching attention forward: what the kernels accept, and which one runs.
#pragma once

#include <type_traits>

#include "cuda/attention_forward.cuh"
#include "cuda/attention_forward_fp32.cuh"
#include "cuda/launch.cuh"

namespace var_ext::cuda {

// Rows are read 16 bytes at a time.
inline void check_rows(const char* op, const char* name, const AttentionHeads& heads, DType dtype) {
    const int64_t step = 16 / dtype_size(dtype);
    if (reinterpret_cast<uintptr_t>(heads.data) % 16 != 0 || heads.stride_b % step != 0 ||
        heads.stride_l % step != 0 || heads.stride_h % step != 0) {
        contract_error(op, std::string(name) + " must have rows that begin at multiples of 16 bytes on CUDA");
    }
}

inline void check_attention(const char* op, const AttentionParams& p) {
    if (p.dim != 32 && p.dim != 64 && p.dim != 128) {
        contract_error(op, "D must be 32, 64 or 128 on CUDA, got " + std::to_string(p.dim) +
                               "; VAR_EXT_BACKEND=reference takes any");
    }
    if (p.queries > INT32_MAX || p.keys > INT32_MAX) {
        contract_error(op, "queries and keys must be below 2^31 on CUDA, got " + std::to_string(p.queries) +
                               " and " + std::to_string(p.keys));
    }
    check_rows(op, "q", p.q, p.dtype);
    check_rows(op, "k", p.k, p.dtype);
    check_rows(op, "v", p.v, p.dtype);
    check_rows(op, "out", p.out, p.dtype);
}

// Calls body(T{}, std::integral_constant<int, D>{}) for the dtype and the head size.
template <class Body>
void for_heads(const AttentionParams& p, const Body& body) {
    for_element(p.dtype, [&](auto element) {
        switch (p.dim) {
            case 32:
                return body(element, std::integral_constant<int, 32>{});
            case 64:
                return body(element, std::integral_constant<int, 64>{});
            default:
                return body(element, std::integral_constant<int, 128>{});
        }
    });
}

// `tiles_of(rows)` makes tiles of up to so many rows.
template <int D, int M, class T, class MakeTiles, class Queries = StoredQueries>
void launch_attention_forward_of(const char* op, const AttentionParams& p, const CudaStream& stream,
                                 const MakeTiles& tiles_of, const Queries& queries = {}) {
    using Shape = AttentionForward<D, M>;
    const auto tiles = tiles_of(Shape::rows);
    const BlockOrder order = make_order(op, p, tiles.count());
    if (order.blocks() == 0) return;
    launch(op, stream, dim3(order.blocks()), attention_threads, Shape::shared_elements * sizeof(T),
           attention_forward_kernel<T, D, M, std::decay_t<decltype(tiles)>, Queries>, p, tiles, order,
           queries);
}

template <class MakeTiles>
void launch_attention_forward(const char* op, const AttentionParams& p, const CudaStream& stream,
                              const MakeTiles& tiles_of) {
    // Large tiles cost less, small ones spread over more of the chip; rows get the same result in both. Of
    // the computed pairs 92% are needed at 256 px (7 tiles of 128 rows; 96% with 12 of 64), 99% at
    // 512 px.
    const int64_t large = (p.queries + 127) / 128 * p.batch * p.heads;
    const bool fill = p.dim <= 64 && p.dtype != DType::float32 && large >= 2 * multiprocessors(op, stream);
    for_heads(p, [&](auto element, auto dim) {
        using T = decltype(element);
        constexpr int D = decltype(dim)::value;
        if constexpr (std::is_same_v<T, float>) {
            launch_attention_forward_fp32<D>(op, p, stream, tiles_of);
        } else if constexpr (D > 64) {
            launch_attention_forward_of<D, 1, T>(op, p, stream, tiles_of);
        } else {
            fill ? launch_attention_forward_of<D, 2, T>(op, p, stream, tiles_of)
                 : launch_attention_forward_of<D, 1, T>(op, p, stream, tiles_of);
        }
    });
}

}  // namespace var_ext::cuda
