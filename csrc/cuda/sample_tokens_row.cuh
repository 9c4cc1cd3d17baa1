// A row of logits in sample_tokens: loads, the order of floats as integers, weights.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "ops/sample_tokens.h"

namespace var_ext::cuda {

constexpr unsigned sample_held = 16;  // elements of a row that a thread holds
template <class T>
constexpr unsigned sample_group = 16 / sizeof(T);  // neighbours that a thread loads at once

// The order of floats as that of integers; both zeros are one, NaN is above all. 0 is no float's key.
__device__ inline uint32_t key_of(float x) {
    if (x != x) return 0xffffffff;
    const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000;
}
__device__ inline float float_of(uint32_t key) {
    return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffff : ~key);
}

// The weight of ops/sample_tokens.h, operation by operation as in cpu/sample_tokens_variant.cpp.
__device__ inline uint32_t sample_weight(float x) {
    const float bounded = x < -24.0f ? -24.0f : x;
    const float shifted = __fadd_rn(__fmul_rn(bounded, 1.44269504f), 12582912.0f);
    const float k = __fadd_rn(shifted, -12582912.0f);
    const float r = __fadd_rn(__fadd_rn(bounded, -__fmul_rn(k, 0.693359375f)), __fmul_rn(k, 2.12194440e-4f));
    float p = __fadd_rn(__fmul_rn(r, 1.9875691500e-4f), 1.3981999507e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
    p = __fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), __fadd_rn(r, 1.0f));
    const float scale =
        __uint_as_float((__float_as_uint(shifted) + 127u + 30u - 0x4b400000u) << 23);  // 2^(k + 30)
    return static_cast<uint32_t>(static_cast<int>(__fadd_rn(__fmul_rn(p, scale), 0.5f)));
}

// Items of a row, in two stages: first keys of the logits, then weights. A thread has groups of neighbours:
// group g begins at (g * blockDim.x + threadIdx.x) * sample_group. Behind the row items are 0.
template <class T, bool held>
class SampleRow {
  public:
    static constexpr unsigned group = sample_group<T>;

    __device__ SampleRow(const SampleTokensParams& p, const SampleSettings& settings, uint32_t image,
                         uint32_t position)
        : size_(static_cast<uint32_t>(p.v)),
          stride_(p.logits_stride_v),
          cond_factor_(settings.cond_factor),
          uncond_factor_(settings.uncond_factor) {
        cond_ = static_cast<const T*>(p.logits) + image * p.logits_stride_b + position * p.logits_stride_l;
        uncond_ = p.guided ? cond_ + p.b * p.logits_stride_b : nullptr;
        wide_ = (p.logits_stride_v == 1) && is_aligned(cond_) && (uncond_ == nullptr || is_aligned(uncond_));
        if constexpr (held) {
#pragma unroll
            for (unsigned g = 0; g < sample_held / group; ++g) load_keys(g, items_ + g * group);
        }
    }

    // Low bits that keys drop: without guidance those of 16-bit logits carry no information.
    __device__ unsigned shift() const {
        constexpr unsigned idle = sizeof(T) == 4 ? 0 : std::is_same_v<T, __nv_bfloat16> ? 16 : 13;
        return uncond_ == nullptr ? idle : 0;
    }
    __device__ uint32_t key(float x) const { return key_of(x) >> shift(); }
    __device__ float logit(uint32_t key) const {
        const uint32_t full = key << shift();
        return float_of(full >> 31 != 0 ? full : full | ((1u << shift()) - 1));
    }

    __device__ uint32_t groups() const {
        return held ? sample_held / group : (size_ + blockDim.x * group - 1) / (blockDim.x * group);
    }
    __device__ uint32_t begin_of(uint32_t g) const { return (g * blockDim.x + threadIdx.x) * group; }

    __device__ void load(uint32_t g, uint32_t (&to)[group]) const {
        if constexpr (held) {
#pragma unroll
            for (unsigned i = 0; i < sample_held; ++i) {
                if (i / group == g) to[i % group] = items_[i];
            }
        } else {
            load_keys(g, to);
            if (weighed_) {
                for (unsigned j = 0; j < group; ++j) to[j] = weight(to[j]);
            }
        }
    }

    template <class Body>
    __device__ void each(const Body& body) const {
        if constexpr (held) {
#pragma unroll
            for (unsigned i = 0; i < sample_held; ++i) body(items_[i]);
        } else {
#pragma unroll 1
            for (uint32_t g = 0; g < groups(); ++g) {
                uint32_t items[group];
                load(g, items);
                for (unsigned j = 0; j < group; ++j) body(items[j]);
            }
        }
    }

    // From keys to weights: 0 where the key is not above `low`.
    __device__ void weigh(uint32_t low, float largest) {
        low_ = low;
        largest_ = largest;
        weighed_ = true;
        if constexpr (held) {
#pragma unroll
            for (unsigned i = 0; i < sample_held; ++i) items_[i] = weight(items_[i]);
        }
    }

  private:
    __device__ static bool is_aligned(const T* row) { return reinterpret_cast<uintptr_t>(row) % 16 == 0; }

    __device__ uint32_t weight(uint32_t key) const {
        return key > low_ ? sample_weight(logit(key) - largest_) : 0;
    }

    __device__ void load_group(const T* row, uint32_t begin, float (&x)[group]) const {
        const bool whole = wide_ && begin + group <= size_;  // mask
        T values[group];
        if (whole) {
            const uint4 bits = ptx::load_16(row + begin);
            memcpy(values, &bits, sizeof(bits));
            for (unsigned j = 0; j < group; ++j) x[j] = widen(values[j]);
            return;
        }
        for (unsigned j = 0; j < group; ++j) {
            const bool inside = begin + j < size_;  // mask
            x[j] = inside ? widen(row[(begin + j) * stride_]) : 0.0f;
        }
    }

    __device__ void load_keys(uint32_t g, uint32_t* keys) const {
        const uint32_t begin = begin_of(g);
        float x[group];
        load_group(cond_, begin, x);
        if (uncond_ != nullptr) {
            float u[group];
            load_group(uncond_, begin, u);
            for (unsigned j = 0; j < group; ++j) {
                const float mixed =
                    __fadd_rn(__fmul_rn(x[j], cond_factor_), -__fmul_rn(u[j], uncond_factor_));
                x[j] = x[j] == -INFINITY ? x[j] : mixed;
            }
        }
        for (unsigned j = 0; j < group; ++j) {
            const bool inside = begin + j < size_;  // mask
            keys[j] = inside ? key(x[j]) : 0;
        }
    }

    const T *cond_, *uncond_;
    uint32_t size_, low_ = 0;
    int64_t stride_;
    float cond_factor_, uncond_factor_, largest_ = 0.0f;
    bool wide_, weighed_ = false;
    uint32_t items_[held ? sample_held : 1];
};

}  // namespace var_ext::cuda
