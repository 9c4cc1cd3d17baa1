// Which variant of the CPU kernels runs: chosen once from the processor, or forced.
#pragma once

#include <string>
#include <vector>

namespace var_ext {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

const char* isa_name(Isa isa);
std::vector<Isa> supported_isas();        // compiled in and offered by this processor, weakest first
Isa current_isa();                        // the strongest supported one unless forced
void force_isa(const std::string& name);  // throws std::invalid_argument that names the supported ones
void force_isa_from_environment();        // VAR_EXT_ISA, if it is set and not empty

// Whether the kernel of `linear` is faster than torch's products, of bfloat16 or of float32: on AMD's
// processors with AVX-512, where it was measured. Intel's have libraries made for them, and some have matrix
// instructions.
bool multiplies_faster(bool bf16);

template <class T>
const T& select_variant(const T& portable, const T& avx2, const T& avx512, const T& avx512_bf16) {
    switch (current_isa()) {
        case Isa::avx512_bf16:
            return avx512_bf16;
        case Isa::avx512:
            return avx512;
        case Isa::avx2:
            return avx2;
        case Isa::portable:
            break;
    }
    return portable;
}

}  // namespace var_ext
