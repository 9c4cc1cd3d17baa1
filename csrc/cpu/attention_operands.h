// How tensors are packed for the products of attention. Rows of packed operands are padded with zeros to
// whole vectors.
#pragma once

#include "cpu/operands.h"
#include "ops/attention.h"

namespace {

// Rows of a head lie a few KB apart, too far for the processor to see a pattern: asked for before their turn.
template <class T>
inline __attribute__((always_inline)) void prefetch_row(const T* from, int64_t stride, int64_t row,
                                                        int64_t rows, int64_t dim) {
    constexpr int64_t ahead = 12;
    if (row + ahead >= rows) return;
    const char* p = reinterpret_cast<const char*>(from + ahead * stride);
    for (int64_t i = 0; i < dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(p + i);
}

// (rows, D) as it is, elements along D: to[row * whole_vectors(elements) + element].
template <class Kind, class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, typename Kind::Element* to) {
    for (int64_t row = 0; row < rows; ++row, from += stride) {
        prefetch_row(from, stride, row, rows, dim);
        for (int64_t d = 0; d < dim; d += lanes * Kind::depth, to += lanes) {
            store(to, load_elements<Kind>(from + d, dim - d));
        }
    }
}

// (rows, D), elements along the rows: to[row element * whole_vectors(D) + d].
template <class Kind, class T>
void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t dim, typename Kind::Element* to) {
    if constexpr (Kind::depth == 1) {
        pack_rows<Kind>(from, stride, rows, dim, to);
    } else {
        using Half = Vec<uint16_t, lanes>;
        for (int64_t row = 0; row < rows; row += 2, from += 2 * stride) {
            prefetch_row(from, stride, row, rows, dim);
            prefetch_row(from + stride, stride, row + 1, rows, dim);
            for (int64_t d = 0; d < dim; d += lanes, to += lanes) {
                Half two[2] = {};
                const int64_t bytes = (dim - d < lanes ? dim - d : lanes) * 2;
                for (int64_t i = 0; i < 2 && row + i < rows; ++i) {
                    if (bytes == 2 * lanes) {
                        two[i] = load<Half>(from + i * stride + d);
                    } else {
                        __builtin_memcpy(&two[i], from + i * stride + d, bytes);
                    }
                }
                store(to, __builtin_convertvector(two[0], U) | __builtin_convertvector(two[1], U) << 16);
            }
        }
    }
}

// (rows, D) transposed, elements along D: to[element * width + row], width = whole_vectors(rows).
template <class Kind, class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t dim, typename Kind::Element* to) {
    const int64_t width = whole_vectors(rows), elements = elements_of<Kind>(dim);
    for (int64_t row = 0; row < rows; row += lanes, from += lanes * stride) {
        for (int64_t e = 0; e < elements; e += lanes) {
            typename Kind::Operand square[lanes];
            for (int i = 0; i < lanes; ++i) {
                square[i] = typename Kind::Operand{};
                if (row + i < rows) {
                    square[i] =
                        load_elements<Kind>(from + i * stride + e * Kind::depth, dim - e * Kind::depth);
                }
            }
            transpose<lanes / 2, lanes>(square);
            for (int i = 0; i < lanes && e + i < elements; ++i) store(to + (e + i) * width + row, square[i]);
        }
    }
}

template <class Kind>
void negate(typename Kind::Element* elements, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes) {
        store(elements + i, load<U>(elements + i) ^ (Kind::depth == 2 ? 0x80008000u : 0x80000000u));
    }
}

// The way back: from (D, width) to (rows, D), each row times its factor.
template <class T>
void unpack_transposed(const float* from, const float* factors, int64_t rows, int64_t dim, T* to,
                       int64_t stride) {
    const int64_t width = whole_vectors(rows);
    for (int64_t row = 0; row < rows; row += lanes) {
        const F factor = load<F>(factors + row);
        for (int64_t d = 0; d < dim; d += lanes) {
            F square[lanes];
            for (int i = 0; i < lanes; ++i) {
                square[i] = d + i < dim ? load<F>(from + (d + i) * width + row) * factor : F{};
            }
            transpose<lanes / 2, lanes>(square);
            for (int i = 0; i < lanes && row + i < rows; ++i) {
                store_numbers(to + (row + i) * stride + d, square[i], dim - d);
            }
        }
    }
}

template <class T>
void unpack_rows(const float* from, float factor, int64_t rows, int64_t dim, T* to, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row, to += stride) {
        for (int64_t d = 0; d < dim; d += lanes, from += lanes) {
            store_numbers(to + d, load<F>(from) * factor, dim - d);
        }
    }
}

template <class T>
inline T* head_of(const var_ext::AttentionHeads& heads, int64_t b, int64_t h) {
    return static_cast<T*>(heads.data) + b * heads.stride_b + h * heads.stride_h;
}

}  // namespace
