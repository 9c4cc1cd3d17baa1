#include "cpu/phi.h"

#include <algorithm>
#include <vector>

#include "common/cpu_features.h"
#include "common/parallel.h"
#include "cpu/resample.h"
#include "ops/bicubic_upsample.h"

namespace var_ext::cpu {

namespace {

// Brings rows of images, resampled to H x W, into frames (H + 2, W + 2, room).
class Framer {
  public:
    Framer(const PhiShape& shape, const Grid& from, int64_t h, int64_t w)
        : shape_(shape), from_(from), same_(h == shape.height && w == shape.width) {
        if (same_) return;
        kernel_ = &VAR_EXT_SELECT(resample);
        y_ = bicubic_axis(h, shape.height);
        square_ = h == w && shape.height == shape.width;
        if (!square_) x_ = bicubic_axis(w, shape.width);
        strip_.p = {};
        strip_.p.batch = 1;
        strip_.p.channels = shape.channels;
        strip_.p.in_h = h;
        strip_.p.in_w = w;
        strip_.p.out_h = shape.height;
        strip_.p.out_w = shape.width;
        strip_.p.dtype = DType::float32;
        strip_.pass = Pass::weighted;
        strip_.y = view(y_);
        strip_.x = square_ ? strip_.y : view(x_);
        std::copy(from.strides, from.strides + 4, strip_.p.in_strides);
        const int64_t strides[] = {0, 1, (shape.width + 2) * shape.room(), shape.room()};
        std::copy(strides, strides + 4, strip_.p.out_strides);
    }

    int64_t frame() const { return (shape_.height + 2) * (shape_.width + 2) * shape_.room(); }

    // Floats that `rows` needs for up to `count` rows.
    int64_t scratch(int64_t count) const {
        const auto& p = strip_.p;
        return same_ ? 0 : (p.in_h * (p.in_w + p.out_w) + count * p.out_w) * kernel_->lanes_f32;
    }

    // The frame of zeros, and zeros where there is room for more channels.
    void clear(float* frame) const {
        const int64_t room = shape_.room(), row = (shape_.width + 2) * room;
        if (room != shape_.channels) {
            std::fill_n(frame, this->frame(), 0.0f);
            return;
        }
        std::fill_n(frame, row, 0.0f);
        std::fill_n(frame + (shape_.height + 1) * row, row, 0.0f);
        for (int64_t y = 1; y <= shape_.height; ++y) {
            std::fill_n(frame + y * row, room, 0.0f);
            std::fill_n(frame + y * row + row - room, room, 0.0f);
        }
    }

    void rows(int64_t image, int64_t begin, int64_t end, float* frame, float* scratch) const {
        const int64_t room = shape_.room(), row = (shape_.width + 2) * room;
        float* inside = frame + row + room;
        const float* in = from_.data + image * from_.strides[0];
        if (same_) {
            shape_.kernel->load(in + begin * from_.strides[2], from_.strides + 1, shape_.channels,
                                end - begin, shape_.width, inside + begin * row, row, room);
            return;
        }
        ResampleStrip<float> strip = strip_;
        const int64_t lanes = kernel_->lanes_f32;
        strip.p.in = in;
        strip.p.out = inside;
        strip.row_begin = begin;
        strip.row_end = end;
        set_input_rows(y_, strip);
        strip.packed = scratch;
        strip.wide = strip.packed + strip.p.in_h * strip.p.in_w * lanes;
        strip.done = strip.wide + strip.p.in_h * strip.p.out_w * lanes;
        for (int64_t c = 0; c < shape_.channels; c += lanes) {
            strip.plane_begin = c;
            strip.plane_count = std::min(lanes, shape_.channels - c);
            kernel_->run_f32(strip);
        }
    }

  private:
    PhiShape shape_;
    Grid from_;
    bool same_, square_ = false;
    const ResampleKernel* kernel_ = nullptr;
    AxisTable<float> y_, x_;
    ResampleStrip<float> strip_;
};

// Rows of an image that one task takes: whole images if there are enough for all threads, and no more than
// fit the caches. What a pixel comes out as does not depend on it.
int64_t rows_of_a_task(const PhiShape& shape, int threads) {
    int64_t parts = shape.batch % threads == 0 ? 1 : (2 * threads + shape.batch - 1) / shape.batch;
    if (shape.batch < threads && threads % shape.batch == 0) parts = threads / shape.batch;
    parts = std::max(parts, shape.image() / (128 * 1024));
    return std::max<int64_t>((shape.height + parts - 1) / parts, std::min<int64_t>(shape.height, 2));
}

int64_t cost_of_a_row(const PhiShape& shape) {
    return 9 * shape.width * shape.channels * shape.room() / shape.kernel->lanes;
}

// Where a grid can be read or written by pixel as it lies: all of a pixel's room is its own.
bool in_place(const Grid& grid, const PhiShape& shape) {
    return grid.pixels || (grid.strides[1] == 1 && shape.room() == shape.channels);
}

Buffer<float> padded_bias(const float* bias, const PhiShape& shape) {
    Buffer<float> padded = allocate<float>(shape.room());
    std::fill_n(padded.get(), shape.room(), 0.0f);
    if (bias) std::copy(bias, bias + shape.channels, padded.get());
    return padded;
}

}  // namespace

PhiShape phi_shape(int64_t batch, int64_t channels, int64_t height, int64_t width) {
    return {&VAR_EXT_SELECT(phi), batch, channels, height, width};
}

void phi_step(const PhiStep& step) {
    const PhiShape& shape = step.shape;
    if (shape.batch * shape.channels * shape.height * shape.width == 0) return;
    const int64_t room = shape.room(), row = shape.width * room;
    const Buffer<float> weight = allocate<float>(9 * shape.channels * room);
    const int64_t chain = step.channels_last ? shape.channels : std::min<int64_t>(16, shape.channels);
    shape.kernel->pack(step.weight, shape.channels, chain, weight.get());
    const Buffer<float> bias = padded_bias(step.bias, shape);
    const Framer framer(shape, step.codes, step.codes_height, step.codes_width);

    const int threads = thread_count(shape.batch * shape.height, cost_of_a_row(shape));
    const int64_t count = rows_of_a_task(shape, threads);
    const int64_t parts = (shape.height + count - 1) / count;
    const int64_t scratch = framer.frame() + framer.scratch(count + 2) + 2 * count * row;
    const Buffer<float> buffers = allocate<float>(threads * scratch);
    for (int t = 0; t < threads; ++t) framer.clear(buffers.get() + t * scratch);

    parallel_for(threads, shape.batch * parts, [&](int64_t task, int thread) {
        const int64_t b = task / parts, begin = task % parts * count,
                      end = std::min(begin + count, shape.height);
        float* frame = buffers.get() + thread * scratch;
        float* sum = frame + framer.frame();
        float* done = sum + count * row;
        framer.rows(b, std::max<int64_t>(begin - 1, 0), std::min(end + 1, shape.height), frame,
                    done + count * row);

        PhiRows rows;
        rows.channels = shape.channels;
        rows.room = room;
        rows.width = shape.width;
        rows.chain = chain;
        rows.row_begin = begin;
        rows.row_end = end;
        rows.x = frame;
        rows.weight = weight.get();
        rows.bias = bias.get();
        rows.ratio = step.ratio;
        rows.sum = sum;
        rows.target = step.target ? step.target + b * shape.image() : nullptr;
        rows.residual = step.residual + b * shape.image();
        rows.base = nullptr;
        rows.base_pixel = rows.out_pixel = room;
        rows.base_row = rows.out_row = row;
        if (step.base.data) {
            const float* base = step.base.data + b * step.base.strides[0] + begin * step.base.strides[2];
            if (in_place(step.base, shape)) {
                rows.base = base;
                rows.base_row = step.base.strides[2];
                rows.base_pixel = step.base.strides[3];
            } else {
                rows.base = done;
                shape.kernel->load(base, step.base.strides + 1, shape.channels, end - begin, shape.width,
                                   done, row, room);
            }
        }
        float* out = step.out.data + b * step.out.strides[0] + begin * step.out.strides[2];
        const bool written_in_place = in_place(step.out, shape);
        rows.out = done;
        if (written_in_place) {
            rows.out = out;
            rows.out_row = step.out.strides[2];
            rows.out_pixel = step.out.strides[3];
        }
        shape.kernel->rows(rows);
        if (!written_in_place) {
            shape.kernel->store(done, row, room, shape.channels, end - begin, shape.width, out,
                                step.out.strides + 1);
        }
    });
}

namespace {

// The convolution that takes the gradient of the result to that of the input: channels swapped, taps
// mirrored.
Buffer<float> mirrored(const float* weight, int64_t channels) {
    Buffer<float> result = allocate<float>(channels * channels * 9);
    for (int64_t i = 0; i < channels; ++i) {
        for (int64_t o = 0; o < channels; ++o) {
            for (int64_t tap = 0; tap < 9; ++tap) {
                result.get()[(i * channels + o) * 9 + 8 - tap] = weight[(o * channels + i) * 9 + tap];
            }
        }
    }
    return result;
}

void input_gradient(const PhiBackward& step) {
    const PhiShape& shape = step.shape;
    const Buffer<float> weight = mirrored(step.weight, shape.channels);
    PhiStep phi;
    phi.shape = shape;
    phi.codes = step.grad;
    phi.codes_height = shape.height;
    phi.codes_width = shape.width;
    phi.weight = weight.get();
    phi.bias = nullptr;
    phi.ratio = step.ratio;
    phi.base.data = nullptr;
    if (step.codes_height == shape.height && step.codes_width == shape.width) {
        phi.out = step.grad_codes;
        return phi_step(phi);
    }
    const Buffer<float> wide = allocate<float>(shape.batch * shape.image());
    phi.out = shape.pixels(wide.get());
    phi_step(phi);
    ResampleParams p;
    p.in = wide.get();
    p.out = step.grad_codes.data;
    p.dtype = DType::float32;
    p.batch = shape.batch;
    p.channels = shape.channels;
    p.in_h = shape.height;
    p.in_w = shape.width;
    p.out_h = step.codes_height;
    p.out_w = step.codes_width;
    std::copy(phi.out.strides, phi.out.strides + 4, p.in_strides);
    std::copy(step.grad_codes.strides, step.grad_codes.strides + 4, p.out_strides);
    bicubic_upsample_backward(p);
}

// In the order of the images, whatever the number of threads: each sum belongs to one task.
void weight_gradient(const PhiBackward& step) {
    const PhiShape& shape = step.shape;
    const int64_t room = shape.room(), c = shape.channels;
    const Framer codes(shape, step.codes, step.codes_height, step.codes_width);
    const Framer grads(shape, step.grad, shape.height, shape.width);
    const int64_t frame = codes.frame();
    const int64_t chunk = std::clamp<int64_t>(256 * 1024 / frame, 1, shape.batch);

    const int threads = thread_count(shape.batch * shape.height, cost_of_a_row(shape));
    const Buffer<float> frames = allocate<float>(2 * chunk * frame);
    const int64_t scratch = codes.scratch(shape.height);
    const Buffer<float> buffers = allocate<float>(threads * scratch);
    const Buffer<float> sums = allocate<float>((9 * c + 1) * room);
    std::fill_n(sums.get(), (9 * c + 1) * room, 0.0f);
    float* bias_sum = sums.get() + 9 * c * room;

    const int64_t block = shape.kernel->input_block, blocks = (c + block - 1) / block;
    for (int64_t first = 0; first < shape.batch; first += chunk) {
        const int64_t images = std::min(chunk, shape.batch - first);
        parallel_for(threads, 2 * images, [&](int64_t task, int thread) {
            const Framer& framer = task < images ? codes : grads;
            float* to = frames.get() + (task < images ? task : chunk + task - images) * frame;
            framer.clear(to);
            framer.rows(first + task % images, 0, shape.height, to, buffers.get() + thread * scratch);
        });
        parallel_for(threads, 9 * blocks + 1, [&](int64_t task, int) {
            const float* grad = frames.get() + chunk * frame;
            if (task == 9 * blocks) {  // the frame adds zeros
                for (int64_t i = 0; i < images * frame; i += room) {
                    for (int64_t channel = 0; channel < room; ++channel)
                        bias_sum[channel] += grad[i + channel];
                }
                return;
            }
            PhiWeightRows rows;
            rows.channels = c;
            rows.room = room;
            rows.height = shape.height;
            rows.width = shape.width;
            rows.images = images;
            rows.x = frames.get();
            rows.grad = grad;
            rows.tap = task / blocks;
            rows.begin = task % blocks * block;
            rows.sum = sums.get();
            shape.kernel->weight_rows(rows);
        });
    }
    for (int64_t o = 0; o < c; ++o) {
        for (int64_t i = 0; step.grad_weight && i < c; ++i) {
            for (int64_t tap = 0; tap < 9; ++tap) {
                step.grad_weight[(o * c + i) * 9 + tap] += step.ratio * sums.get()[(tap * c + i) * room + o];
            }
        }
        if (step.grad_bias) step.grad_bias[o] += step.ratio * bias_sum[o];
    }
}

}  // namespace

void phi_backward(const PhiBackward& step) {
    const PhiShape& shape = step.shape;
    if (shape.batch * shape.channels * shape.height * shape.width == 0) return;
    if (step.grad_codes.data) input_gradient(step);
    if (step.grad_weight || step.grad_bias) weight_gradient(step);
}

}  // namespace var_ext::cpu
