// The body of phi, compiled once for each variant.
#pragma once

#include "cpu/phi.h"
#include "cpu/planes.h"

namespace {

using var_ext::cpu::PhiRows;
using var_ext::cpu::PhiWeightRows;

// Each output is one chain from zero, tap by tap and input channel by input channel, and the bias comes last:
// the order in which oneDNN sums on channels-last tensors. With FMA that is torch's rounding, bit for bit;
// later scales of a sampling with `more_smooth` would magnify another rounding a thousandfold.
constexpr int phi_vectors = 2;  // of output channels at a time
constexpr int phi_lanes = lanes_of<float>;

inline int64_t phi_outputs(int64_t group, int64_t channels) {  // of a group that begins at channel `group`
    const int64_t left = (channels - group + phi_lanes - 1) / phi_lanes * phi_lanes;
    return left < phi_vectors * phi_lanes ? left : phi_vectors * phi_lanes;
}

// Packed weights: (groups of output channels, 9, C, outputs of the group).
void phi_pack(const float* weight, int64_t channels, float* packed) {
    constexpr int n = phi_lanes;
    using V = Vec<float, n>;
    for (int64_t group = 0; group < channels; group += phi_vectors * n) {
        const int64_t outputs = phi_outputs(group, channels);
        for (int64_t half = 0; half < outputs; half += n) {
            const int64_t o = group + half, columns = channels * 9;  // a column: an input channel and a tap
            const float* from = weight + o * columns;
            int64_t i = 0;
            for (; o + n <= channels && i + n <= columns; i += n) {
                V tile[n];
#pragma GCC unroll 16
                for (int l = 0; l < n; ++l) tile[l] = load<V>(from + l * columns + i);
                transpose<n / 2, n>(tile);
#pragma GCC unroll 16
                for (int l = 0; l < n; ++l) {
                    const int64_t input = (i + l) / 9, tap = (i + l) % 9;
                    store(packed + (tap * channels + input) * outputs + half, tile[l]);
                }
            }
            for (; i < columns; ++i) {
                const int64_t input = i / 9, tap = i % 9;
                for (int l = 0; l < n; ++l) {
                    packed[(tap * channels + input) * outputs + half + l] =
                        o + l < channels ? from[l * columns + i] : 0;
                }
            }
        }
        packed += 9 * channels * outputs;
    }
}

// A row of taps for R pixels of row y x N vectors of output channels. The sums wait in scratch for the next
// row of taps: three times a third of the weights, 12 KB at C = 32, stays in the L1 cache, which all would
// not.
template <int R, int N>
inline __attribute__((always_inline)) void phi_pixels(const PhiRows& p, const float* weight, int dy,
                                                      int64_t group, int64_t y, int64_t x) {
    constexpr int n = phi_lanes;
    using V = Vec<float, n>;
    const int64_t row = y - p.row_begin;
    float* parked = p.sum + (row * p.width + x) * p.room + group;
    V sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < N; ++j) sum[r][j] = dy == 0 ? V{} : load<V>(parked + r * p.room + j * n);
    }
    // The three pixels' channels are one run of numbers if nothing fills up the last vector.
    const float* line = p.x + ((y + dy) * (p.width + 2) + x) * p.room;
    const int64_t runs = p.room == p.channels ? 1 : 3, run = 3 / runs * p.channels;
    for (int64_t dx = 0; dx < runs; ++dx) {
        const float* at = line + dx * p.room;
        for (int64_t i = 0; i < run; ++i, ++at, weight += N * n) {
            V w[N];
            for (int j = 0; j < N; ++j) w[j] = load<V>(weight + j * n);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                for (int j = 0; j < N; ++j) sum[r][j] += at[r * p.room] * w[j];
            }
        }
    }
    const float* centre = line - p.width * p.room - p.room + group;  // for dy = 2
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < N; ++j) {
            if (dy < 2) {
                store(parked + r * p.room + j * n, sum[r][j]);
                continue;
            }
            const int64_t channel = group + j * n;
            const V convolved = sum[r][j] + load<V>(p.bias + channel);
            V result = load<V>(centre + r * p.room + j * n) * (1 - p.ratio) + convolved * p.ratio;
            if (p.base) result += load<V>(p.base + row * p.base_row + (x + r) * p.base_pixel + channel);
            store(p.out + row * p.out_row + (x + r) * p.out_pixel + channel, result);
            if (p.target) {
                const int64_t place = (y * p.width + x + r) * p.room + channel;
                store(p.residual + place, load<V>(p.target + place) - result);
            }
        }
    }
}

template <int R, int N>
void phi_line(const PhiRows& p, const float* weight, int dy, int64_t group, int64_t y) {
    int64_t x = 0;
    for (; x + R <= p.width; x += R) phi_pixels<R, N>(p, weight, dy, group, y, x);
    for (; x + 4 <= p.width; x += 4) phi_pixels<4, N>(p, weight, dy, group, y, x);
    for (; x + 2 <= p.width; x += 2) phi_pixels<2, N>(p, weight, dy, group, y, x);
    for (; x < p.width; ++x) phi_pixels<1, N>(p, weight, dy, group, y, x);
}

template <int R>
void phi_rows(const PhiRows& p) {
    const float* weight = p.weight;
    for (int64_t group = 0; group < p.room; group += phi_vectors * phi_lanes) {
        const int64_t outputs = phi_outputs(group, p.channels);
        for (int dy = 0; dy < 3; ++dy, weight += 3 * p.channels * outputs) {
            for (int64_t y = p.row_begin; y < p.row_end; ++y) {
                if (outputs == phi_vectors * phi_lanes) {
                    phi_line<R, phi_vectors>(p, weight, dy, group, y);
                } else {
                    phi_line<R, 1>(p, weight, dy, group, y);
                }
            }
        }
    }
}

// R input channels x N vectors of output channels stay in registers over the pixels of an image.
template <int R, int N>
void phi_weight_part(const PhiWeightRows& p, int64_t group) {
    constexpr int n = phi_lanes;
    using V = Vec<float, n>;
    const int64_t framed_row = (p.width + 2) * p.room, image = (p.height + 2) * framed_row;
    for (int64_t b = 0; b < p.images; ++b) {
        V sum[R][N];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < N; ++j) sum[r][j] = V{};
        }
        for (int64_t y = 0; y < p.height; ++y) {
            const float* x = p.x + b * image + (y + p.tap / 3) * framed_row + p.tap % 3 * p.room + p.begin;
            const float* grad = p.grad + b * image + (y + 1) * framed_row + p.room + group;
            for (int64_t i = 0; i < p.width; ++i, x += p.room, grad += p.room) {
                V g[N];
                for (int j = 0; j < N; ++j) g[j] = load<V>(grad + j * n);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    for (int j = 0; j < N; ++j) sum[r][j] += x[r] * g[j];
                }
            }
        }
        for (int r = 0; r < R && p.begin + r < p.channels; ++r) {
            for (int j = 0; j < N; ++j) {
                float* to = p.sum + (p.tap * p.channels + p.begin + r) * p.room + group + j * n;
                store(to, load<V>(to) + sum[r][j]);
            }
        }
    }
}

template <int R>
void phi_weight_rows(const PhiWeightRows& p) {
    constexpr int n = phi_lanes;
    int64_t group = 0;
    for (; group + phi_vectors * n <= p.room; group += phi_vectors * n) {
        phi_weight_part<R, phi_vectors>(p, group);
    }
    if (group < p.room) phi_weight_part<R, 1>(p, group);
}

void phi_load(const float* in, const int64_t* strides, int64_t channels, int64_t rows, int64_t width,
              float* out, int64_t out_row, int64_t out_pixel) {
    constexpr int n = phi_lanes;
    const int64_t plane_strides[2] = {0, strides[0]};
    const bool joined = strides[1] == width * strides[2] && out_row == width * out_pixel;
    const int64_t run = joined ? rows * width : width, runs = joined ? 1 : rows;
    for (int64_t c = 0; c < channels; c += n) {
        const Lanes<n> lanes(plane_strides, channels, c, channels - c < n ? channels - c : n);
        for (int64_t r = 0; r < runs; ++r) {
            pack<n>(in + r * strides[1], lanes, run, strides[2], out + r * out_row + c, out_pixel);
        }
    }
}

void phi_store(const float* in, int64_t in_row, int64_t in_pixel, int64_t channels, int64_t rows,
               int64_t width, float* out, const int64_t* strides) {
    constexpr int n = phi_lanes;
    const int64_t plane_strides[2] = {0, strides[0]};
    const bool joined = strides[1] == width * strides[2] && in_row == width * in_pixel;
    const int64_t run = joined ? rows * width : width, runs = joined ? 1 : rows;
    for (int64_t c = 0; c < channels; c += n) {
        const int64_t count = channels - c < n ? channels - c : n;
        const Lanes<n> lanes(plane_strides, channels, c, count);
        for (int64_t r = 0; r < runs; ++r) {
            unpack<n>(in + r * in_row + c, lanes, count, run, strides[2], out + r * strides[1], in_pixel);
        }
    }
}

}  // namespace

// R pixels at a time: 2 R sums, 2 weights and a factor within the registers.
#define VAR_EXT_PHI_KERNEL(R) {phi_lanes, R, phi_pack, phi_rows<R>, phi_weight_rows<R>, phi_load, phi_store}
