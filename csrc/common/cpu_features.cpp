#include "common/cpu_features.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace var_ext {

namespace {

bool cpu_has([[maybe_unused]] Isa isa) {
#if defined(VAR_EXT_X86_VARIANTS)
    // __builtin_cpu_supports asks the operating system too: the registers must survive a context switch.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (isa) {
        case Isa::avx512_bf16:
            return avx512 && __builtin_cpu_supports("avx512bf16");
        case Isa::avx512:
            return avx512;
        case Isa::avx2:
            return avx2;
        case Isa::portable:
            return true;
    }
#endif
    return isa == Isa::portable;
}

std::atomic<Isa>& selected() {
    static std::atomic<Isa> isa{supported_isas().back()};
    return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return "portable";
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::avx512_bf16:
            return "avx512_bf16";
    }
    return "unknown";
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> found;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
        if (cpu_has(isa)) found.push_back(isa);
    }
    return found;
}

Isa current_isa() {
    return selected().load(std::memory_order_relaxed);
}

bool multiplies_faster([[maybe_unused]] bool bf16) {
#if defined(VAR_EXT_X86_VARIANTS)
    __builtin_cpu_init();
    const Isa isa = current_isa();
    return __builtin_cpu_is("amd") && (isa == Isa::avx512_bf16 || (isa == Isa::avx512 && !bf16));
#else
    return false;
#endif
}

void force_isa(const std::string& name) {
    std::string names;
    for (Isa isa : supported_isas()) {
        if (name == isa_name(isa)) {
            selected().store(isa, std::memory_order_relaxed);
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::invalid_argument("set_isa: isa must be one of " + names +
                                " (compiled in and offered by this processor), got '" + name + "'");
}

void force_isa_from_environment() {
    const char* name = std::getenv("VAR_EXT_ISA");
    if (name == nullptr || *name == '\0') return;
    try {
        force_isa(name);
    } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::string("environment variable VAR_EXT_ISA: ") + error.what());
    }
}

}  // namespace var_ext
