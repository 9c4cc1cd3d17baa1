// How attention is cut up: a block of threads takes one head and a tile, a run of query rows (of key rows,
// where the gradients of keys are computed). Tiles begin at the borders of scales: all rows of a tile see the
// same keys and nothing has to be masked, except where small scales share one.
#pragma once

#include "cuda/schedule.cuh"

namespace var_ext::cuda {

struct Tile {
    int32_t first, rows;  // rows [first, first + rows)
    int32_t keys;         // the last row sees keys [0, keys)
    bool mixed;           // coarser rows of the tile see fewer
};

// Every query sees every key.
struct FullTiles {
    int32_t queries, keys;
    int32_t size;  // rows of a tile; the last one may have fewer

    __host__ __device__ int32_t count() const { return (queries + size - 1) / size; }
    __device__ Tile tile(int32_t i) const { return {i * size, min(size, queries - i * size), keys, false}; }
    __device__ int32_t end_of_scale(int32_t) const { return keys; }
};

// Whole scales share a tile as long as they fit; one that is too large is cut.
struct BlockCausalTiles {
    // enough for any schedule of 256 tiles' worth of tokens: two neighbouring tiles are more than one full
    static constexpr int32_t most = 512;
    Schedule schedule;
    int32_t tiles;
    int32_t first[most + 1];

    __host__ __device__ int32_t count() const { return tiles; }
    __device__ Tile tile(int32_t i) const {
        const int32_t begin = first[i], rows = first[i + 1] - begin;
        const int32_t keys = schedule.end_of_scale(begin + rows - 1);
        return {begin, rows, keys, schedule.end_of_scale(begin) != keys};
    }
    __device__ int32_t end_of_scale(int32_t row) const { return schedule.end_of_scale(row); }
    __device__ int32_t start_of_scale(int32_t row) const { return schedule.start_of_scale(row); }
};

inline BlockCausalTiles make_tiles(const char* op, const std::vector<int64_t>& lengths, int32_t size) {
    BlockCausalTiles t = {};
    t.schedule = make_schedule(op, lengths);
    const auto begin_at = [&](int64_t token) {
        if (t.tiles == BlockCausalTiles::most) {
            contract_error(op, "patch_nums must make at most " + std::to_string(BlockCausalTiles::most) +
                                   " tiles of " + std::to_string(size) + " tokens on CUDA, got more");
        }
        t.first[t.tiles++] = static_cast<int32_t>(token);
    };
    int64_t token = 0, begin = 0;  // the tile that is being filled begins there
    for (int64_t length : lengths) {
        if (token + length - begin > size && token > begin) {
            begin_at(begin);
            begin = token;
        }
        token += length;
        if (length <= size) continue;
        for (; begin < token; begin += size) begin_at(begin);
        begin = token;
    }
    if (token > begin) begin_at(begin);
    t.first[t.tiles] = static_cast<int32_t>(token);
    return t;
}

// The order of blocks. Heads whose keys and values fit into the L2 cache together form a group: groups one
// after another, in each the tile with most work of all its heads, then the next. The last blocks to end are
// short ones.
struct BlockOrder {
    uint32_t heads;  // B * H
    uint32_t tiles;
    uint32_t group;  // heads of a group; the last may have fewer

    struct Place {
        uint32_t head, rank;  // rank: 0 for the tile with most work
    };
    __device__ Place place(uint32_t block) const {
        const uint32_t g = block / (tiles * group), i = block - g * tiles * group;
        const uint32_t members = min(group, heads - g * group);
        return {g * group + i % members, i / members};
    }
    uint32_t blocks() const { return heads * tiles; }
};

// Keys and as many values are what a head reads.
inline BlockOrder make_order(const char* op, const AttentionParams& p, int32_t tiles) {
    const int64_t heads = p.batch * p.heads, blocks = heads * tiles;
    if (heads >= INT32_MAX || blocks >= INT32_MAX) {
        contract_error(op, "B * H * tiles must be below 2^31 on CUDA, got " + std::to_string(heads) + " * " +
                               std::to_string(tiles));
    }
    // of 40 MB on an A100 and 50 MB on an H100, which hold more than keys and values
    constexpr int64_t share_of_cache = 8 << 20;
    const int64_t bytes = 2 * p.keys * p.dim * dtype_size(p.dtype);
    const int64_t group = std::max<int64_t>(1, std::min(heads, share_of_cache / std::max<int64_t>(1, bytes)));
    return {static_cast<uint32_t>(heads), static_cast<uint32_t>(tiles), static_cast<uint32_t>(group)};
}

}  // namespace var_ext::cuda
