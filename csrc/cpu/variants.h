// One source, several instruction sets: CMakeLists.txt compiles NAME_variant.cpp once for each, with
// VAR_EXT_VARIANT set to portable, avx2, avx512 or avx512_bf16. A variant is a table of function pointers,
// NAME_avx2 for instance.
#pragma once

#define VAR_EXT_DECLARE_VARIANTS(Kernel, name) \
    extern const Kernel name##_portable, name##_avx2, name##_avx512, name##_avx512_bf16

// In NAME_variant.cpp: the table of the variant that is being compiled.
#define VAR_EXT_DEFINE_VARIANT(Kernel, name) const Kernel VAR_EXT_JOINED(name, VAR_EXT_VARIANT)
#define VAR_EXT_JOINED(name, variant) VAR_EXT_JOINED_EXPANDED(name, variant)
#define VAR_EXT_JOINED_EXPANDED(name, variant) name##_##variant

// The table to use now, see common/cpu_features.h. VAR_EXT_STRONGEST_NAME comes from CMakeLists.txt:
// avx512_bf16 for the ops that have this variant, avx512 for the others.
#if defined(VAR_EXT_X86_VARIANTS)
#define VAR_EXT_SELECT(name)                                               \
    ::var_ext::select_variant(name##_portable, name##_avx2, name##_avx512, \
                              VAR_EXT_JOINED(name, VAR_EXT_STRONGEST_##name))
#else
#define VAR_EXT_SELECT(name) (name##_portable)
#endif
