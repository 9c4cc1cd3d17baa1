// What the lanes of a warp do together, each layout written down once, from the definitions in the PTX
// manual.
#include <cstring>

#include "state.h"

namespace emulator {

namespace {

template <class T>
T& of_lane(void* const* lanes, unsigned lane) {
    return *static_cast<T*>(lanes[lane]);
}

float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}

float from_fp16(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof(value));
    return static_cast<float>(value);
}

uint16_t half_of(uint32_t pair, unsigned i) {
    return static_cast<uint16_t>(pair >> 16 * i);
}

// Lane i names row i % 8 of matrix i / 8. In matrix j of a lane: row lane / 4, columns 2 (lane % 4) and the
// next.
void load(void* const* lanes, bool transposed) {
    uint16_t matrix[4][8][8];
    Fiber* const first = machine.current;
    for (unsigned i = 0; i < 32; ++i) {
        machine.current = first + i;
        const Fiber& self = *machine.current;
        const void* row = of_lane<LoadMatrix>(lanes, i).row;
        const unsigned char* begin = shared_memory();
        if (row < begin || row >= begin + most_shared_bytes)
            fail("ldmatrix of memory that is not shared", self.site);
        read_bytes(matrix[i / 8][i % 8], row, 16, pc_of(self.site));
    }
    for (unsigned i = 0; i < 32; ++i) {
        for (unsigned j = 0; j < 4; ++j) {
            const unsigned row = i / 4, column = 2 * (i % 4);
            const uint16_t low = transposed ? matrix[j][column][row] : matrix[j][row][column];
            const uint16_t high = transposed ? matrix[j][column + 1][row] : matrix[j][row][column + 1];
            of_lane<LoadMatrix>(lanes, i).r[j] = low | uint32_t{high} << 16;
        }
    }
}

template <float (*widen)(uint16_t)>
void multiply(void* const* lanes) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; ++lane) {
        const Multiply& given = of_lane<Multiply>(lanes, lane);
        const unsigned group = lane / 4, in_group = lane % 4;
        for (unsigned i = 0; i < 8; ++i) {
            const unsigned row = group + (i / 2 % 2) * 8, column = in_group * 2 + i % 2 + i / 4 * 8;
            a[row][column] = widen(half_of(given.a[i / 2], i % 2));
        }
        for (unsigned i = 0; i < 4; ++i) {
            b[in_group * 2 + i % 2 + i / 2 * 8][group] = widen(half_of(given.b[i / 2], i % 2));
        }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        Multiply& given = of_lane<Multiply>(lanes, lane);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = given.d[i];
            for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            given.d[i] = sum;
        }
    }
}

}  // namespace

void shuffle(void* const* lanes) {
    uint64_t bits[32];
    for (unsigned i = 0; i < 32; ++i) bits[i] = of_lane<Shuffle>(lanes, i).bits;
    for (unsigned i = 0; i < 32; ++i)
        of_lane<Shuffle>(lanes, i).bits = bits[of_lane<Shuffle>(lanes, i).source % 32];
}

void vote(void* const* lanes) {
    unsigned ballot = 0;
    for (unsigned i = 0; i < 32; ++i) ballot |= unsigned{of_lane<Vote>(lanes, i).mine} << i;
    for (unsigned i = 0; i < 32; ++i) of_lane<Vote>(lanes, i).ballot = ballot;
}

void load_matrix(void* const* lanes) {
    load(lanes, false);
}
void load_matrix_transposed(void* const* lanes) {
    load(lanes, true);
}
void multiply_bf16(void* const* lanes) {
    multiply<from_bf16>(lanes);
}
void multiply_fp16(void* const* lanes) {
    multiply<from_fp16>(lanes);
}

}  // namespace emulator
