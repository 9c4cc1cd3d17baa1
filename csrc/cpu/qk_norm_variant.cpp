// The body of qk_norm, compiled once for each variant. As many heads as a vector has lanes are taken
// together: their sums of squares become one vector in a few shuffles, and one square root and one division
// serve all.
#include "cpu/qk_norm.h"
#include "cpu/rows.h"

namespace {

using var_ext::ConstHeads;
using var_ext::Heads;
using var_ext::QkNormBackwardParams;
using var_ext::QkNormParams;
using var_ext::cpu::QkNormChunk;

constexpr float shortest = 1e-12f;                 // the floor that torch's normalize has
constexpr float max_log_scale = 4.60517018598809;  // log 100

// The channels of a head: a number that the compiler knows, or any.
template <int D>
struct Channels {
    static constexpr int64_t value = D;
};
template <>
struct Channels<0> {
    int64_t value;
};

// One of q, k and v of one token: (H, D).
template <class S>
struct TokenHeads {
    S* first;
    int64_t h;
    S* operator[](int64_t head) const { return first + head * h; }
};
template <class S>
inline TokenHeads<const S> token(const ConstHeads& heads, int64_t b, int64_t l) {
    return {static_cast<const S*>(heads.data) + b * heads.b + l * heads.l, heads.h};
}
template <class S>
inline TokenHeads<S> token(const Heads& heads, int64_t b, int64_t l) {
    return {static_cast<S*>(heads.data) + b * heads.b + l * heads.l, heads.h};
}

inline V root(V v) {
    float values[lanes];
    store(values, v);
    for (int i = 0; i < lanes; ++i) values[i] = __builtin_sqrtf(values[i]);
    return load<V>(values);
}

// exp(min(log_scale, log 100)) of each head. As everywhere here, lanes without a head get any number.
template <class S>
inline void qk_norm_scales(const void* log_scale, int64_t stride, int64_t heads, float* scale) {
    for (int64_t h = 0; h < heads; ++h) {
        widen(static_cast<const S*>(log_scale) + h * stride, 1, 0.0f, scale + h);  // and zeros behind it
        scale[h] = __builtin_expf(scale[h] > max_log_scale ? max_log_scale : scale[h]);
    }
}

inline int64_t qk_norm_scratch_size(int64_t heads, int64_t channels) {  // two biases; scales and their zeros
    return 2 * heads * padded(channels) + 2 * padded(heads);
}

inline int64_t qk_norm_sums_size(int64_t heads, int64_t channels) {
    return 2 * heads * padded(channels) + padded(heads);
}

template <class S>
inline void widen_heads(const ConstHeads& heads, int64_t count, int64_t channels, float* to) {
    for (int64_t h = 0; h < count; ++h) {
        widen(static_cast<const S*>(heads.data) + h * heads.h, channels, 0.0f, to + h * padded(channels));
    }
}

// out = heads + bias.
template <bool Bias, bool Stream, class S, class D>
inline void qk_norm_add(D d, int64_t heads, TokenHeads<const S> in, const float* bias, TokenHeads<S> out) {
    for (int64_t h = 0; h < heads; ++h) {
        for_vectors(d.value, [&](int64_t i, auto part) {
            V u = load_as<V>(in[h] + i, part);
            if constexpr (Bias) u += load<V>(bias + h * padded(d.value) + i);
            put<Stream>(out[h] + i, u, part);
        });
    }
}

// out = (heads + bias) / norm * scale.
template <bool Query, bool Stream, class S, class D>
inline void qk_norm_normalize(D d, int64_t heads, TokenHeads<const S> in, const float* bias,
                              const float* scale, TokenHeads<S> out) {
    const int64_t width = padded(d.value);
    for (int64_t first = 0; first < heads; first += lanes) {
        const int64_t count = heads - first < lanes ? heads - first : lanes;
        V squares[lanes];
        for (int64_t j = 0; j < count; ++j) {
            V sum{};
            for_vectors(d.value, [&](int64_t i, auto part) {
                V u = load_as<V>(in[first + j] + i, part);
                if constexpr (Query) u += load<V>(bias + (first + j) * width + i);
                sum += u * u;
            });
            squares[j] = sum;
        }
        for (int64_t j = count; j < lanes; ++j) squares[j] = V{};
        const V norm = root(reduce_add_each<lanes>(squares));
        const V one = V{} + 1.0f;
        float factor[lanes];
        store(factor, (Query ? load<V>(scale + first) : one) / (norm < shortest ? V{} + shortest : norm));
        for (int64_t j = 0; j < count; ++j) {
            for_vectors(d.value, [&](int64_t i, auto part) {
                V u = load_as<V>(in[first + j] + i, part);
                if constexpr (Query) u += load<V>(bias + (first + j) * width + i);
                put<Stream>(out[first + j] + i, u * factor[j], part);
            });
        }
    }
}

template <bool Stream, class S, class D>
void qk_norm_chunk(const QkNormParams& p, const QkNormChunk& chunk, D d) {
    const int64_t heads = p.heads, width = heads * padded(d.value);
    float *q_bias = chunk.scratch, *v_bias = q_bias + width, *scale = v_bias + width;
    widen_heads<S>(p.q_bias, heads, d.value, q_bias);
    widen_heads<S>(p.v_bias, heads, d.value, v_bias);
    if (p.log_scale) qk_norm_scales<S>(p.log_scale, p.log_scale_stride, heads, scale);
    for (int64_t t = chunk.begin; t < chunk.end; ++t) {
        const int64_t b = t / p.length, l = t % p.length;
        const TokenHeads<const S> q = token<S>(p.qkv[0], b, l), k = token<S>(p.qkv[1], b, l);
        if (p.log_scale) {
            qk_norm_normalize<true, Stream>(d, heads, q, q_bias, scale, token<S>(p.out[0], b, l));
            qk_norm_normalize<false, Stream>(d, heads, k, nullptr, nullptr, token<S>(p.out[1], b, l));
        } else {
            qk_norm_add<true, Stream>(d, heads, q, q_bias, token<S>(p.out[0], b, l));
            qk_norm_add<false, Stream>(d, heads, k, nullptr, token<S>(p.out[1], b, l));
        }
        qk_norm_add<true, Stream>(d, heads, token<S>(p.qkv[2], b, l), v_bias, token<S>(p.out[2], b, l));
    }
    stream_end<Stream>();
}

// out = grad, and its sum over tokens where it is wanted.
template <bool Sum, bool Stream, class S, class D>
inline void qk_norm_pass(D d, int64_t heads, TokenHeads<const S> grad, TokenHeads<S> out, float* sums) {
    for (int64_t h = 0; h < heads; ++h) {
        for_vectors(d.value, [&](int64_t i, auto part) {
            const V g = load_as<V>(grad[h] + i, part);
            if constexpr (Sum) {
                float* sum = sums + h * padded(d.value) + i;
                store(sum, load<V>(sum) + g);
            }
            put<Stream>(out[h] + i, g, part);
        });
    }
}

// The backward of qk_norm_normalize; for q also the sums behind the gradients of bias and log_scale.
template <bool Query, bool Stream, class S, class D>
inline void qk_norm_unnormalize(D d, int64_t heads, TokenHeads<const S> grad, TokenHeads<const S> in,
                                const float* bias, const float* scale, TokenHeads<S> out, float* bias_sums,
                                float* scale_sums) {
    const int64_t width = padded(d.value);
    for (int64_t first = 0; first < heads; first += lanes) {
        const int64_t count = heads - first < lanes ? heads - first : lanes;
        V squares[lanes], dots[lanes];
        for (int64_t j = 0; j < count; ++j) {
            V square{}, dot{};
            for_vectors(d.value, [&](int64_t i, auto part) {
                V u = load_as<V>(in[first + j] + i, part);
                if constexpr (Query) u += load<V>(bias + (first + j) * width + i);
                square += u * u;
                dot += u * load_as<V>(grad[first + j] + i, part);
            });
            squares[j] = square;
            dots[j] = dot;
        }
        for (int64_t j = count; j < lanes; ++j) squares[j] = dots[j] = V{};
        const V length = root(reduce_add_each<lanes>(squares));
        const V norm = length < shortest ? V{} + shortest : length;
        const V one = V{} + 1.0f;
        const V factor = (Query ? load<V>(scale + first) : one) / norm;
        const V dot = reduce_add_each<lanes>(dots) * factor;  // grad . out
        if constexpr (Query) store(scale_sums + first, load<V>(scale_sums + first) + dot);
        float of_grad[lanes], of_in[lanes];
        store(of_grad, factor);
        store(of_in, length < shortest ? V{} : dot / (norm * norm));  // below the floor the norm is constant
        for (int64_t j = 0; j < count; ++j) {
            for_vectors(d.value, [&](int64_t i, auto part) {
                V u = load_as<V>(in[first + j] + i, part);
                if constexpr (Query) u += load<V>(bias + (first + j) * width + i);
                const V g = load_as<V>(grad[first + j] + i, part) * of_grad[j] - only(u, part) * of_in[j];
                if constexpr (Query) {
                    float* sum = bias_sums + (first + j) * width + i;
                    store(sum, load<V>(sum) + g);
                }
                put<Stream>(out[first + j] + i, g, part);
            });
        }
    }
}

template <bool Stream, class S, class D>
void qk_norm_backward_chunk(const QkNormBackwardParams& p, const QkNormChunk& chunk, D d, float* sums) {
    const int64_t heads = p.heads, width = heads * padded(d.value);
    float *q_bias = chunk.scratch, *scale = q_bias + width;
    float *q_sums = sums, *v_sums = q_sums + width, *scale_sums = v_sums + width;
    for (int64_t i = 0; i < qk_norm_sums_size(heads, d.value); ++i) sums[i] = 0;
    widen_heads<S>(p.q_bias, heads, d.value, q_bias);
    if (p.log_scale) qk_norm_scales<S>(p.log_scale, p.log_scale_stride, heads, scale);
    for (int64_t t = chunk.begin; t < chunk.end; ++t) {
        const int64_t b = t / p.length, l = t % p.length;
        const auto grad = [&](int i) { return token<S>(p.grad_out[i], b, l); };
        const auto in = [&](int i) { return token<S>(p.qkv[i], b, l); };
        const auto out = [&](int i) { return token<S>(p.grad_qkv[i], b, l); };
        if (p.log_scale) {
            qk_norm_unnormalize<true, Stream>(d, heads, grad(0), in(0), q_bias, scale, out(0), q_sums,
                                              scale_sums);
            qk_norm_unnormalize<false, Stream>(d, heads, grad(1), in(1), nullptr, nullptr, out(1), nullptr,
                                               nullptr);
        } else {
            qk_norm_pass<true, Stream>(d, heads, grad(0), out(0), q_sums);
            qk_norm_pass<false, Stream>(d, heads, grad(1), out(1), nullptr);
        }
        qk_norm_pass<true, Stream>(d, heads, grad(2), out(2), v_sums);
    }
    stream_end<Stream>();
}

template <class S>
void qk_norm_add_chunks(const QkNormBackwardParams& p, const float* sums, int64_t chunks) {
    const int64_t d = p.channels, width = padded(d), stride = qk_norm_sums_size(p.heads, d);
    for (int64_t h = 0; h < p.heads; ++h) {
        add_rows(sums + h * width, chunks, stride, d,
                 static_cast<S*>(p.grad_q_bias.data) + h * p.grad_q_bias.h);
        add_rows(sums + (p.heads + h) * width, chunks, stride, d,
                 static_cast<S*>(p.grad_v_bias.data) + h * p.grad_v_bias.h);
        if (!p.log_scale) continue;
        S* out = static_cast<S*>(p.grad_log_scale) + h * p.grad_log_scale_stride;
        float log_scale[lanes];
        widen(static_cast<const S*>(p.log_scale) + h * p.log_scale_stride, 1, 0.0f, log_scale);
        if (log_scale[0] > max_log_scale) {  // capped
            store_as(out, V{}, Part{1});
        } else {
            add_rows(sums + 2 * p.heads * width + h, chunks, stride, 1, out);
        }
    }
}

// Calls body(element of the dtype's type, channels, streaming or not), the last two as types.
template <class Params, class Body>
inline void with_case(const Params& p, const QkNormChunk& chunk, const Body& body) {
    with_type(p.dtype, [&](auto element) {
        using Yes = std::true_type;
        using No = std::false_type;
        if (p.channels != 64) return body(element, Channels<0>{p.channels}, No{});
        chunk.stream ? body(element, Channels<64>{}, Yes{}) : body(element, Channels<64>{}, No{});
    });
}

void qk_norm_any(const QkNormParams& p, const QkNormChunk& chunk) {
    with_case(p, chunk, [&](auto element, auto channels, auto stream) {
        qk_norm_chunk<stream, decltype(element)>(p, chunk, channels);
    });
}

void qk_norm_backward_any(const QkNormBackwardParams& p, const QkNormChunk& chunk, float* sums) {
    with_case(p, chunk, [&](auto element, auto channels, auto stream) {
        qk_norm_backward_chunk<stream, decltype(element)>(p, chunk, channels, sums);
    });
}

void qk_norm_add_any(const QkNormBackwardParams& p, const float* sums, int64_t chunks) {
    with_type(p.dtype, [&](auto element) { qk_norm_add_chunks<decltype(element)>(p, sums, chunks); });
}

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(QkNormKernel, qk_norm) = {qk_norm_scratch_size, qk_norm_sums_size, qk_norm_any,
                                                 qk_norm_backward_any, qk_norm_add_any};

}  // namespace var_ext::cpu
