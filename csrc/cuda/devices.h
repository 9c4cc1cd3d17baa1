// The GPUs that this process can see. A build without CUDA sees none.
#pragma once

#include <string>
#include <vector>

namespace var_ext {

std::vector<std::string> cuda_devices();  // "NVIDIA H100 (sm_90)", in the order of their indices

}  // namespace var_ext
