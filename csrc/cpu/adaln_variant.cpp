// The body of adaln, compiled once for each variant. A row is read from memory by the first loop over it and
// from the cache by the next: the mean comes first and then the squares of what is left, so that a large mean
// does not cost precision.
#include <type_traits>

#include "cpu/adaln.h"
#include "cpu/rows.h"

namespace {

using var_ext::AdalnBackwardParams;
using var_ext::AdalnParams;
using var_ext::ConstRows;
using var_ext::cpu::AdalnChunk;

constexpr int most_rows = 2;  // at a time: they share what is read of scale, shift and gate

template <class S, class Tensor>
inline auto row_of(const Tensor& tensor, int64_t b, int64_t l = 0) {
    using To = std::conditional_t<std::is_same<Tensor, ConstRows>::value, const S, S>;
    return static_cast<To*>(tensor.data) + b * tensor.b + l * tensor.l;
}

// The vectors of a sample in fp32, and room for rows of h.
template <class S>
struct AdalnScratch {
    float *weight, *shift, *gate, *rows;  // weight: 1 + scale
    int64_t width;

    AdalnScratch(int64_t channels, const AdalnChunk& chunk, const ConstRows& scale, const ConstRows& shift_,
                 const ConstRows& gate_)
        : width(padded(channels)) {
        weight = chunk.scratch;
        shift = weight + width;
        gate = shift + width;
        rows = gate + width;
        widen(row_of<S>(scale, chunk.b), channels, 1.0f, weight);
        if (shift_.data) widen(row_of<S>(shift_, chunk.b), channels, 0.0f, shift);
        if (gate_.data) widen(row_of<S>(gate_, chunk.b), channels, 0.0f, gate);
    }
};

// R rows from row l on.
template <class S, int R, bool Residual, bool Stream>
inline void adaln_rows(const AdalnParams p, const AdalnScratch<S> scratch, int64_t b, int64_t l) {
    const int64_t c = p.channels;
    const S* x = row_of<S>(p.x, b, l);
    S* y = row_of<S>(p.y, b, l);
    const S* branch = nullptr;
    S* h = nullptr;
    if constexpr (Residual) {
        branch = row_of<S>(p.branch, b, l);
        h = row_of<S>(p.h, b, l);
    }
    // h in fp32: no copy where it stands in the cache anyway
    const float* source = scratch.rows;
    int64_t source_row = scratch.width;
    constexpr bool copied = !std::is_same<S, float>::value || (Residual && Stream);
    if constexpr (!copied) {
        source = Residual ? h : x;
        source_row = Residual ? p.h.l : p.x.l;
    }

    V sum[R] = {};
    for_vectors(c, [&](int64_t i, auto part) {
        for (int r = 0; r < R; ++r) {
            V value = load_as<V>(x + r * p.x.l + i, part);
            if constexpr (Residual) {
                value += load<V>(scratch.gate + i) * load_as<V>(branch + r * p.branch.l + i, part);
                put<Stream>(h + r * p.h.l + i, value, part);
            }
            if constexpr (copied) store(scratch.rows + r * scratch.width + i, value);
            sum[r] += value;
        }
    });
    float mean[R], factor[R];
    for (int r = 0; r < R; ++r) mean[r] = reduce_add(sum[r]) / static_cast<float>(c);
    V square[R] = {};
    for_vectors(c, [&](int64_t i, auto part) {
        for (int r = 0; r < R; ++r) {
            const V centred = only(load_as<V>(source + r * source_row + i, part) - mean[r], part);
            square[r] += centred * centred;
        }
    });
    for (int r = 0; r < R; ++r) {
        factor[r] = 1 / __builtin_sqrtf(reduce_add(square[r]) / static_cast<float>(c) + p.eps);
    }
    for_vectors(c, [&](int64_t i, auto part) {
        const V weight = load<V>(scratch.weight + i), shift = load<V>(scratch.shift + i);
        for (int r = 0; r < R; ++r) {
            const V normed = (load_as<V>(source + r * source_row + i, part) - mean[r]) * factor[r];
            put<Stream>(y + r * p.y.l + i, normed * weight + shift, part);
        }
    });
}

template <class S, bool Residual, bool Stream>
void adaln_chunk(const AdalnParams& p, const AdalnChunk& chunk) {
    const AdalnScratch<S> scratch(p.channels, chunk, p.scale, p.shift, p.gate);
    int64_t l = chunk.begin;
    for (; l + most_rows <= chunk.end; l += most_rows) {
        adaln_rows<S, most_rows, Residual, Stream>(p, scratch, chunk.b, l);
    }
    for (; l < chunk.end; ++l) adaln_rows<S, 1, Residual, Stream>(p, scratch, chunk.b, l);
    stream_end<Stream>();
}

template <class S, int R, bool Residual, bool Stream>
inline void adaln_backward_rows(const AdalnBackwardParams p, const AdalnScratch<S> scratch, int64_t b,
                                int64_t l, float* sums) {
    const int64_t c = p.channels;
    const S *x = row_of<S>(p.x, b, l), *grad_y = row_of<S>(p.grad_y, b, l);
    S* grad_x = row_of<S>(p.grad_x, b, l);
    const S *branch = nullptr, *grad_h = nullptr;
    S* grad_branch = nullptr;
    if constexpr (Residual) {
        branch = row_of<S>(p.branch, b, l);
        grad_h = row_of<S>(p.grad_h, b, l);
        grad_branch = row_of<S>(p.grad_branch, b, l);
    }
    const float* source = scratch.rows;
    int64_t source_row = scratch.width;
    constexpr bool copied = Residual || !std::is_same<S, float>::value;
    if constexpr (!copied) {
        source = x;
        source_row = p.x.l;
    }

    V sum[R] = {};
    for_vectors(c, [&](int64_t i, auto part) {
        for (int r = 0; r < R; ++r) {
            V value = load_as<V>(x + r * p.x.l + i, part);
            if constexpr (Residual) {
                value += load<V>(scratch.gate + i) * load_as<V>(branch + r * p.branch.l + i, part);
            }
            if constexpr (copied) store(scratch.rows + r * scratch.width + i, value);
            sum[r] += value;
        }
    });
    float mean[R];
    for (int r = 0; r < R; ++r) mean[r] = reduce_add(sum[r]) / static_cast<float>(c);

    V square[R] = {}, total[R] = {}, dot[R] = {};  // of the centred h, of g, of their products
    for_vectors(c, [&](int64_t i, auto part) {
        const V weight = load<V>(scratch.weight + i);
        for (int r = 0; r < R; ++r) {
            const V centred = only(load_as<V>(source + r * source_row + i, part) - mean[r], part);
            const V g = load_as<V>(grad_y + r * p.grad_y.l + i, part) * weight;
            square[r] += centred * centred;
            total[r] += g;
            dot[r] += g * centred;
        }
    });
    float factor[R], from_mean[R], from_std[R];
    for (int r = 0; r < R; ++r) {
        factor[r] = 1 / __builtin_sqrtf(reduce_add(square[r]) / static_cast<float>(c) + p.eps);
        from_mean[r] = reduce_add(total[r]) / static_cast<float>(c);
        from_std[r] = reduce_add(dot[r]) / static_cast<float>(c) * factor[r];
    }

    float *grad_scale = sums, *grad_shift = sums + scratch.width, *grad_gate = grad_shift + scratch.width;
    for_vectors(c, [&](int64_t i, auto part) {
        const V weight = load<V>(scratch.weight + i);
        V scale_sum = load<V>(grad_scale + i), shift_sum = load<V>(grad_shift + i), gate_sum, gate;
        if constexpr (Residual) {
            gate = load<V>(scratch.gate + i);
            gate_sum = load<V>(grad_gate + i);
        }
        for (int r = 0; r < R; ++r) {
            const V normed = (load_as<V>(source + r * source_row + i, part) - mean[r]) * factor[r];
            const V grad = load_as<V>(grad_y + r * p.grad_y.l + i, part);
            scale_sum += grad * normed;
            shift_sum += grad;
            V back = (grad * weight - from_mean[r] - normed * from_std[r]) * factor[r];
            if constexpr (Residual) {
                back += load_as<V>(grad_h + r * p.grad_h.l + i, part);
                gate_sum += back * load_as<V>(branch + r * p.branch.l + i, part);
                put<Stream>(grad_branch + r * p.grad_branch.l + i, back * gate, part);
            }
            put<Stream>(grad_x + r * p.grad_x.l + i, back, part);
        }
        store(grad_scale + i, scale_sum);
        store(grad_shift + i, shift_sum);
        if constexpr (Residual) store(grad_gate + i, gate_sum);
    });
}

template <class S, bool Residual, bool Stream>
void adaln_backward_chunk(const AdalnBackwardParams& p, const AdalnChunk& chunk, float* sums) {
    const AdalnScratch<S> scratch(p.channels, chunk, p.scale, {}, p.gate);
    for (int64_t i = 0; i < 3 * scratch.width; ++i) sums[i] = 0;
    int64_t l = chunk.begin;
    for (; l + most_rows <= chunk.end; l += most_rows) {
        adaln_backward_rows<S, most_rows, Residual, Stream>(p, scratch, chunk.b, l, sums);
    }
    for (; l < chunk.end; ++l) adaln_backward_rows<S, 1, Residual, Stream>(p, scratch, chunk.b, l, sums);
    stream_end<Stream>();
}

template <class S>
void adaln_add_chunks(const AdalnBackwardParams& p, int64_t b, const float* sums, int64_t chunks) {
    const int64_t c = p.channels, width = padded(c);
    add_rows(sums, chunks, 3 * width, c, row_of<S>(p.grad_scale, b));
    add_rows(sums + width, chunks, 3 * width, c, row_of<S>(p.grad_shift, b));
    if (p.gate.data) add_rows(sums + 2 * width, chunks, 3 * width, c, row_of<S>(p.grad_gate, b));
}

// Calls body(element of the dtype's type, residual or not, streaming or not), both as types.
template <class Params, class Body>
inline void with_case(const Params& p, const AdalnChunk& chunk, const Body& body) {
    with_type(p.dtype, [&](auto element) {
        using Yes = std::true_type;
        using No = std::false_type;
        if (chunk.stream) return p.branch.data ? body(element, Yes{}, Yes{}) : body(element, No{}, Yes{});
        return p.branch.data ? body(element, Yes{}, No{}) : body(element, No{}, No{});
    });
}

void adaln_any(const AdalnParams& p, const AdalnChunk& chunk) {
    with_case(p, chunk, [&](auto element, auto residual, auto stream) {
        adaln_chunk<decltype(element), residual, stream>(p, chunk);
    });
}

void adaln_backward_any(const AdalnBackwardParams& p, const AdalnChunk& chunk, float* sums) {
    with_case(p, chunk, [&](auto element, auto residual, auto stream) {
        adaln_backward_chunk<decltype(element), residual, stream>(p, chunk, sums);
    });
}

void adaln_add_any(const AdalnBackwardParams& p, int64_t b, const float* sums, int64_t chunks) {
    with_type(p.dtype, [&](auto element) { adaln_add_chunks<decltype(element)>(p, b, sums, chunks); });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(AdalnKernel, adaln) = {padded, 3 + most_rows, adaln_any, adaln_backward_any,
                                              adaln_add_any};

}  // namespace var_ext::cpu
