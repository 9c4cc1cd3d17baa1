#include "ops/residual_quantize.h"

#include <algorithm>
#include <string>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/nearest_code.h"
#include "cpu/phi.h"
#include "ops/area_downsample.h"

namespace var_ext::cpu {

namespace {

// The codes of a scale's tokens by pixel: (B, p, p, room).
void gather(const float* codebook, const int64_t* strides, const int64_t* tokens, int64_t tokens_stride,
            int64_t count, const PhiShape& shape, float* codes) {
    const int64_t room = shape.room();
    parallel_for(thread_count(shape.batch, count * room), shape.batch, [&](int64_t b, int) {
        for (int64_t i = 0; i < count; ++i) {
            const float* code = codebook + tokens[b * tokens_stride + i] * strides[0];
            float* to = codes + (b * count + i) * room;
            if (strides[1] == 1) {
                std::copy(code, code + shape.channels, to);
            } else {
                for (int64_t c = 0; c < shape.channels; ++c) to[c] = code[c * strides[1]];
            }
        }
    });
}

// A square grid of side p by pixel.
Grid square(const PhiShape& shape, int64_t p, float* data) {
    const int64_t room = shape.room();
    return {data, {p * p * room, 1, p * room, room}, true};
}

void pool(const PhiShape& shape, const float* in, int64_t side, float* out) {
    const Grid from = shape.pixels(const_cast<float*>(in)), to = square(shape, side, out);
    ResampleParams p;
    p.in = in;
    p.out = out;
    p.dtype = DType::float32;
    p.batch = shape.batch;
    p.channels = shape.channels;
    p.in_h = p.in_w = shape.height;
    p.out_h = p.out_w = side;
    std::copy(from.strides, from.strides + 4, p.in_strides);
    std::copy(to.strides, to.strides + 4, p.out_strides);
    area_downsample(p);
}

}  // namespace

void residual_quantize(const ResidualQuantizeParams& p) {
    const QuantizerShape& q = p.shape;
    if (q.batch == 0) return;
    const PhiShape shape = phi_shape(q.batch, q.channels, q.side, q.side);
    const PhiKernel& kernel = *shape.kernel;
    const int64_t room = shape.room(), image = shape.image(), plane = q.channels * q.side * q.side;
    const int64_t planar[3] = {q.side * q.side, q.side, 1};  // strides of an image in f_hat and scales
    const int threads = thread_count(q.batch, image);
    const Buffer<float> buffer = allocate<float>(5 * q.batch * image);
    float* target = buffer.get();  // all by pixel
    float* f_hat = target + q.batch * image;
    float* residual = f_hat + q.batch * image;
    float* pooled = residual + q.batch * image;
    float* codes = pooled + q.batch * image;
    if (room != q.channels)
        std::fill_n(target, 5 * q.batch * image, 0.0f);  // nothing odd beside the channels
    parallel_for(threads, q.batch, [&](int64_t b, int) {
        kernel.load(p.features + b * p.features_strides[0], p.features_strides + 1, q.channels, q.side,
                    q.side, target + b * image, q.side * room, room);
    });

    NearestCodeParams search;
    search.codebook = p.codebook;
    search.v = q.codes;
    search.c = q.channels;
    search.codebook_stride_v = p.codebook_strides[0];
    search.codebook_stride_c = p.codebook_strides[1];
    search.x_stride_n = room;
    search.x_stride_c = 1;
    search.out_stride = 1;
    search.cosine = p.cosine;
    const PackedCodebook packed = pack_codebook(search, q.batch * q.tokens);
    const Buffer<int64_t> found = allocate<int64_t>(q.batch * q.side * q.side);
    search.out = found.get();

    int64_t done = 0;  // tokens of an image
    for (size_t k = 0; k < q.patch_nums.size(); ++k) {
        const int64_t side = q.patch_nums[k], count = side * side;
        const float* rest = k == 0 ? target : residual;
        search.x = rest;
        if (side != q.side) {
            pool(shape, rest, side, pooled);
            search.x = pooled;
        }
        search.n = q.batch * count;
        nearest_code(search, packed);
        gather(p.codebook, p.codebook_strides, found.get(), count, count, shape, codes);
        for (int64_t b = 0; b < q.batch; ++b) {
            std::copy_n(found.get() + b * count, count, p.tokens + b * q.tokens + done);
        }
        done += count;

        PhiStep step;
        step.shape = shape;
        step.codes = square(shape, side, codes);
        step.codes_height = step.codes_width = side;
        step.weight = p.weight + q.phi_index[k] * q.channels * q.channels * 9;
        step.bias = p.bias + q.phi_index[k] * q.channels;
        step.ratio = q.ratio;
        step.base = shape.pixels(k == 0 ? nullptr : f_hat);
        step.out = shape.pixels(f_hat);
        step.target = target;
        step.residual = residual;
        phi_step(step);
        if (!p.scales) continue;
        float* scale = p.scales + static_cast<int64_t>(k) * q.batch * plane;
        parallel_for(threads, q.batch, [&](int64_t b, int) {
            kernel.store(f_hat + b * image, q.side * room, room, q.channels, q.side, q.side,
                         scale + b * plane, planar);
        });
    }
    parallel_for(threads, q.batch, [&](int64_t b, int) {
        float* from = f_hat + b * image;
        const float* x = target + b * image;
        for (int64_t i = 0; i < image; ++i) from[i] += x[i] - x[i];  // NaN for features that are not finite
        kernel.store(from, q.side * room, room, q.channels, q.side, q.side, p.f_hat + b * plane, planar);
    });
}

void residual_quantize_backward(const ResidualQuantizeBackwardParams& p) {
    const QuantizerShape& q = p.shape;
    for (int64_t i = 0; i < q.batch * q.tokens; ++i) {
        if (p.tokens[i] < 0 || p.tokens[i] >= q.codes) {
            contract_error("residual_quantize_backward", "tokens must lie in 0 .. " +
                                                             std::to_string(q.codes - 1) + ", got " +
                                                             std::to_string(p.tokens[i]));
        }
    }
    const int64_t matrix = q.channels * q.channels * 9;
    std::fill_n(p.grad_codebook, q.codes * q.channels, 0.0f);
    std::fill_n(p.grad_weight, p.convolutions * matrix, 0.0f);
    std::fill_n(p.grad_bias, p.convolutions * q.channels, 0.0f);
    if (q.batch == 0) return;
    const PhiShape shape = phi_shape(q.batch, q.channels, q.side, q.side);
    const int64_t room = shape.room(), plane = q.channels * q.side * q.side, all = q.batch * plane;
    const Buffer<float> grad = allocate<float>(all), codes = allocate<float>(q.batch * shape.image()),
                        grad_codes = allocate<float>(q.batch * shape.image());
    std::fill_n(grad.get(), all, 0.0f);
    std::fill_n(codes.get(), q.batch * shape.image(), 0.0f);

    int64_t left = q.tokens;
    for (int64_t k = static_cast<int64_t>(q.patch_nums.size()) - 1; k >= 0; --k) {
        const int64_t side = q.patch_nums[k], count = side * side;
        left -= count;
        // What scale k adds is in f_hat after it and after all finer ones.
        parallel_for(thread_count(q.batch, plane), q.batch, [&](int64_t b, int) {
            const float* from = p.grad_scales + k * all + b * plane;
            float* to = grad.get() + b * plane;
            for (int64_t i = 0; i < plane; ++i) to[i] += from[i];
        });
        gather(p.codebook, p.codebook_strides, p.tokens + left, q.tokens, count, shape, codes.get());

        PhiBackward step;
        step.shape = shape;
        step.grad = {grad.get(), {plane, q.side * q.side, q.side, 1}};
        step.codes = square(shape, side, codes.get());
        step.codes_height = step.codes_width = side;
        step.weight = p.weight + q.phi_index[k] * matrix;
        step.ratio = q.ratio;
        step.grad_codes = square(shape, side, grad_codes.get());
        step.grad_weight = p.grad_weight + q.phi_index[k] * matrix;
        step.grad_bias = p.grad_bias + q.phi_index[k] * q.channels;
        phi_backward(step);
        for (int64_t b = 0; b < q.batch; ++b) {  // on one thread: the order of a code's sum is fixed
            for (int64_t i = 0; i < count; ++i) {
                const float* from = grad_codes.get() + (b * count + i) * room;
                float* to = p.grad_codebook + p.tokens[b * q.tokens + left + i] * q.channels;
                for (int64_t c = 0; c < q.channels; ++c) to[c] += from[c];
            }
        }
    }
}

}  // namespace var_ext::cpu
