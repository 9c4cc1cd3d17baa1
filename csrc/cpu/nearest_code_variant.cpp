// The search of nearest_code, behind a filter where there are dot products of bf16.
#include <cstddef>

#include "cpu/nearest_code_search.h"

#if defined(__AVX512BF16__)
#include "cpu/nearest_code_filter.h"
#else
namespace {
constexpr std::nullptr_t pack_filter = nullptr, search_filtered = nullptr;
}
#endif

namespace var_ext::cpu {

VAR_EXT_DEFINE_VARIANT(NearestCodeKernel, nearest_code) = {
    rows_at_once, 2 * lanes_of<float>, nearest_code_pack, nearest_code_search<rows_at_once>,
    pack_filter,  search_filtered};

}  // namespace var_ext::cpu
