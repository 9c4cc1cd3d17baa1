// Shared by the adaln kernels: row addresses, and which rows a block takes.
#pragma once

#include "cuda/rows.cuh"
#include "ops/adaln.h"

namespace var_ext::cuda {

// Channels of a row that a block can hold, 16 bytes a thread.
constexpr int64_t adaln_most_channels = 2560;
template <class T>
constexpr unsigned adaln_most_threads = adaln_most_channels / per_lane<T>;
constexpr unsigned adaln_any_threads = 256;  // at most
constexpr unsigned adaln_sums = 64;          // floats in shared memory for two sums over a block

template <class T>
__device__ const T* row_of(const ConstRows& rows, int64_t b, int64_t l = 0) {
    return static_cast<const T*>(rows.data) + b * rows.b + l * rows.l;
}
template <class T>
__device__ T* row_of(const Rows& rows, int64_t b, int64_t l = 0) {
    return static_cast<T*>(rows.data) + b * rows.b + l * rows.l;
}

// 16 bytes of a row, or zeros where a thread has none.
template <class T>
__device__ uint4 load_row(const ConstRows& rows, int64_t b, int64_t l, int64_t channel, bool here) {
    return here ? ptx::load_16(row_of<T>(rows, b, l) + channel) : uint4{};
}

// h = x + gate * branch, or x.
template <class T, bool residual>
__device__ void add_branch(float (&h)[per_lane<T>], uint4 branch_bits, uint4 gate_bits) {
    if constexpr (residual) {
        float branch[per_lane<T>], gate[per_lane<T>];
        widen_16<T>(branch_bits, branch);
        widen_16<T>(gate_bits, gate);
        for (int i = 0; i < per_lane<T>; ++i) h[i] += gate[i] * branch[i];
    }
}
template <class T, bool residual, class Params>
__device__ float h_of(const Params& p, int64_t b, int64_t l, int64_t c) {
    const float x = widen(row_of<T>(p.x, b, l)[c]);
    if constexpr (!residual) return x;
    return x + widen(row_of<T>(p.gate, b)[c]) * widen(row_of<T>(p.branch, b, l)[c]);
}

// Of backward: chunk `partial` of a sample's rows.
__device__ inline int64_t chunk_begin(const AdalnBackwardParams& p, int64_t partial) {
    return p.length * partial / p.partials;
}

}  // namespace var_ext::cuda
