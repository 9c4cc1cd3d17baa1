// phi(x) = (1 - ratio) x + ratio (conv3x3(x) + bias) of upsampled codes, for residual_step and
// residual_quantize.
//
// A block takes a tile of up to 256 pixels, a thread each, and 4 to 32 of the output channels. The upsampled
// codes of the tile and a pixel around it stand in shared memory, pixel by pixel, and the weights beside
// them.
//
// Counted for 32 channels on 16 x 16: a block has whole planes, so windows of the next scale need no other
// block, and one launch is enough. With 32 outputs a block is an image: 2.4 M fused products, 18 k cycles of
// a multiprocessor, 10 us; four channels cost a thread 33 loads of 16 bytes, 32 of them broadcast, for 128
// products. With 4 outputs eight blocks share an image: 2.3 k cycles of products each, and 1.6 k to upsample
// the codes, which all eight repeat; rows of an image a block instead would need a second launch. So a block
// has as many outputs as still give each of 132 multiprocessors a block; no result depends on it.
//
// Sums are taken in the order of csrc/cpu/phi_variant.cpp, fused alike: the same bits as on a CPU with FMA.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "cuda/resample.cuh"
#include "ops/residual_step.h"

namespace var_ext::cuda {

constexpr unsigned phi_threads = 256;
constexpr int phi_most_outs = 32;                 // output channels of a block
constexpr int64_t phi_blocks = 132;               // wanted, if there is work for them
constexpr int64_t phi_shared_bytes = 113 * 1024;  // at most: two blocks on a multiprocessor of sm_90

// The limit of a block on this chip.
inline int64_t phi_room_of_chip(const char* op, const CudaStream& stream) {
    return std::min(phi_shared_bytes, static_cast<int64_t>(most_shared(op, stream)));
}

// Channels of a pixel in shared memory: an odd number of 16-byte units, so that loads of eight neighbouring
// pixels have no bank conflict.
__host__ __device__ inline int phi_room(int channels) {
    return (channels + 3) / 4 % 2 == 1 ? (channels + 3) / 4 * 4 : (channels + 3) / 4 * 4 + 4;
}

// Pixels in memory: eight adjacent lanes, which are served together, fill eight of them.
__host__ __device__ inline int whole_eights(int pixels) {
    return (pixels + 7) / 8 * 8;
}

// How an image is split.
struct PhiTiles {
    int channels, height, width;    // of the image
    int codes_height, codes_width;  // upsampled unless that is the same
    int tile_height, tile_width;    // of a tile
    int down, across;               // tiles of an image
    int groups;                     // of output channels
    __host__ __device__ int count() const { return down * across; }
    __host__ __device__ int pixels() const { return tile_height * tile_width; }
    __host__ __device__ int framed_pixels() const {
        return whole_eights((tile_height + 2) * (tile_width + 2));
    }
};

// The fewest tiles of at most `most` pixels, and of equal numbers those with the smallest frames, for which
// bytes(tiles) is at most `most_bytes`; none: no tiles.
template <class Bytes>
PhiTiles phi_tiles(PhiTiles tiles, int most, int64_t most_bytes, const Bytes& bytes) {
    PhiTiles best = tiles;
    best.down = best.across = 0;
    for (int w = 1; w <= std::min(tiles.width, most); ++w) {
        for (int h = std::min(tiles.height, most / w); h >= 1; h = h == 1 ? 0 : (h + 1) / 2) {
            PhiTiles t = tiles;
            t.tile_height = h;
            t.tile_width = w;
            t.down = (t.height + h - 1) / h;
            t.across = (t.width + w - 1) / w;
            if (bytes(t) > most_bytes) continue;
            const bool fewer = best.count() == 0 || t.count() < best.count() ||
                               (t.count() == best.count() && t.framed_pixels() < best.framed_pixels());
            if (fewer) best = t;
            break;
        }
    }
    return best;
}

// A tensor (B, C, H, W).
struct PhiGrid {
    const float* data;
    int64_t strides[4];
    __device__ int64_t stride_channel() const { return strides[1]; }
    __device__ const float* pixel(int64_t b, int y, int x) const {
        return data + b * strides[0] + y * strides[2] + x * strides[3];
    }
};

// Stores into one.
struct PhiStore {
    float* data;
    int64_t strides[4];
    __device__ float operator()(int64_t b, int c, int y, int x, float value) const {
        data[b * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]] = value;
        return value;
    }
};

// Where a block stands.
struct PhiPlace {
    int64_t image;
    int group, top, left;
};
__device__ inline PhiPlace phi_place(const PhiTiles& t, int64_t block) {
    const int tile = static_cast<int>(block / t.groups % t.count());
    return {block / t.groups / t.count(), static_cast<int>(block % t.groups), tile / t.across * t.tile_height,
            tile % t.across * t.tile_width};
}

// A grid of one axis.
inline dim3 phi_grid(const char* op, int64_t blocks) {
    constexpr int64_t limit = int64_t{1} << 31;
    if (blocks >= limit) {
        contract_error(op, "B * C * H * W must be smaller on CUDA, got " + std::to_string(blocks) +
                               " blocks, of which 2^31 - 1 can be launched");
    }
    return dim3(static_cast<unsigned>(blocks));
}

// Four channels of a pixel of the upsampled codes.
template <class Codes>
__device__ void phi_upsample(const Codes& codes, const PhiTiles& t, int64_t image, int y, int x, int channel,
                             float (&quad)[4]) {
    if (t.codes_height == t.height && t.codes_width == t.width) {
        const float* const from = codes.pixel(image, y, x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool inside = channel + i < t.channels;  // mask
            quad[i] = inside ? from[(channel + i) * codes.stride_channel()] : 0.0f;
        }
        return;
    }
    const CubicTaps<float> down = cubic_taps<float>(y, t.codes_height, t.height);
    const CubicTaps<float> across = cubic_taps<float>(x, t.codes_width, t.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) quad[i] = 0.0f;
#pragma unroll 1  // 16 loads in flight, not 64
    for (int r = 0; r < 4; ++r) {
        const int from_y =
            r < 2 ? (r == 0 ? down.index[0] : down.index[1]) : (r == 2 ? down.index[2] : down.index[3]);
        const float weight =
            r < 2 ? (r == 0 ? down.weight[0] : down.weight[1]) : (r == 2 ? down.weight[2] : down.weight[3]);
        float row[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* const from = codes.pixel(image, from_y, across.index[k]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool inside = channel + i < t.channels;  // mask
                const float code = inside ? from[(channel + i) * codes.stride_channel()] : 0.0f;
                row[i] = add_product(row[i], across.weight[k], code);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) quad[i] = add_product(quad[i], weight, row[i]);
    }
}

// The tile and a pixel around it, zeros outside the image: (tile_height + 2, tile_width + 2, room).
template <class Codes>
__device__ void phi_load_frame(const Codes& codes, const PhiTiles& t, const PhiPlace& place, float* frame) {
    const int pixels = t.framed_pixels(), quads = (t.channels + 3) / 4, room = phi_room(t.channels);
    for (int item = static_cast<int>(threadIdx.x); item < pixels * quads; item += phi_threads) {
        const int pixel = item % pixels, channel = item / pixels * 4;
        const int y = place.top + pixel / (t.tile_width + 2) - 1,
                  x = place.left + pixel % (t.tile_width + 2) - 1;
        const bool inside = y >= 0 && y < t.height && x >= 0 && x < t.width;  // mask
        float quad[4] = {};
        if (inside) phi_upsample(codes, t, place.image, y, x, channel, quad);
        uint4 bits;
        memcpy(&bits, quad, 16);
        ptx::store_16(frame + pixel * room + channel, bits);
    }
}

// Weights in shared memory: (9, input channels, outputs). Rows and planes are the same odd number of 16-byte
// units apart, but for multiples of 8: neighbouring weights in memory, taps of an input channel, go to other
// banks.
template <int outs>
struct PhiWeights {
    static constexpr int row = outs == 4 ? 4 : outs + 4;
    __host__ __device__ static int plane(int channels) {
        const int rows = (channels + 3) / 4 * 4, gap = ((1 - rows) * (row / 4) % 8 + 8) % 8 * 4;
        return rows * row + gap +
               (rows % 8 != 0 && gap < row ? 32 : 0);  // a row too many fits behind the last
    }
};

// `mirrored`: the convolution that takes gradients back, channels swapped and taps turned round.
template <int outs>
__device__ void phi_load_weights(const float* weight, int channels, int first, bool mirrored, float* to) {
    const int rows = (channels + 3) / 4 * 4, plane = PhiWeights<outs>::plane(channels);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (!mirrored) {  // a warp takes 8 neighbours of each of 4 outputs
        const int eights = (9 * rows + 7) / 8;
#pragma unroll 4
        for (int task = static_cast<int>(threadIdx.x) / 32; task < eights * (outs / 4);
             task += static_cast<int>(phi_threads) / 32) {
            const int out = task / eights * 4 + lane / 8, i = task % eights * 8 + lane % 8;
            const bool there = first + out < channels && i < 9 * channels;  // mask
            const float w = there ? weight[static_cast<int64_t>(first + out) * 9 * channels + i] : 0.0f;
            to[i % 9 * plane + i / 9 * PhiWeights<outs>::row + out] = w;
        }
        return;
    }
#pragma unroll 4
    for (int item = static_cast<int>(threadIdx.x); item < rows * 9 * outs; item += phi_threads) {
        const int in = item / (9 * outs), out = item % (9 * outs) / 9, tap = item % 9;
        const bool there = in < channels && first + out < channels;  // mask
        const float w = there ? weight[(static_cast<int64_t>(in) * channels + first + out) * 9 + tap] : 0.0f;
        to[(8 - tap) * plane + in * PhiWeights<outs>::row + out] = w;
    }
}

struct PhiParams {
    PhiTiles tiles;
    const float* weight;
    const float* bias;  // null: none
    float ratio;
    int chain;  // input channels that are summed in one chain
    bool mirrored;
    bool pools;   // whether `next` is computed here, from whole planes
    float* next;  // (B, C, next_height, next_width) of these strides
    int next_height, next_width;
    int64_t next_strides[4];
};

// The mean of a window, summed row by row as on the CPU.
template <class At>
__device__ float area_mean(Range down, Range across, const At& at) {
    float sum = 0.0f;
    for (int y = down.begin; y < down.end; ++y) {
        for (int x = across.begin; x < across.end; ++x) sum = plus(sum, at(y, x));
    }
    return sum / static_cast<float>(down.end - down.begin) / static_cast<float>(across.end - across.begin);
}

template <int outs>
int64_t phi_bytes(const PhiTiles& t) {
    const int64_t frame = std::max(t.framed_pixels() * phi_room(t.channels), outs * t.pixels());
    return 4 * (frame + 9 * PhiWeights<outs>::plane(t.channels));
}

// Adds the products of input channels begin .. end of a pixel: taps in their order, then channels.
template <int outs>
__device__ __forceinline__ void phi_add_chain(const PhiTiles& t, const float* corner, const float* weights,
                                              int begin, int end, float (&sum)[outs]) {
    const int room = phi_room(t.channels), plane = PhiWeights<outs>::plane(t.channels);
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
        const float* const x = corner + (tap / 3 * (t.tile_width + 2) + tap % 3) * room;
        const float* const w = weights + tap * plane;
#pragma unroll 1
        for (int i = begin; i < end; i += 4) {
            const uint4 bits = ptx::load_16(x + i);
            float in[4];
            memcpy(in, &bits, 16);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int o = 0; o < outs; o += 4) {
                    const uint4 w_bits = ptx::load_16(w + (i + k) * PhiWeights<outs>::row + o);
                    float of[4];
                    memcpy(of, &w_bits, 16);
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[o + j] = add_product(sum[o + j], in[k], of[j]);
                }
            }
        }
    }
}

// finish(image, channel, y, x, phi) stores, and returns the value that windows pool.
// budget: registers <= 128, shared <= 115712, blocks >= 1, on sm_86 >= 0
// sass: LDS.128, STS.128
template <int outs, class Codes, class Finish>
__global__ void __launch_bounds__(phi_threads, 2)
    residual_step_phi_kernel(const PhiParams p, const Codes codes, const Finish finish) {
    ptx::wait_for_previous();
    const PhiTiles& t = p.tiles;
    const PhiPlace place = phi_place(t, blockIdx.x);
    const int room = phi_room(t.channels), first = place.group * outs, pixels = t.pixels();
    const int frame_size = max(t.framed_pixels() * room, outs * pixels);
    float* const frame = reinterpret_cast<float*>(ptx::shared_memory());
    float* const weights = frame + frame_size;
    phi_load_weights<outs>(p.weight, t.channels, first, p.mirrored, weights);
    phi_load_frame(codes, t, place, frame);
    __syncthreads();

    const int mine = static_cast<int>(threadIdx.x), pixel = mine < pixels ? mine : 0;
    const int row = pixel / t.tile_width, column = pixel % t.tile_width;
    const float* const corner = frame + (row * (t.tile_width + 2) + column) * room;
    const auto bias = [&](int o) {
        const bool there = p.bias != nullptr && first + o < t.channels;  // mask
        return there ? p.bias[first + o] : 0.0f;
    };
    float convolved[outs] = {};
    if constexpr (outs == phi_most_outs) {  // one chain: a second set of sums would not fit the registers
        phi_add_chain<outs>(t, corner, weights, 0, t.channels, convolved);
#pragma unroll
        for (int o = 0; o < outs; ++o) convolved[o] = plus(bias(o), convolved[o]);
    } else {
#pragma unroll
        for (int o = 0; o < outs; ++o) convolved[o] = bias(o);
#pragma unroll 1
        for (int begin = 0; begin < t.channels; begin += p.chain) {
            float sum[outs] = {};
            phi_add_chain<outs>(t, corner, weights, begin, min(begin + p.chain, t.channels), sum);
#pragma unroll
            for (int o = 0; o < outs; ++o) convolved[o] = plus(convolved[o], sum[o]);
        }
    }

    const float* const centre = corner + (t.tile_width + 3) * room + first;
#pragma unroll
    for (int o = 0; o < outs; o += 4) {
        const bool there = first + o < t.channels;  // mask
        if (!there) break;
        const uint4 bits = ptx::load_16(centre + o);
        float of[4];
        memcpy(of, &bits, 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            convolved[o + j] = add_product(times(convolved[o + j], p.ratio), of[j], plus(1.0f, -p.ratio));
        }
    }
    // the frame has been read: planes reuse its memory
    __syncthreads();
    const int y = place.top + row, x = place.left + column, channels = min(outs, t.channels - first);
    const bool here = mine < pixels && y < t.height && x < t.width;  // mask
    if (here) {
#pragma unroll
        for (int o = 0; o < outs; ++o) frame[o * pixels + mine] = convolved[o];
#pragma unroll 4
        for (int o = 0; o < channels; ++o) {
            float* const phi = frame + o * pixels + mine;
            *phi = finish(place.image, first + o, y, x, *phi);
        }
    }
    if (!p.pools) return;

    __syncthreads();
    const int windows = p.next_height * p.next_width;
    for (int item = mine; item < channels * windows; item += static_cast<int>(phi_threads)) {
        const int out = item / windows, i = item % windows / p.next_width, j = item % p.next_width;
        const float* const plane = frame + out * pixels;
        const float mean =
            area_mean(area_window(i, t.height, p.next_height), area_window(j, t.width, p.next_width),
                      [&](int r, int c) { return plane[r * t.width + c]; });
        p.next[place.image * p.next_strides[0] + (first + out) * p.next_strides[1] + i * p.next_strides[2] +
               j * p.next_strides[3]] = mean;
    }
}

// Calls body(std::integral_constant<int, outs>) with the most outputs per block that leave enough blocks.
template <class Body>
void for_phi_outs(int64_t batch, PhiTiles tiles, int64_t most_bytes, bool one_chain, const Body& body) {
    const auto enough = [&](int outs, const PhiTiles& t) {
        const int64_t groups = (t.channels + outs - 1) / outs;
        return t.count() > 0 && outs < 2 * t.channels && batch * t.count() * groups >= phi_blocks;
    };
    const auto cut = [&](auto outs) {
        return phi_tiles(tiles, phi_threads, most_bytes, phi_bytes<decltype(outs)::value>);
    };
    const PhiTiles by_32 = cut(std::integral_constant<int, 32>{}),
                   by_16 = cut(std::integral_constant<int, 16>{}),
                   by_8 = cut(std::integral_constant<int, 8>{});
    if (one_chain && enough(32, by_32)) return body(std::integral_constant<int, 32>{}, by_32);
    if (enough(16, by_16)) return body(std::integral_constant<int, 16>{}, by_16);
    if (enough(8, by_8)) return body(std::integral_constant<int, 8>{}, by_8);
    body(std::integral_constant<int, 4>{}, cut(std::integral_constant<int, 4>{}));
}

// Launches the kernel; returns whether it pools the windows too. p.tiles gives only the sizes.
template <class Codes, class Finish>
bool launch_phi(const char* op, const CudaStream& stream, int64_t batch, PhiParams p, const Codes& codes,
                const Finish& finish) {
    const int64_t most_bytes = phi_room_of_chip(op, stream);
    for_phi_outs(batch, p.tiles, most_bytes, p.chain >= p.tiles.channels, [&](auto outs, PhiTiles tiles) {
        if (tiles.count() == 0) {
            contract_error(
                op, "C must be small enough for the weights of four outputs in shared memory on CUDA, got " +
                        std::to_string(p.tiles.channels) + "; VAR_EXT_BACKEND=reference takes any");
        }
        tiles.groups = (tiles.channels + decltype(outs)::value - 1) / decltype(outs)::value;
        p.tiles = tiles;
        p.pools = p.pools && tiles.count() == 1;
        launch(op, stream, phi_grid(op, batch * tiles.count() * tiles.groups), phi_threads,
               static_cast<size_t>(phi_bytes<decltype(outs)::value>(tiles)),
               residual_step_phi_kernel<decltype(outs)::value, Codes, Finish>, p, codes, finish);
    });
    return p.pools;
}

// Windows of images that no block has as a whole: a thread per element of (B, C, h, w).
// budget: registers <= 40, shared <= 0, blocks >= 6
template <class Target>
__global__ void __launch_bounds__(phi_threads, 6)
    residual_step_pool_kernel(const PhiGrid wide, const Target next, PhiTiles t, int height, int width,
                              int64_t elements) {
    ptx::wait_for_previous();
    const int64_t element = static_cast<int64_t>(blockIdx.x) * phi_threads + threadIdx.x;
    const bool here = element < elements;  // mask
    if (!here) return;
    const int64_t row = element / width, plane = row / height, b = plane / t.channels;
    const int y = static_cast<int>(row % height), x = static_cast<int>(element % width);
    const int c = static_cast<int>(plane % t.channels);
    const float mean =
        area_mean(area_window(y, t.height, height), area_window(x, t.width, width),
                  [&](int i, int j) { return wide.pixel(b, i, j)[c * wide.stride_channel()]; });
    next(b, c, y, x, mean);
}

// Means of the windows that p.next_height and p.next_width name.
template <class Target>
void launch_pool(const char* op, const CudaStream& stream, int64_t batch, const PhiParams& p,
                 const PhiGrid& wide, const Target& next) {
    const int64_t elements = batch * p.tiles.channels * int64_t{p.next_height} * p.next_width;
    launch(op, stream, phi_grid(op, (elements + phi_threads - 1) / phi_threads), phi_threads, 0,
           residual_step_pool_kernel<Target>, wide, next, p.tiles, p.next_height, p.next_width, elements);
}

}  // namespace var_ext::cuda
