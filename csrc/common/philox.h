// Philox4x32-10 (Salmon et al. 2011): random words as a pure function of a counter and a key. Plain integers,
// for the host and for GPUs alike; do not include it in the variant files of csrc/cpu (see cpu/vec.h).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace var_ext {

struct PhiloxWords {
    uint32_t word[4];
};

VAR_EXT_HOST_DEVICE constexpr PhiloxWords philox4x32(PhiloxWords counter, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    PhiloxWords c = counter;
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t{0xD2511F53} * c.word[0], second = uint64_t{0xCD9E8D57} * c.word[2];
        c = {{static_cast<uint32_t>(second >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(second),
              static_cast<uint32_t>(first >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(first)}};
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return c;
}

// A known answer of Random123 (kat_vectors).
static_assert(philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822).word[0] ==
              0xd16cfe09);

}  // namespace var_ext
