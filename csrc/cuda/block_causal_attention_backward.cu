#include "cuda/attention.cuh"
#include "cuda/attention_backward_dkv.cuh"
#include "cuda/attention_backward_dq.cuh"
#include "cuda/attention_backward_fp32.cuh"
#include "ops/block_causal_attention.h"

namespace var_ext::cuda {

namespace {

constexpr const char* op = "block_causal_attention_backward";

// dQ and delta first, then dK and dV, which read delta. No sums across blocks: the result depends only on
// shapes. Seven products of pairs that see each other, where one pass with atomics would need five.
// Pairs computed over pairs wanted, for 64 channels: 1.07 at 256 px (L = 680), 1.01 at 512 px (L = 2240).
static_assert(sizeof(AttentionParams) + sizeof(AttentionGradients) + sizeof(BlockCausalTiles) +
                  sizeof(BlockOrder) <=
              4096);

template <class T, int D>
void launch_attention_backward(const BlockCausalAttentionBackwardParams& p, const CudaStream& stream) {
    const AttentionParams& a = p.forward.attention;
    const auto run = [&](auto shape, auto make, auto kernel) {
        using Shape = decltype(shape);
        const auto tiles = make(op, p.forward.lengths, Shape::rows);
        const BlockOrder order = make_order(op, a, tiles.count());
        if (order.blocks() == 0) return;
        launch(op, stream, dim3(order.blocks()), attention_threads, Shape::shared_bytes, kernel, a,
               p.gradients, tiles, order);
    };
    run(AttentionBackwardDq<D>{}, make_tiles, attention_backward_dq_kernel<T, D>);
    run(AttentionBackwardDkv<D>{}, make_key_tiles, attention_backward_dkv_kernel<T, D>);
}

}  // namespace

void block_causal_attention_backward(const BlockCausalAttentionBackwardParams& p, const CudaStream& stream) {
    const AttentionParams& a = p.forward.attention;
    const AttentionGradients& g = p.gradients;
    check_attention(op, a);
    check_rows(op, "grad_out", g.grad_out, a.dtype);
    check_rows(op, "dq", g.dq, a.dtype);
    check_rows(op, "dk", g.dk, a.dtype);
    check_rows(op, "dv", g.dv, a.dtype);
    if (g.delta == nullptr) contract_error(op, "delta must have shape (B, H, L) on CUDA, got none");
    for_heads(a, [&](auto element, auto dim) {
        if constexpr (std::is_same_v<decltype(element), float>) {
            launch_attention_backward_fp32<decltype(dim)::value>(p, stream);
        } else {
            launch_attention_backward<decltype(element), decltype(dim)::value>(p, stream);
        }
    });
}

}  // namespace var_ext::cuda
