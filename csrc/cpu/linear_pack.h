// How the factors of linear are packed: in panels of a few rows or columns, one element of each after
// another.
#pragma once

#include <type_traits>

#include "cpu/linear.h"
#include "cpu/operands.h"

namespace {

// float32 arithmetic with factors of bfloat16, where there are no instructions for pairs of them.
struct RoundedFloats : Floats {};

inline __attribute__((always_inline)) F to_bfloat16(F x) {
    BFloat16 rounded[lanes];
    store_as(rounded, x);
    return load_as<F>(rounded);
}

template <class T>
inline __attribute__((always_inline)) F load_numbers(const T* p, int64_t count) {
    if (count >= lanes) return load_as<F>(p);
    T some[lanes] = {};
    if (count > 0) __builtin_memcpy(some, p, count * sizeof(T));
    return load_as<F>(some);
}

// A vector of elements of one row; zeros after `count` numbers.
template <class Kind, class T>
inline __attribute__((always_inline)) typename Kind::Operand elements_along(const T* p, int64_t count) {
    if constexpr (Kind::depth == 2 && std::is_same<T, float>::value) {
#if defined(__AVX512BF16__)
        const F low = load_numbers(p, count), high = load_numbers(p + lanes, count - lanes);
        return (U)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
    } else if constexpr (Kind::depth == 2) {
        return load_elements<Kind>(p, count);
    } else if constexpr (std::is_same<Kind, RoundedFloats>::value && std::is_same<T, float>::value) {
        return to_bfloat16(load_numbers(p, count));
    } else {
        return load_numbers(p, count);
    }
}

// An element of each of `count` columns, from the rows that lie `step` apart; `length` of them are left.
template <class Kind, class T>
inline __attribute__((always_inline)) typename Kind::Operand elements_across(const T* p, int64_t step,
                                                                             int64_t count, int64_t length) {
    const F first = load_numbers(p, count);
    if constexpr (Kind::depth == 2) {
#if defined(__AVX512BF16__)
        const F second = length > 1 ? load_numbers(p + step, count) : F{};
        if constexpr (std::is_same<T, float>::value) return pair(first, second);
        return (U)first >> 16 | (U)second;  // exact
#endif
    } else if constexpr (std::is_same<Kind, RoundedFloats>::value && std::is_same<T, float>::value) {
        return to_bfloat16(first);
    } else {
        return first;
    }
}

// Panels of `width` of `count` rows: to[panel * panel_size + element * width + row]. Vectors of elements may
// be wider than a panel: what they spill is written over by the next element.
template <class Kind, int width, class T>
void pack_panels(const T* from, const var_ext::cpu::LinearFactor& factor, int64_t count, int64_t length,
                 typename Kind::Element* to, int64_t panel_size) {
    const int64_t elements = elements_of<Kind>(length), apart = factor.apart, step = factor.step;
    if (step == 1) {
        for (int64_t first = 0; first < count; first += width, to += panel_size) {
            for (int64_t part = 0; part < width; part += lanes) {
                const int64_t most = width - part < lanes ? width - part : lanes, left = count - first - part;
                const int64_t rows = left < most ? left : most;
                const T* p = from + (first + part) * apart;
                for (int64_t e = 0; e < elements; e += lanes) {
                    typename Kind::Operand square[lanes];
                    for (int i = 0; i < lanes; ++i) {
                        square[i] = typename Kind::Operand{};
                        const int64_t number = e * Kind::depth;
                        if (i < rows)
                            square[i] = elements_along<Kind>(p + i * apart + number, length - number);
                    }
                    transpose<lanes / 2, lanes>(square);
                    for (int i = 0; i < lanes && e + i < elements; ++i) {
                        store(to + (e + i) * width + part, square[i]);
                    }
                }
            }
        }
        return;
    }
    // Rows may lie a page apart, which the processor does not see coming.
    constexpr int64_t ahead = 16;
    for (int64_t e = 0; e < elements; ++e, to += width) {
        const int64_t number = e * Kind::depth;
        for (int64_t row = number + ahead; row < number + ahead + Kind::depth && row < length; ++row) {
            const char* p = reinterpret_cast<const char*>(from + row * step);
            for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64)
                __builtin_prefetch(p + i);
        }
        typename Kind::Element* panel = to;
        for (int64_t first = 0; first < count; first += width, panel += panel_size) {
            for (int64_t part = first; part < first + width; part += lanes) {
                store(panel + part - first, elements_across<Kind>(from + number * step + part, step,
                                                                  count - part, length - number));
            }
        }
    }
}

// Of `count` rows from `first` on and one block of the summed axis.
template <class Kind, int width>
void pack_block(const var_ext::cpu::LinearProduct& p, const var_ext::cpu::LinearFactor& factor, int64_t first,
                int64_t count, int64_t block, float* to, int64_t panel_size) {
    const int64_t begin = block * p.block, left = p.length - begin, length = left < p.block ? left : p.block;
    const auto with = [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(factor.data);
        pack_panels<Kind, width>(from + first * factor.apart + begin * factor.step, factor, count, length,
                                 reinterpret_cast<typename Kind::Element*>(to), panel_size);
    };
    factor.dtype == var_ext::DType::bfloat16 ? with(BFloat16{}) : with(0.0f);
}

}  // namespace
