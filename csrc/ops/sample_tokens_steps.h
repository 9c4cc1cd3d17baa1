// Steps of sample_tokens on a whole row, shared by CPU and CUDA kernels. Without linkage,
// as the variant files of csrc/cpu include it (see cpu/vec.h).
#pragma once

#include "common/host_device.h"
#include "ops/sample_tokens.h"

namespace {

// The options of one image; top_k is 0 if it would keep all.
VAR_EXT_HOST_DEVICE inline var_ext::SampleSettings sample_settings(const var_ext::SampleTokensParams& p,
                                                                   int64_t image) {
    const double cfg = p.cfgs != nullptr ? p.cfgs[image * p.cfgs_stride] : p.cfg;
    const int64_t top_k = p.top_ks != nullptr ? p.top_ks[image * p.top_ks_stride] : p.top_k;
    const double top_p = p.top_ps != nullptr ? p.top_ps[image * p.top_ps_stride] : p.top_p;
    return {static_cast<float>(1 + cfg), static_cast<float>(cfg), top_k < p.v ? top_k : 0, top_p};
}

VAR_EXT_HOST_DEVICE inline bool sample_allows(const var_ext::SampleSettings& s) {
    return s.top_k >= 0 && s.top_p >= 0 && s.top_p <= 1;
}

// The mass that what lies above a weight must fall short of for top-p to keep the weight.
VAR_EXT_HOST_DEVICE inline uint64_t sample_need(double top_p, uint64_t total) {
    const uint64_t drop = static_cast<uint64_t>((1 - top_p) * static_cast<double>(total));
    return drop < total ? total - drop : 1;
}

// floor((word + 1/2) total / 2^32) for a total below 2^62
VAR_EXT_HOST_DEVICE inline uint64_t sample_target(uint32_t word, uint64_t total) {
    const uint64_t half = total / 2, low = (total & 0xffffffff) * word + (half & 0xffffffff);
    return (total >> 32) * word + (half >> 32) + (low >> 32);
}

}  // namespace
