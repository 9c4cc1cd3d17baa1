#include <algorithm>

#include "common/parallel.h"
#include "cpu/frames.h"
#include "cpu/phi.h"
#include "ops/bicubic_upsample.h"

namespace var_ext::cpu {

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

    const int threads = thread_count(shape.batch * shape.height, shape.row_cost());
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
