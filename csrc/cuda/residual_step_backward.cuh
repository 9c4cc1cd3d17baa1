// The gradients of phi of upsampled codes: of the codes by the mirrored convolution and a gather over the
// pixels that read a code; of weight and bias as sums over pixels, a part of the tiles per block, then over
// the parts in order. No atomics.
//
// Counted for 32 channels, a tile of 64 pixels: a thread has 4 outputs x 9 taps of an input channel, 36
// products behind 3 loads of 4 bytes and a broadcast one of 16; a tile is 64 x 9216 products, 4.6 k cycles of
// an SM.
#pragma once

#include "cuda/residual_step_phi.cuh"

namespace var_ext::cuda {

constexpr int phi_weight_pixels = 64, phi_warps = phi_threads / 32;

// budget: registers <= 64, shared <= 0, blocks >= 4
template <class Target>
__global__ void __launch_bounds__(phi_threads, 4)
    residual_step_gather_kernel(const float* wide, const Target target, PhiTiles t, int64_t elements) {
    ptx::wait_for_previous();
    // a warp per element of (B, C, h, w)
    const int64_t element = static_cast<int64_t>(blockIdx.x) * phi_warps + threadIdx.x / 32;
    const bool here = element < elements;  // mask
    if (!here) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = element / t.codes_width, plane = row / t.codes_height;
    const int x = static_cast<int>(element % t.codes_width), y = static_cast<int>(row % t.codes_height);
    const Range down = cubic_outputs(y, t.codes_height, t.height);
    const Range across = cubic_outputs(x, t.codes_width, t.width);
    const int width = across.end - across.begin, count = (down.end - down.begin) * width;
    float sum = 0.0f;
    for (int i = lane; i < count; i += 32) {
        const int from_y = down.begin + i / width, from_x = across.begin + i % width;
        const CubicTaps<float> of_y = cubic_taps<float>(from_y, t.codes_height, t.height);
        const CubicTaps<float> of_x = cubic_taps<float>(from_x, t.codes_width, t.width);
        float weight_y = 0.0f, weight_x = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            weight_y += of_y.index[k] == y ? of_y.weight[k] : 0.0f;
            weight_x += of_x.index[k] == x ? of_x.weight[k] : 0.0f;
        }
        const bool read =
            weight_y != 0.0f && weight_x != 0.0f;  // else NaN would leak from pixels that do not read it
        const float grad = read ? wide[(plane * t.height + from_y) * t.width + from_x] : 0.0f;
        sum = add_product(sum, weight_y * weight_x, grad);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
    }
    if (lane == 0) {
        target(plane / t.channels, static_cast<int>(plane % t.channels), y, x, sum);
    }
}

inline int64_t phi_weight_bytes(const PhiTiles& t) {
    return 4 * (t.framed_pixels() + whole_eights(t.pixels())) * int64_t{phi_room(t.channels)};
}

// Sums of a part of all tiles into scratch: (parts, C C 9 + C). A warp has 4 outputs of 32 input channels.
// budget: registers <= 128, shared <= 115712, blocks >= 1, on sm_86 >= 0
// sass: LDS.128, STS.128
template <class Codes>
__global__ void __launch_bounds__(phi_threads, 2)
    residual_step_weight_kernel(const Codes codes, const PhiGrid grad, PhiTiles t, int64_t tiles, int parts,
                                float* sums) {
    ptx::wait_for_previous();
    const int part = static_cast<int>(blockIdx.x) / t.groups, room = phi_room(t.channels);
    const int quads = (t.channels + 3) / 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int unit = static_cast<int>(blockIdx.x) % t.groups * phi_warps + static_cast<int>(threadIdx.x) / 32;
    const int in = unit / quads * 32 + lane, out = unit % quads * 4;
    const bool here = in < t.channels;  // mask
    float* const frame = reinterpret_cast<float*>(ptx::shared_memory());
    float* const grads = frame + t.framed_pixels() * room;  // (pixels, room)

    float sum[4][9] = {}, bias[4] = {};
    const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
#pragma unroll 1
    for (int64_t tile = begin; tile < end; ++tile) {
        PhiTiles one = t;
        one.groups = 1;
        const PhiPlace place = phi_place(one, tile);
        const int height = min(t.tile_height, t.height - place.top),
                  width = min(t.tile_width, t.width - place.left);
        phi_load_frame(codes, t, place, frame);
        const int items = whole_eights(height * width);
        for (int item = static_cast<int>(threadIdx.x); item < items * quads; item += phi_threads) {
            const int pixel = item % items, channel = item / items * 4;
            const int last = min(pixel, height * width - 1);
            const float* const from =
                grad.pixel(place.image, place.top + last / width, place.left + last % width);
            float quad[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool inside = channel + i < t.channels;  // mask
                quad[i] = inside ? from[(channel + i) * grad.stride_channel()] : 0.0f;
            }
            uint4 bits;
            memcpy(&bits, quad, 16);
            ptx::store_16(grads + pixel * room + channel, bits);
        }
        __syncthreads();
        const int framed_row = (t.tile_width + 2) * room;
        const int column = here ? in : 0;
#pragma unroll 1
        for (int y = 0; y < height; ++y) {
            const float* at = frame + y * framed_row + column;
            float window[3][3];  // of which the last column is new at each pixel
#pragma unroll
            for (int r = 0; r < 3; ++r) {
                window[r][1] = at[r * framed_row];
                window[r][2] = at[r * framed_row + room];
            }
#pragma unroll 1
            for (int x = 0; x < width; ++x) {
#pragma unroll
                for (int r = 0; r < 3; ++r) {
                    window[r][0] = window[r][1];
                    window[r][1] = window[r][2];
                    window[r][2] = at[r * framed_row + (x + 2) * room];
                }
                const uint4 bits = ptx::load_16(grads + (y * width + x) * room + out);
                float of[4];
                memcpy(of, &bits, 16);
#pragma unroll
                for (int o = 0; o < 4; ++o) {
                    bias[o] += of[o];
#pragma unroll
                    for (int tap = 0; tap < 9; ++tap) {
                        sum[o][tap] = add_product(sum[o][tap], window[tap / 3][tap % 3], of[o]);
                    }
                }
            }
        }
        __syncthreads();
    }

    const int64_t row = (int64_t{t.channels} * 9 + 1) * t.channels;
    float* const to = sums + part * row;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
        const bool stores = here && out + o < t.channels;  // mask
        if (!stores) continue;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
            to[(static_cast<int64_t>(out + o) * t.channels + in) * 9 + tap] = sum[o][tap];
        }
        if (in == 0) to[row - t.channels + out + o] = bias[o];
    }
}

// The parts into gradients, times `ratio`: a warp each eighth part of 32 neighbours, then over the warps.
// Either gradient may be null.
// budget: registers <= 32, shared <= 1024, blocks >= 6
template <bool adds>
__global__ void __launch_bounds__(phi_threads, 6)
    residual_step_add_kernel(const float* sums, int parts, int64_t of_weight, int64_t of_bias, float ratio,
                             float* grad_weight, float* grad_bias) {
    ptx::wait_for_previous();
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32,
                  row = of_weight + of_bias;
    const bool here = column < row;  // mask
    float sum = 0.0f;
    if (here) {
#pragma unroll 4
        for (int part = static_cast<int>(threadIdx.x) / 32; part < parts; part += phi_warps) {
            sum += sums[part * row + column];
        }
    }
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());  // (warps, 32)
    shared[threadIdx.x] = sum;
    __syncthreads();
    const bool stores = here && threadIdx.x < 32;  // mask
    if (!stores) return;
    float total = 0.0f;
    for (int w = 0; w < phi_warps; ++w) total += shared[w * 32 + threadIdx.x];
    const bool weight = column < of_weight;
    float* const grads = weight ? grad_weight : grad_bias;
    if (grads == nullptr) return;
    float* const to = grads + (weight ? column : column - of_weight);
    *to = (adds ? *to : 0.0f) + ratio * total;
}

// The inputs of one step's gradients. `grad_codes` is written through `target`.
template <class Codes>
struct PhiBackward {
    PhiTiles tiles;  // the sizes
    int64_t batch;
    PhiGrid grad;
    Codes codes;
    const float* weight;
    float ratio;
    bool wants_codes, adds;  // `adds`: to the existing gradients of weight and bias
    float *grad_weight, *grad_bias;
    float* scratch;  // residual_step_scratch floats
};

template <class Codes, class Target>
void phi_backward(const char* op, const CudaStream& stream, const PhiBackward<Codes>& p,
                  const Target& target) {
    const ResidualStepLayout layout(p.batch, p.tiles.channels, p.tiles.height, p.tiles.width);
    const bool same = p.tiles.codes_height == p.tiles.height && p.tiles.codes_width == p.tiles.width;
    if (p.wants_codes) {
        PhiParams phi{};
        phi.tiles = p.tiles;
        phi.tiles.codes_height = p.tiles.height;
        phi.tiles.codes_width = p.tiles.width;
        phi.weight = p.weight;
        phi.ratio = p.ratio;
        phi.chain = p.tiles.channels;
        phi.mirrored = true;
        if (same) {
            launch_phi(op, stream, p.batch, phi, p.grad, target);
        } else {
            const int64_t plane = int64_t{p.tiles.height} * p.tiles.width;
            const PhiStore wide = {p.scratch, {plane * p.tiles.channels, plane, p.tiles.width, 1}};
            launch_phi(op, stream, p.batch, phi, p.grad, wide);
            const int64_t elements =
                p.batch * p.tiles.channels * int64_t{p.tiles.codes_height} * p.tiles.codes_width;
            launch(op, stream, phi_grid(op, (elements + phi_warps - 1) / phi_warps), phi_threads, 0,
                   residual_step_gather_kernel<Target>, static_cast<const float*>(p.scratch), target, p.tiles,
                   elements);
        }
    }
    if (p.grad_weight == nullptr && p.grad_bias == nullptr) return;
    PhiTiles tiles = phi_tiles(p.tiles, phi_weight_pixels, phi_room_of_chip(op, stream), phi_weight_bytes);
    if (tiles.count() == 0) {
        contract_error(op, "C must be small enough for nine pixels in shared memory on CUDA, got " +
                               std::to_string(tiles.channels) + "; VAR_EXT_BACKEND=reference takes any");
    }
    const int quads = (tiles.channels + 3) / 4, units = (tiles.channels + 31) / 32 * quads;
    tiles.groups = (units + phi_warps - 1) / phi_warps;
    float* const sums = p.scratch + layout.sums;
    const int parts = static_cast<int>(layout.parts);
    launch(op, stream, dim3(static_cast<unsigned>(parts * tiles.groups)), phi_threads,
           static_cast<size_t>(phi_weight_bytes(tiles)), residual_step_weight_kernel<Codes>, p.codes, p.grad,
           tiles, p.batch * tiles.count(), parts, sums);
    const int64_t of_weight = int64_t{9} * tiles.channels * tiles.channels, of_bias = tiles.channels;
    launch(op, stream, dim3(static_cast<unsigned>((of_weight + of_bias + 31) / 32)), phi_threads,
           phi_threads * sizeof(float),
           p.adds ? residual_step_add_kernel<true> : residual_step_add_kernel<false>,
           static_cast<const float*>(sums), parts, of_weight, of_bias, p.ratio, p.grad_weight, p.grad_bias);
}

}  // namespace var_ext::cuda
