#include "cpu/group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace var_ext::cpu {

namespace {

// weight and bias in float32, channels-last scratch: what both directions need.
struct Call {
    const GroupNormSiluParams& p;
    const GroupNormSiluKernel& kernel;
    int64_t padded, chunk_rows, chunks;
    int threads;
    Buffer<float> weight, bias, input_bias;  // input_bias: zeros where there is none

    Call(const GroupNormSiluParams& p_, int64_t steps)
        : p(p_), kernel(VAR_EXT_SELECT(group_norm_silu)), padded(padded_channels(p.channels)) {
        // Chunks depend on the shape only, so sums do not depend on the number of threads.
        constexpr int64_t least = 16 * 1024, most_chunks = 128;
        chunk_rows =
            std::max((least + p.channels - 1) / p.channels, (p.pixels + most_chunks - 1) / most_chunks);
        chunks = (p.pixels + chunk_rows - 1) / chunk_rows;
        threads = thread_count(p.batch * p.groups, steps * p.channels / p.groups * p.pixels);
        weight = allocate<float>(padded);
        bias = allocate<float>(padded);
        input_bias = allocate<float>(padded);
        std::fill_n(input_bias.get(), padded, 0.0f);
        prefer_huge_pages(p.out, p.batch * p.channels * p.pixels * dtype_size(p.dtype));
        kernel.widen(p.dtype, p.weight, p.weight_stride, p.channels, weight.get());
        kernel.widen(p.dtype, p.bias, p.bias_stride, p.channels, bias.get());
        if (p.input_bias) {
            kernel.widen(p.dtype, p.input_bias, p.input_bias_stride, p.channels, input_bias.get());
        }
    }

    // What the kernels of contiguous maps need.
    GroupNormSiluChannels of_channels() const {
        return {weight.get(), bias.get(), p.input_bias ? input_bias.get() : nullptr};
    }

    // Contiguous maps: calls body(begin, end) for ranges of groups that are worth a task.
    template <class Body>
    void over_groups(const Body& body) const {
        const int64_t groups = p.batch * p.groups, size = p.channels / p.groups * p.pixels;
        const int64_t together = std::max<int64_t>(1, 8 * 1024 / size);
        parallel_for(threads, (groups + together - 1) / together, [&](int64_t task, int) {
            body(task * together, std::min(groups, (task + 1) * together));
        });
    }

    // Channels-last maps: steps over chunks of pixels alternate with steps over whole images. An image takes
    // all its steps in turn while it is in the cache, if there are enough of them for all threads.
    using Step = std::function<void(int64_t image, int64_t chunk)>;
    void over_chunks(const std::vector<Step>& steps) const {
        if (p.batch >= 2 * threads) {
            parallel_for(threads, p.batch, [&](int64_t image, int) {
                for (size_t s = 0; s < steps.size(); ++s) {
                    for (int64_t chunk = 0; chunk < (s % 2 ? 1 : chunks); ++chunk) steps[s](image, chunk);
                }
            });
            return;
        }
        for (size_t s = 0; s < steps.size(); ++s) {
            const int64_t parts = s % 2 ? 1 : chunks;
            parallel_for(s % 2 ? 1 : threads, p.batch * parts,
                         [&](int64_t task, int) { steps[s](task / parts, task % parts); });
        }
    }
    int64_t first_row(int64_t chunk) const { return chunk * chunk_rows; }
    int64_t end_row(int64_t chunk) const { return std::min(p.pixels, (chunk + 1) * chunk_rows); }
};

// Channels-last scratch: coefficients and the shift of each image, and the sums of each chunk.
struct RowScratch {
    const Call& call;
    Buffer<float> all_coefficients, all_shifts, all_sums;

    explicit RowScratch(const Call& call_)
        : call(call_),
          all_coefficients(allocate<float>(call.p.batch * coefficients * call.padded)),
          all_shifts(allocate<float>(call.p.batch * call.padded)),
          all_sums(allocate<float>(call.p.batch * call.chunks * 2 * call.padded)) {}

    float* of(int64_t image) const { return all_coefficients.get() + image * coefficients * call.padded; }
    float* of(int64_t image, Coefficient which) const { return of(image) + which * call.padded; }
    float* shift(int64_t image) const { return all_shifts.get() + image * call.padded; }
    float* sums(int64_t image, int64_t chunk = 0) const {
        return all_sums.get() + (image * call.chunks + chunk) * 2 * call.padded;
    }

    // The sums of all chunks, in the place of the first ones.
    const float* total(int64_t image) const {
        float* total = sums(image);
        for (int64_t chunk = 1; chunk < call.chunks; ++chunk) {
            const float* part = sums(image, chunk);
            for (int64_t i = 0; i < 2 * call.padded; ++i) total[i] += part[i];
        }
        return total;
    }

    // Calls body(first channel, end) for each group.
    template <class Body>
    void each_group(const Body& body) const {
        const int64_t size = call.p.channels / call.p.groups;
        for (int64_t begin = 0; begin < call.p.channels; begin += size) body(begin, begin + size);
    }

    // Mean and rstd of each channel's group; the mean less what is added to the channel.
    void normalise(int64_t image) const {
        const float *sum = total(image), *squares = sum + call.padded, *shifts = shift(image);
        const double count = static_cast<double>(call.p.channels / call.p.groups * call.p.pixels);
        each_group([&](int64_t begin, int64_t end) {
            double s = 0, q = 0;
            for (int64_t c = begin; c < end; ++c) {
                s += sum[c];
                q += squares[c];
            }
            const double variance = (q - s * s / count) / count;
            const float r = static_cast<float>(1 / std::sqrt((variance < 0 ? 0 : variance) + call.p.eps));
            const float* add = call.input_bias.get();
            const float m = static_cast<float>((shifts[begin] + add[begin]) + s / count);
            for (int64_t c = begin; c < end; ++c) of(image, mean)[c] = m - add[c];
            std::fill(of(image, rstd) + begin, of(image, rstd) + end, r);
        });
        std::copy_n(call.weight.get(), call.p.channels, of(image, weight));
        std::copy_n(call.bias.get(), call.p.channels, of(image, bias));
    }

    Call::Step moments() const {
        return [this](int64_t image, int64_t chunk) {
            call.kernel.moments(call.p, image, call.first_row(chunk), call.end_row(chunk), shift(image),
                                sums(image, chunk));
        };
    }
};

}  // namespace

void group_norm_silu(const GroupNormSiluParams& p) {
    if (p.batch * p.channels * p.pixels == 0) return;
    const Call call(p, 2);
    const auto& kernel = call.kernel;
    if (!p.channels_last) {
        call.over_groups(
            [&](int64_t begin, int64_t end) { kernel.groups_forward(p, call.of_channels(), begin, end); });
        return;
    }
    const RowScratch scratch(call);
    for (int64_t image = 0; image < p.batch; ++image)
        kernel.shift(p, image, call.input_bias.get(), scratch.shift(image));
    const auto scale = [&](int64_t image, int64_t) {
        scratch.normalise(image);
        float *rstds = scratch.of(image, rstd), *weights = scratch.of(image, weight);
        for (int64_t c = 0; c < p.channels; ++c) rstds[c] *= weights[c];
    };
    const auto apply = [&](int64_t image, int64_t chunk) {
        chunk = call.chunks - 1 - chunk;  // the last chunk first: it is the one still in the cache
        kernel.forward(p, image, call.first_row(chunk), call.end_row(chunk), scratch.of(image));
    };
    call.over_chunks({scratch.moments(), scale, apply});
}

void group_norm_silu_backward(const GroupNormSiluParams& p) {
    const int64_t padded = padded_channels(p.channels);
    const Buffer<float> sums = allocate<float>(std::max<int64_t>(1, p.batch) * 2 * padded);  // (B, 2, padded)
    const auto& kernel = VAR_EXT_SELECT(group_norm_silu);
    if (p.batch * p.channels * p.pixels == 0) {
        std::fill_n(sums.get(), 2 * padded, 0.0f);
        kernel.narrow(p.dtype, sums.get(), p.channels, p.grad_weight);
        kernel.narrow(p.dtype, sums.get(), p.channels, p.grad_bias);
        return;
    }
    const Call call(p, 4);
    if (!p.channels_last) {
        call.over_groups([&](int64_t begin, int64_t end) {
            kernel.groups_backward(p, call.of_channels(), begin, end, sums.get());
        });
    } else {
        const RowScratch scratch(call);
        for (int64_t image = 0; image < p.batch; ++image)
            kernel.shift(p, image, call.input_bias.get(), scratch.shift(image));
        const auto normalise = [&](int64_t image, int64_t) { scratch.normalise(image); };
        const auto slopes = [&](int64_t image, int64_t chunk) {
            chunk = call.chunks - 1 - chunk;
            kernel.slopes(p, image, call.first_row(chunk), call.end_row(chunk), scratch.of(image),
                          scratch.sums(image, chunk));
        };
        const auto means = [&](int64_t image, int64_t) {
            const float* total = scratch.total(image);
            std::copy_n(total, 2 * padded, sums.get() + image * 2 * padded);
            const double count = static_cast<double>(p.channels / p.groups * p.pixels);
            scratch.each_group([&](int64_t begin, int64_t end) {
                double normed = 0, plain = 0;
                for (int64_t c = begin; c < end; ++c) {
                    normed += call.weight.get()[c] * total[c];
                    plain += call.weight.get()[c] * total[padded + c];
                }
                for (int64_t c = begin; c < end; ++c) {
                    scratch.of(image, slope_mean)[c] = static_cast<float>(plain / count);
                    scratch.of(image, slope_normed_mean)[c] = static_cast<float>(normed / count);
                }
            });
        };
        const auto apply = [&](int64_t image, int64_t chunk) {
            kernel.backward(p, image, call.first_row(chunk), call.end_row(chunk), scratch.of(image));
        };
        call.over_chunks({scratch.moments(), normalise, slopes, means, apply});
    }
    for (int64_t image = 1; image < p.batch; ++image) {
        for (int64_t i = 0; i < 2 * padded; ++i) sums.get()[i] += sums.get()[image * 2 * padded + i];
    }
    kernel.narrow(p.dtype, sums.get(), p.channels, p.grad_weight);
    kernel.narrow(p.dtype, sums.get() + padded, p.channels, p.grad_bias);
}

}  // namespace var_ext::cpu
