#include "cpu/qk_norm.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"
#include "common/streaming.h"

namespace var_ext::cpu {

namespace {

// Enough tokens to hide what a chunk costs beside them, few enough to share among many threads. Fixed: the
// gradients' sums depend on it.
constexpr int64_t chunk_tokens = 32;

int64_t chunk_count(int64_t tokens) {
    return (tokens + chunk_tokens - 1) / chunk_tokens;
}

// Calls body(chunk, number of the chunk) for all tokens.
template <class Params, class Body>
void for_chunks(const Params& p, const QkNormKernel& kernel, const Heads (&outputs)[3], const Body& body) {
    const int64_t tokens = p.batch * p.length, chunks = chunk_count(tokens);
    const int64_t cost = std::min(tokens, chunk_tokens) * 3 * p.heads * p.channels;
    const int threads = thread_count(chunks, cost);
    const int64_t size = kernel.scratch_size(p.heads, p.channels);
    const Buffer<float> scratch = allocate<float>(threads * size);
    bool stream = 3 * tokens * p.heads * p.channels * dtype_size(p.dtype) >= streaming_bytes;
    for (const Heads& out : outputs) {
        stream = stream && begins_lines(out.data, p.dtype, {out.b, out.l, out.h});
    }
    parallel_for(threads, chunks, [&](int64_t task, int thread) {
        const int64_t begin = task * chunk_tokens;
        const QkNormChunk chunk = {begin, std::min(begin + chunk_tokens, tokens), stream,
                                   scratch.get() + thread * size};
        body(chunk, task);
    });
}

}  // namespace

void qk_norm(const QkNormParams& p) {
    if (p.batch * p.length * p.heads * p.channels == 0) return;
    const QkNormKernel& kernel = VAR_EXT_SELECT(qk_norm);
    for_chunks(p, kernel, p.out, [&](const QkNormChunk& chunk, int64_t) { kernel.forward(p, chunk); });
}

void qk_norm_backward(const QkNormBackwardParams& p) {
    const QkNormKernel& kernel = VAR_EXT_SELECT(qk_norm);
    const int64_t chunks = chunk_count(p.batch * p.length);  // none: gradients of zero
    const int64_t size = kernel.sums_size(p.heads, p.channels);
    const Buffer<float> sums = allocate<float>(chunks * size);
    if (chunks > 0) {
        for_chunks(p, kernel, p.grad_qkv, [&](const QkNormChunk& chunk, int64_t task) {
            kernel.backward(p, chunk, sums.get() + task * size);
        });
    }
    kernel.add_chunks(p, sums.get(), chunks);
}

}  // namespace var_ext::cpu
