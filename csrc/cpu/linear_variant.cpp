// The body of linear, compiled once for each variant: packed factors, and tiles of sums that stay in
// registers.
#include <type_traits>

#include "cpu/linear_pack.h"

namespace {

using var_ext::DType;
using var_ext::cpu::LinearProduct;

constexpr int tile_vectors = 2;
#if defined(__AVX512F__)
constexpr int tile_rows = 12;  // of 32 registers 24 hold sums
#elif defined(__AVX2__)
constexpr int tile_rows = 6;  // of 16 registers 12 hold sums
#else
constexpr int tile_rows = 4;
#endif
constexpr int tile_columns = tile_vectors * lanes;
static_assert(tile_rows <= lanes, "a vector of elements covers a panel of rows");

#if defined(__AVX512BF16__)
using Pairs = BFloat16Pairs;
#else
using Pairs = RoundedFloats;
#endif

using Sums = F[tile_rows][tile_vectors];

// Elements of a sum in registers, which is then added to those before it: long sums of float32 lose digits.
// With factors of bfloat16 that does not show.
template <class Kind>
constexpr int64_t sum_length = std::is_same<Kind, Floats>::value ? 256 : 1024;

template <class Kind>
inline __attribute__((always_inline)) void multiply_panels(const float* left, const float* right,
                                                           int64_t elements, Sums& sums) {
    using Operand = typename Kind::Operand;
    const auto* a = reinterpret_cast<const typename Kind::Element*>(left);
    const auto* b = reinterpret_cast<const typename Kind::Element*>(right);
    for (int i = 0; i < tile_rows; ++i) {
        for (int j = 0; j < tile_vectors; ++j) sums[i][j] = F{};
    }
    for (int64_t begin = 0; begin < elements; begin += sum_length<Kind>) {
        Sums part;
#pragma GCC unroll 12
        for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < tile_vectors; ++j) part[i][j] = F{};
        }
        int64_t count = elements - begin < sum_length<Kind> ? elements - begin : sum_length<Kind>;
        for (; count > 0; --count, a += tile_rows, b += tile_columns) {
            Operand columns[tile_vectors];
#pragma GCC unroll 2
            for (int j = 0; j < tile_vectors; ++j) columns[j] = load<Operand>(b + j * lanes);
#pragma GCC unroll 12
            for (int i = 0; i < tile_rows; ++i) {
                const Operand row = a[i] - Operand{};  // + would turn -0 into 0
#pragma GCC unroll 2
                for (int j = 0; j < tile_vectors; ++j)
                    part[i][j] = Kind::multiply_add(part[i][j], row, columns[j]);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < tile_vectors; ++j) sums[i][j] += part[i][j];
        }
    }
}

// Adds what earlier blocks have left in `partial` and puts the sums there, or in `out` after the last block.
template <class T>
inline void put_sums(const LinearProduct& p, const Sums& sums, int64_t rows, int64_t block, int64_t column,
                     T* out, float* partial, int64_t partial_stride) {
    const bool last = block + 1 == p.blocks;
    for (int j = 0; j < tile_vectors; ++j, column += lanes) {
        const int64_t count = p.columns - column;
        if (count <= 0) return;
        F bias{};
        if (last && p.bias != nullptr) {
            bias = p.bias_dtype == DType::bfloat16
                       ? load_numbers(static_cast<const BFloat16*>(p.bias) + column, count)
                       : load_numbers(static_cast<const float*>(p.bias) + column, count);
        }
        for (int64_t i = 0; i < rows; ++i) {
            F sum = sums[i][j];
            T* to = out + i * p.columns + j * lanes;
            float* kept = partial + i * partial_stride + j * lanes;
            if constexpr (sizeof(T) == 4) kept = to;  // out itself, which may end anywhere
            if (block > 0) sum = load_numbers(kept, count) + sum;
            if (last) {
                sum += bias;
                store_numbers(to, p.rounds ? to_bfloat16(sum) : sum, count);
            } else {
                store_numbers(kept, sum, count);
            }
        }
    }
}

template <class Kind, class T>
void multiply_rows(const LinearProduct& p, int64_t first_row, int64_t rows, int64_t first_panel,
                   int64_t panels, float* left, float* partial) {
    const int64_t stride = panels * tile_columns;
    for (int64_t block = p.begin; block < p.end; ++block) {
        pack_block<Kind, tile_rows>(p, p.left, first_row, rows, block, left, p.left_panel);
        const int64_t rest = p.length - block * p.block;
        const int64_t elements = elements_of<Kind>(rest < p.block ? rest : p.block);
        for (int64_t panel = 0; panel < panels; ++panel) {
            const float* right =
                p.packed + ((block - p.begin) * p.panels + first_panel + panel) * p.right_panel;
            const int64_t column = (first_panel + panel) * tile_columns;
            for (int64_t row = 0; row < rows; row += tile_rows) {
                T* out = static_cast<T*>(p.out) + (first_row + row) * p.columns + column;
                // what the tile will be written to is there by then
                for (int64_t i = row; i < row + tile_rows && i < rows; ++i) {
                    const char* to = reinterpret_cast<const char*>(out + (i - row) * p.columns);
                    __builtin_prefetch(to, 1);
                    __builtin_prefetch(to + sizeof(T) * tile_columns - 1, 1);
                }
                Sums sums;
                multiply_panels<Kind>(left + row / tile_rows * p.left_panel, right, elements, sums);
                put_sums(p, sums, rows - row < tile_rows ? rows - row : tile_rows, block, column, out,
                         partial + row * stride + panel * tile_columns, stride);
            }
        }
    }
}

void multiply(const LinearProduct& p, int64_t first_row, int64_t rows, int64_t first_panel, int64_t panels,
              float* scratch) {
    float* partial = scratch + (rows + tile_rows - 1) / tile_rows * p.left_panel;
    const bool narrow = p.dtype == DType::bfloat16;
    const auto run = p.bf16 ? narrow ? multiply_rows<Pairs, BFloat16> : multiply_rows<Pairs, float>
                            : (narrow ? multiply_rows<Floats, BFloat16> : multiply_rows<Floats, float>);
    run(p, first_row, rows, first_panel, panels, scratch, partial);
}

void pack(const LinearProduct& p, int64_t block, int64_t first_panel, int64_t panels) {
    const int64_t first = first_panel * tile_columns, left = p.columns - first;
    const int64_t count = left < panels * tile_columns ? left : panels * tile_columns;
    float* to = p.packed + ((block - p.begin) * p.panels + first_panel) * p.right_panel;
    const auto run = p.bf16 ? pack_block<Pairs, tile_columns> : pack_block<Floats, tile_columns>;
    run(p, p.right, first, count, block, to, p.right_panel);
}

template <class T>
void sum_rows_of(const T* rows, int64_t columns, int64_t begin, int64_t end, float* sums) {
    for (int64_t i = 0; i < columns; i += lanes) store(sums + i, F{});
    for (int64_t row = begin; row < end; ++row) {
        const T* p = rows + row * columns;
        for (int64_t i = 0; i < columns; i += lanes) {
            store(sums + i, load<F>(sums + i) + load_numbers(p + i, columns - i));
        }
    }
}

void sum_rows(const void* rows, DType dtype, int64_t columns, int64_t begin, int64_t end, float* sums) {
    if (dtype == DType::bfloat16)
        return sum_rows_of(static_cast<const BFloat16*>(rows), columns, begin, end, sums);
    sum_rows_of(static_cast<const float*>(rows), columns, begin, end, sums);
}

void add_up(const float* sums, int64_t count, int64_t padded, int64_t columns, void* out, DType dtype) {
    for (int64_t i = 0; i < columns; i += lanes) {
        F total{};
        for (int64_t row = 0; row < count; ++row) total += load<F>(sums + row * padded + i);
        if (dtype == DType::bfloat16) {
            store_numbers(static_cast<BFloat16*>(out) + i, total, columns - i);
        } else {
            store_numbers(static_cast<float*>(out) + i, total, columns - i);
        }
    }
}

#if defined(__AVX512BF16__)
constexpr int64_t depth = 2;
#else
constexpr int64_t depth = 1;
#endif

}  // namespace

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(LinearKernel, linear) = {tile_rows, tile_columns, depth, pack,
                                                multiply,  sum_rows,     add_up};

}  // namespace var_ext::cpu
