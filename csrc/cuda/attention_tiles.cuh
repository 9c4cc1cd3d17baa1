// How attention is split: a thread block takes one head and a tile, a run of query rows (of key rows for the
// gradients of keys). Tiles of queries begin at scale boundaries: all rows of a tile see the same keys and
// nothing is masked, except where small scales share a tile.
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

// The same with one tile for all queries: one block per head.
struct OneTile {
    int32_t queries, keys;

    __host__ __device__ int32_t count() const { return queries > 0 ? 1 : 0; }
    __device__ Tile tile(int32_t) const { return {0, queries, keys, false}; }
    __device__ int32_t end_of_scale(int32_t) const { return keys; }
};

// Whole scales share a tile if they fit; a larger one is split. So a scale boundary is a tile boundary, and a
// table of these saves each block a search. All of it must fit into the 4 KB of kernel parameters before
// CUDA 12.1.
struct BlockCausalTiles {
    // enough for any schedule of 256 tiles' worth of tokens: two neighbouring tiles are more than one full
    static constexpr int32_t most = 512;
    static constexpr uint16_t mixed = 0x8000;
    Schedule schedule;
    int32_t tiles;
    int32_t first[most + 1];
    uint16_t
        border[most];  // the tile after the scale of a tile's last row; and whether scales share the tile

    __host__ __device__ int32_t count() const { return tiles; }
    __host__ __device__ Tile tile(int32_t i) const {
        const int32_t begin = first[i];
        return {begin, first[i + 1] - begin, first[border[i] & ~mixed], (border[i] & mixed) != 0};
    }
    __host__ __device__ int32_t end_of_scale(int32_t row) const { return schedule.end_of_scale(row); }
    __host__ __device__ int32_t start_of_scale(int32_t row) const { return schedule.start_of_scale(row); }
};

// Tiles of keys, whose `keys` is a first query: queries from there on see the first row, and where scales
// share a tile only later ones see the others. They ignore scale boundaries: a warp skips queries that see
// none of its keys, so a boundary inside a tile costs little. A short tile before each boundary would leave
// warps idle.
struct BlockCausalKeyTiles {
    static constexpr int32_t most = BlockCausalTiles::most;
    Schedule schedule;
    int32_t size;           // rows of a tile; the last one may have fewer
    int32_t queries[most];  // the first that sees a tile's first row
    bool mixed[most];

    __host__ __device__ int32_t count() const {
        return schedule.tokens / size + (schedule.tokens % size > 0);
    }
    __host__ __device__ Tile tile(int32_t i) const {
        const int32_t first = i * size, left = schedule.tokens - first;
        return {first, left < size ? left : size, queries[i], mixed[i]};
    }
    __host__ __device__ int32_t start_of_scale(int32_t row) const { return schedule.start_of_scale(row); }
};

inline void check_tiles(const char* op, int64_t tiles, int32_t size) {
    if (tiles <= BlockCausalTiles::most) return;
    contract_error(op, "patch_nums must make at most " + std::to_string(BlockCausalTiles::most) +
                           " tiles of " + std::to_string(size) + " tokens on CUDA, got more");
}

inline BlockCausalTiles make_tiles(const char* op, const std::vector<int64_t>& lengths, int32_t size) {
    BlockCausalTiles t = {};
    t.schedule = make_schedule(op, lengths);
    const auto begin_at = [&](int64_t token) {
        check_tiles(op, t.tiles + 1, size);
        t.first[t.tiles++] = static_cast<int32_t>(token);
    };
    int64_t token = 0, begin = 0;  // start of the tile being filled
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
    for (int32_t i = t.tiles - 1; i >= 0; --i) {
        const int32_t next = t.first[i + 1], keys = t.schedule.end_of_scale(next - 1);
        t.border[i] =
            static_cast<uint16_t>(keys == next ? i + 1 : t.border[i + 1] & ~BlockCausalTiles::mixed);
        if (t.schedule.end_of_scale(t.first[i]) != keys) t.border[i] |= BlockCausalTiles::mixed;
    }
    return t;
}

inline BlockCausalKeyTiles make_key_tiles(const char* op, const std::vector<int64_t>& lengths, int32_t size) {
    BlockCausalKeyTiles t = {make_schedule(op, lengths), size, {}, {}};
    check_tiles(op, t.count(), size);
    for (int32_t i = 0; i < t.count(); ++i) {
        const Tile tile = t.tile(i);
        t.queries[i] = t.start_of_scale(tile.first);
        t.mixed[i] = t.start_of_scale(tile.first + tile.rows - 1) > t.queries[i];
    }
    return t;
}

// Division of numbers below 2^31 by a number known to the host: a multiplication instead of some 20
// instructions, uniform over a block.
struct Divisor {
    uint32_t divisor, multiplier, shift;

    static Divisor of(uint32_t divisor) {
        uint32_t shift = 0;
        while ((uint64_t{1} << shift) < divisor) ++shift;
        return {divisor, static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / divisor + 1), shift};
    }
    __host__ __device__ uint32_t quotient(uint32_t n) const {
        return static_cast<uint32_t>(uint64_t{2 * n} * multiplier >> 32) >> shift;
    }
};

// The order of blocks. Heads whose keys and values fit into the L2 cache together form a group: groups run
// one after another; in each, the tile with most work of all its heads, then the next. The last blocks to
// finish are short ones.
struct BlockOrder {
    uint32_t count;    // of blocks
    uint32_t last;     // the last group; it may have fewer heads
    Divisor of_group;  // blocks
    Divisor members, members_of_last;
    Divisor heads;  // H

    struct Place {
        uint32_t b, h, head;  // head: b * H + h
        uint32_t rank;        // 0 for the tile with most work
    };
    __host__ __device__ Place place(uint32_t block) const {
        const uint32_t group = of_group.quotient(block), i = block - group * of_group.divisor;
        const Divisor& here = group == last ? members_of_last : members;
        const uint32_t rank = here.quotient(i), head = group * members.divisor + i - rank * here.divisor;
        const uint32_t b = heads.quotient(head);
        return {b, head - b * heads.divisor, head, rank};
    }
    uint32_t blocks() const { return count; }
};

// Which quarter of its tile's rows a warp takes. Partial tiles leave their last quarters idle, and coarse
// rows have less work: if these always fell to the same warps, the same parts of the multiprocessor would
// idle. Each of four adjacent blocks rotates the quarters differently, neighbours by half a turn; groups of
// four are rotated by a hash, so that no stride between the blocks of a multiprocessor repeats the same
// rotation.
__host__ __device__ inline int fourth_of_warp(uint32_t block, int warp) {
    uint32_t hash = block / 4 * 0x9e3779b9u;
    hash = (hash ^ hash >> 15) * 0x85ebca6bu;
    const uint32_t turn = block % 2 * 2 + block / 2 % 2 + (hash >> 30);
    return static_cast<int>((static_cast<uint32_t>(warp) + turn) % 4);
}

// A head reads its keys and as many values.
inline BlockOrder make_order(const char* op, const AttentionParams& p, int32_t tiles) {
    const int64_t heads = p.batch * p.heads, blocks = heads * tiles;
    if (heads >= INT32_MAX || blocks >= INT32_MAX) {
        contract_error(op, "B * H * tiles must be below 2^31 on CUDA, got " + std::to_string(heads) + " * " +
                               std::to_string(tiles));
    }
    if (blocks == 0) return {};
    // of 40 MB on an A100 and 50 MB on an H100, which hold more than keys and values
    constexpr int64_t share_of_cache = 8 << 20;
    const int64_t bytes = 2 * p.keys * p.dim * dtype_size(p.dtype);
    int64_t group = std::max<int64_t>(1, std::min(heads, share_of_cache / std::max<int64_t>(1, bytes)));
    if (group > 4) group -= group % 4;  // see fourth_of_warp
    const int64_t last = (heads - 1) / group;
    const auto divisor = [](int64_t n) { return Divisor::of(static_cast<uint32_t>(n)); };
    return {static_cast<uint32_t>(blocks), static_cast<uint32_t>(last),
            divisor(group * tiles),        divisor(group),
            divisor(heads - last * group), divisor(p.heads)};
}

}  // namespace var_ext::cuda
