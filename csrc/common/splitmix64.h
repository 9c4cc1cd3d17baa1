// SplitMix64 (Steele, Lea, Flood 2014): 64 random bits as a pure function of a counter. For the host, for
// GPUs, and for the vectors of cpu/vec.h: always inlined, so that no function with the flags of a variant is
// linked.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace var_ext {

// The hash of a uint64_t, or of each in a vector.
template <class U>
VAR_EXT_HOST_DEVICE inline __attribute__((always_inline)) constexpr U splitmix64(U x) {
    x = (x ^ x >> 30) * uint64_t{0xBF58476D1CE4E5B9};
    x = (x ^ x >> 27) * uint64_t{0x94D049BB133111EB};
    return x ^ x >> 31;
}

// The first number of the published code, seeded with 0.
static_assert(splitmix64(uint64_t{0x9E3779B97F4A7C15}) == 0xE220A8397B1DCDAF);

}  // namespace var_ext
