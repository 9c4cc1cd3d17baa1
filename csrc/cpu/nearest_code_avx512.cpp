#include "cpu/nearest_code_impl.h"

namespace var_ext::cpu {

const NearestCodeKernel nearest_code_avx512 = {
    12, 2 * lanes_of<float>, nearest_code_pack, nearest_code_search<12>, nullptr, nullptr};

}  // namespace var_ext::cpu
