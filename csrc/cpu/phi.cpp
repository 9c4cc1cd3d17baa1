#include "cpu/phi.h"

#include <algorithm>

#include "common/cpu_features.h"
#include "common/parallel.h"
#include "cpu/frames.h"

namespace var_ext::cpu {

namespace {

// Rows of an image that one task takes: whole images if there are enough for all threads, and no more than
// fit the caches. What a pixel comes out as does not depend on it.
int64_t rows_of_a_task(const PhiShape& shape, int threads) {
    int64_t parts = shape.batch % threads == 0 ? 1 : (2 * threads + shape.batch - 1) / shape.batch;
    if (shape.batch < threads && threads % shape.batch == 0) parts = threads / shape.batch;
    parts = std::max(parts, shape.image() / (128 * 1024));
    return std::max<int64_t>((shape.height + parts - 1) / parts, std::min<int64_t>(shape.height, 2));
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

    const int threads = thread_count(shape.batch * shape.height, shape.row_cost());
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
        rows.target = nullptr;
        rows.residual = nullptr;
        if (step.target) {
            rows.target = step.target + b * shape.image();
            rows.residual = step.residual + b * shape.image();
        }
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

}  // namespace var_ext::cpu
