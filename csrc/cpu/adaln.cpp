#include "cpu/adaln.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"
#include "common/streaming.h"

namespace var_ext::cpu {

namespace {

// Enough rows to hide what a chunk costs beside them, few enough to share among many threads. Fixed: the
// gradients' sums depend on it.
constexpr int64_t chunk_rows = 32;

template <class Params>
bool streams(const Params& p, std::initializer_list<const Rows*> outputs) {
    int64_t bytes = 0;
    for (const Rows* rows : outputs) {
        if (rows->data == nullptr) continue;
        if (!begins_lines(rows->data, p.dtype, {rows->b, rows->l})) return false;
        bytes += p.batch * p.length * p.channels * dtype_size(p.dtype);
    }
    return bytes >= streaming_bytes;
}

// Calls body(chunk, number of the chunk) for all chunks of all samples.
template <class Params, class Body>
void for_chunks(const Params& p, const AdalnKernel& kernel, int64_t chunks,
                std::initializer_list<const Rows*> outputs, const Body& body) {
    const int64_t tasks = p.batch * chunks;
    const int threads = thread_count(tasks, std::min(p.length, chunk_rows) * p.channels);
    const int64_t size = kernel.scratch_rows * kernel.width(p.channels);
    const Buffer<float> scratch = allocate<float>(threads * size);
    const bool stream = streams(p, outputs);
    parallel_for(threads, tasks, [&](int64_t task, int thread) {
        const int64_t begin = task % chunks * chunk_rows;
        const AdalnChunk chunk = {task / chunks, begin, std::min(begin + chunk_rows, p.length), stream,
                                  scratch.get() + thread * size};
        body(chunk, task);
    });
}

}  // namespace

void adaln(const AdalnParams& p) {
    if (p.batch * p.length * p.channels == 0) return;
    const AdalnKernel& kernel = VAR_EXT_SELECT(adaln);
    const int64_t chunks = (p.length + chunk_rows - 1) / chunk_rows;
    for_chunks(p, kernel, chunks, {&p.h, &p.y},
               [&](const AdalnChunk& chunk, int64_t) { kernel.forward(p, chunk); });
}

void adaln_backward(const AdalnBackwardParams& p) {
    if (p.batch * p.channels == 0) return;
    const AdalnKernel& kernel = VAR_EXT_SELECT(adaln);
    const int64_t chunks = (p.length + chunk_rows - 1) / chunk_rows;  // 0 rows: gradients of zero
    const int64_t size = 3 * kernel.width(p.channels);
    const Buffer<float> sums = allocate<float>(p.batch * chunks * size);
    if (chunks > 0) {
        for_chunks(p, kernel, chunks, {&p.grad_x, &p.grad_branch},
                   [&](const AdalnChunk& chunk, int64_t task) {
                       kernel.backward(p, chunk, sums.get() + task * size);
                   });
    }
    parallel_for(thread_count(p.batch, chunks * size), p.batch,
                 [&](int64_t b, int) { kernel.add_chunks(p, b, sums.get() + b * chunks * size, chunks); });
}

}  // namespace var_ext::cpu
