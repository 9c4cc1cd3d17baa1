#include "cpu/nearest_code_impl.h"

namespace var_ext::cpu {

const NearestCodeKernel nearest_code_portable = {
    4, 2 * lanes_of<float>, nearest_code_pack, nearest_code_search<4>, nullptr, nullptr};

}  // namespace var_ext::cpu
