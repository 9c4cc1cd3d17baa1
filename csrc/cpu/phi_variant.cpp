// The body of phi, compiled once for each variant.
#include "cpu/phi.h"
#include "cpu/planes.h"

namespace {

using var_ext::cpu::PhiRows;
using var_ext::cpu::PhiWeightRows;

constexpr int phi_vectors = 2;  // of output channels at a time
constexpr int phi_lanes = lanes_of<float>;
// R pixels, or input channels, at a time: 2 R sums, 2 weights and a factor within the registers.
constexpr int phi_block = vec_bytes == 64 ? 8 : vec_bytes == 32 ? 6 : 4;

inline int64_t phi_outputs(int64_t group, int64_t channels) {  // of a group that begins at channel `group`
    const int64_t left = (channels - group + phi_lanes - 1) / phi_lanes * phi_lanes;
    return left < phi_vectors * phi_lanes ? left : phi_vectors * phi_lanes;
}

// Packed weights: (groups of output channels, chains, 9, input channels of the chain, outputs of the group).
void phi_pack(const float* weight, int64_t channels, int64_t chain, float* packed) {
    constexpr int n = phi_lanes;
    using V = Vec<float, n>;
    const int64_t columns = channels * 9;  // a column: an input channel and a tap
    for (int64_t group = 0; group < channels; group += phi_vectors * n) {
        const int64_t outputs = phi_outputs(group, channels);
        const auto place = [=](int64_t column) {
            const int64_t input = column / 9, tap = column % 9, first = input / chain * chain;
            const int64_t inputs = channels - first < chain ? channels - first : chain;
            return packed + (9 * first + tap * inputs + input - first) * outputs;
        };
        for (int64_t half = 0; half < outputs; half += n) {
            const int64_t o = group + half;
            const float* from = weight + o * columns;
            int64_t i = 0;
            for (; o + n <= channels && i + n <= columns; i += n) {
                V tile[n];
#pragma GCC unroll 16
                for (int l = 0; l < n; ++l) tile[l] = load<V>(from + l * columns + i);
                transpose<n / 2, n>(tile);
#pragma GCC unroll 16
                for (int l = 0; l < n; ++l) store(place(i + l) + half, tile[l]);
            }
            for (; i < columns; ++i) {
                for (int l = 0; l < n; ++l) {
                    place(i)[half + l] = o + l < channels ? from[l * columns + i] : 0;
                }
            }
        }
        packed += columns * outputs;
    }
}

// One chain of additions to each output of a group.
struct PhiPass {
    const float* weight;
    int64_t group;          // the first output channel
    int64_t input, inputs;  // channels
    bool first, last;       // among the chains of these outputs; in between their sum waits in scratch
};

// R pixels of row y x N vectors of output channels.
template <int R, int N>
inline __attribute__((always_inline)) void phi_pixels(const PhiRows& p, const PhiPass& pass, int64_t y,
                                                      int64_t x) {
    constexpr int n = phi_lanes;
    using V = Vec<float, n>;
    const int64_t row = y - p.row_begin, framed_row = (p.width + 2) * p.room;
    const float* corner = p.x + y * framed_row + x * p.room;
    float* waiting = p.sum + (row * p.width + x) * p.room + pass.group;
    V sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < N; ++j) sum[r][j] = V{};
    }
    // The channels of three pixels are one run of numbers if all are wanted and nothing fills up the last
    // vector.
    const int64_t runs = p.room == pass.inputs ? 1 : 3, run = 3 / runs * pass.inputs;
    const float* weight = pass.weight;
    for (int dy = 0; dy < 3; ++dy) {
        for (int64_t dx = 0; dx < runs; ++dx) {
            const float* at = corner + dy * framed_row + dx * p.room + pass.input;
            for (int64_t i = 0; i < run; ++i, ++at, weight += N * n) {
                V w[N];
                for (int j = 0; j < N; ++j) w[j] = load<V>(weight + j * n);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    for (int j = 0; j < N; ++j) sum[r][j] += at[r * p.room] * w[j];
                }
            }
        }
    }
    const float* centre = corner + framed_row + p.room + pass.group;
    const float* base = p.base ? p.base + row * p.base_row + x * p.base_pixel + pass.group : nullptr;
    float* out = p.out + row * p.out_row + x * p.out_pixel + pass.group;
    const int64_t place = (y * p.width + x) * p.room + pass.group;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) {
            const float* before = pass.first ? p.bias + pass.group + j * n : waiting + r * p.room + j * n;
            const V convolved = load<V>(before) + sum[r][j];
            if (!pass.last) {
                store(waiting + r * p.room + j * n, convolved);
                continue;
            }
            V result = load<V>(centre + r * p.room + j * n) * (1 - p.ratio) + convolved * p.ratio;
            if (base) result += load<V>(base + r * p.base_pixel + j * n);
            store(out + r * p.out_pixel + j * n, result);
            if (p.target) {
                const int64_t at = place + r * p.room + j * n;
                store(p.residual + at, load<V>(p.target + at) - result);
            }
        }
    }
}

template <int R, int N>
void phi_pass(const PhiRows& p, const PhiPass& pass) {
    for (int64_t y = p.row_begin; y < p.row_end; ++y) {
        int64_t x = 0;
        for (; x + R <= p.width; x += R) phi_pixels<R, N>(p, pass, y, x);
        for (; x + 4 <= p.width; x += 4) phi_pixels<4, N>(p, pass, y, x);
        for (; x + 2 <= p.width; x += 2) phi_pixels<2, N>(p, pass, y, x);
        for (; x < p.width; ++x) phi_pixels<1, N>(p, pass, y, x);
    }
}

// The sums are taken as oneDNN takes them, tap by tap. On channels-last tensors each output is one chain over
// all input channels, and the bias comes last. On others 16 input channels are a chain, the bias follows the
// first, and then the other chains are added. With FMA that is torch's rounding, bit for bit; later scales of
// a sampling with `more_smooth` would magnify another rounding a thousandfold.
template <int R>
void phi_rows(const PhiRows& p) {
    const float* weight = p.weight;
    for (int64_t group = 0; group < p.room; group += phi_vectors * phi_lanes) {
        const int64_t outputs = phi_outputs(group, p.channels);
        for (int64_t input = 0; input < p.channels; input += p.chain) {
            const int64_t left = p.channels - input, inputs = left < p.chain ? left : p.chain;
            const PhiPass pass = {weight, group, input, inputs, input == 0, left == inputs};
            outputs == phi_lanes ? phi_pass<R, 1>(p, pass) : phi_pass<R, phi_vectors>(p, pass);
            weight += 9 * inputs * outputs;
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

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(PhiKernel, phi) = {
    phi_lanes, phi_block, phi_pack, phi_rows<phi_block>, phi_weight_rows<phi_block>, phi_load, phi_store};

}  // namespace var_ext::cpu
