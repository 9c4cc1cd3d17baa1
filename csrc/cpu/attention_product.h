// The matrix product behind attention: blocks of sums stay in registers over the whole summed axis.
#pragma once

#include "cpu/attention_operands.h"

namespace {

#if defined(__AVX512F__)
constexpr int vectors_at_once = 4;  // of 32 registers 24 hold sums
constexpr int rows_at_once[] = {0, 12, 12, 8, 6};
#else
constexpr int vectors_at_once = 2;  // of 16 registers 12 hold sums
constexpr int rows_at_once[] = {0, 6, 6};
#endif

enum class Side {
    rows,     // a(row, step) = a[row * a_stride + step]
    columns,  // a(row, step) = a[step * a_stride + row]
};

// Rows that will be packed after the product: fetched bit by bit, one for each row of it.
struct Ahead {
    const char* first = nullptr;
    int64_t stride = 0, rows = 0, bytes = 0;  // in bytes
};

// c(row, lane) = start + sum over steps of a(row, step) b(step, lane)
template <class Kind>
struct Product {
    int64_t rows, width, steps;  // width: a multiple of the lanes
    const typename Kind::Element* a;
    int64_t a_stride;
    const typename Kind::Element* b;
    int64_t b_stride;
    float* c;
    int64_t c_stride;
    bool add;             // start with c(row, lane) * factor(lane), not with 0
    const float* factor;  // null: 1
    Ahead ahead = {};
};

template <class Kind, Side side, int Rows, int Vectors>
inline __attribute__((always_inline)) void multiply_block(const Product<Kind>& p, int64_t row, int64_t lane) {
    using Operand = typename Kind::Operand;
    if (lane == 0) {
        for (int64_t i = row; i < row + Rows && i < p.ahead.rows; ++i) {
            const char* const from = p.ahead.first + i * p.ahead.stride;
            for (int64_t byte = 0; byte < p.ahead.bytes; byte += 64) __builtin_prefetch(from + byte);
        }
    }
    F sum[Rows][Vectors];
    float* c = p.c + row * p.c_stride + lane;
    if (p.add) {
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j) sum[i][j] = load<F>(c + i * p.c_stride + j * lanes);
        }
        if (p.factor != nullptr) {
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j) {
                const F factor = load<F>(p.factor + lane + j * lanes);
#pragma GCC unroll 16
                for (int i = 0; i < Rows; ++i) sum[i][j] *= factor;
            }
        }
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j) sum[i][j] = F{};
        }
    }
    const int64_t stride = p.a_stride, b_stride = p.b_stride;
    const typename Kind::Element *a = p.a + (side == Side::rows ? row * stride : row), *b = p.b + lane;
    for (int64_t step = p.steps; step > 0; --step) {
        Operand right[Vectors];
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) right[j] = load<Operand>(b + j * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
            const Operand left =
                a[side == Side::rows ? i * stride : i] - Operand{};  // + would turn -0 into 0
#pragma GCC unroll 4
            for (int j = 0; j < Vectors; ++j) sum[i][j] = Kind::multiply_add(sum[i][j], left, right[j]);
        }
        a += side == Side::rows ? 1 : stride;
        b += b_stride;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) store(c + i * p.c_stride + j * lanes, sum[i][j]);
    }
}

template <class Kind, Side side, int Vectors>
void multiply_strip(const Product<Kind>& p, int64_t lane) {
    constexpr int most = rows_at_once[Vectors];
    int64_t row = 0;
    for (; row + most <= p.rows; row += most) multiply_block<Kind, side, most, Vectors>(p, row, lane);
    if constexpr (most > 8) {
        for (; row + 8 <= p.rows; row += 8) multiply_block<Kind, side, 8, Vectors>(p, row, lane);
    }
    for (; row + 4 <= p.rows; row += 4) multiply_block<Kind, side, 4, Vectors>(p, row, lane);
    for (; row + 2 <= p.rows; row += 2) multiply_block<Kind, side, 2, Vectors>(p, row, lane);
    if (row < p.rows) multiply_block<Kind, side, 1, Vectors>(p, row, lane);
}

template <class Kind, Side side>
void multiply(const Product<Kind>& p) {
    constexpr int64_t most = vectors_at_once * lanes;
    int64_t lane = 0;
    for (; lane + most <= p.width; lane += most) multiply_strip<Kind, side, vectors_at_once>(p, lane);
    const int64_t rest = (p.width - lane) / lanes;
    if constexpr (vectors_at_once > 2) {
        if (rest == 3) multiply_strip<Kind, side, 3>(p, lane);
        if (rest == 2) multiply_strip<Kind, side, 2>(p, lane);
    }
    if (rest == 1) multiply_strip<Kind, side, 1>(p, lane);
}

}  // namespace
