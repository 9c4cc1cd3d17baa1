#include "cpu/attention.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"

namespace var_ext::cpu {

namespace {

constexpr int64_t whole_vectors(int64_t count) {
    return (count + 15) / 16 * 16;
}

int64_t most_keys(const std::vector<AttentionTile>& tiles) {
    int64_t most = 0;
    for (const AttentionTile& tile : tiles) most = std::max(most, tile.keys);
    return most;
}

// The work on a head in units of thread_count: products, a few at a time, and what packing a tile comes to.
int64_t head_cost(const std::vector<AttentionTile>& tiles, int64_t dim) {
    int64_t cost = 0;
    for (const AttentionTile& tile : tiles) {
        cost += whole_vectors(tile.rows) * tile.keys * (dim / 8 + 1) + 64 * dim;
    }
    return cost;
}

// Scratch of a thread, in floats: what the kernels carve from it, with rows of whole vectors.
int64_t forward_scratch(int64_t keys, int64_t dim) {
    const int64_t row = whole_vectors(dim);
    const int64_t head = (2 * keys + 1) * row;
    return whole_vectors(head + attention_tile * (attention_block + 2 * row + 3));
}
int64_t backward_scratch(int64_t keys, int64_t dim) {
    const int64_t row = whole_vectors(dim);
    const int64_t head = (5 * keys + 1) * row;
    return whole_vectors(head + attention_tile * (3 * attention_block + 5 * row + 2));
}

}  // namespace

void attention(const AttentionParams& p, const std::vector<AttentionTile>& tiles,
               const std::vector<int32_t>& key_limit) {
    const int64_t heads = p.batch * p.heads, tile_count = static_cast<int64_t>(tiles.size());
    if (heads == 0 || tile_count == 0) return;
    const AttentionKernel& kernel = VAR_EXT_SELECT(attention);
    const int64_t cost = head_cost(tiles, p.dim);
    int threads = thread_count(heads * tile_count, cost / tile_count + 1);
    // A task is a head, whose keys and values are packed once. With few heads they are divided: each part
    // packs them anew. A tile is computed in the same way wherever it lands.
    const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(4 * threads / heads, 1, tile_count);

    const int64_t scratch_size = forward_scratch(most_keys(tiles), p.dim);
    const Buffer<float> scratch = allocate<float>(threads * scratch_size);
    parallel_for(threads, heads * parts, [&](int64_t i, int thread) {
        const int64_t head = i / parts, part = i % parts;
        AttentionTask task;
        task.p = &p;
        task.gradients = nullptr;
        task.b = head / p.heads;
        task.h = head % p.heads;
        task.tiles = tiles.data() + part;
        task.tile_count = (tile_count - part + parts - 1) / parts;
        task.tile_step = parts;
        task.key_limit = key_limit.data();
        task.scratch = scratch.get() + thread * scratch_size;
        kernel.forward(task);
    });
}

void attention_backward(const AttentionParams& p, const AttentionGradients& gradients,
                        const std::vector<AttentionTile>& tiles, const std::vector<int32_t>& key_limit) {
    const int64_t heads = p.batch * p.heads;
    if (heads == 0 || tiles.empty()) return;
    const AttentionKernel& kernel = VAR_EXT_SELECT(attention);
    // A task is a head: its gradients of keys and values are summed tile after tile, in one order.
    const int threads = thread_count(heads, 3 * head_cost(tiles, p.dim));
    const int64_t scratch_size = backward_scratch(most_keys(tiles), p.dim);
    const Buffer<float> scratch = allocate<float>(threads * scratch_size);
    parallel_for(threads, heads, [&](int64_t head, int thread) {
        AttentionTask task;
        task.p = &p;
        task.gradients = &gradients;
        task.b = head / p.heads;
        task.h = head % p.heads;
        task.tiles = tiles.data();
        task.tile_count = static_cast<int64_t>(tiles.size());
        task.tile_step = 1;
        task.key_limit = key_limit.data();
        task.scratch = scratch.get() + thread * scratch_size;
        kernel.backward(task);
    });
}

}  // namespace var_ext::cpu
