#include "ops/residual_step.h"

#include <algorithm>

#include "cpu/phi.h"
#include "ops/area_downsample.h"

namespace var_ext::cpu {

namespace {

Grid grid(const float* data, const int64_t* strides) {
    return {const_cast<float*>(data), {strides[0], strides[1], strides[2], strides[3]}};
}

template <class Step, class Params>
Step step_of(const Params& p) {
    Step step;
    step.shape = phi_shape(p.batch, p.channels, p.height, p.width);
    step.codes = grid(p.codes, p.codes_strides);
    step.codes_height = p.codes_height;
    step.codes_width = p.codes_width;
    step.weight = p.weight;
    step.ratio = p.ratio;
    return step;
}

}  // namespace

void residual_step(const ResidualStepParams& p) {
    PhiStep step = step_of<PhiStep>(p);
    step.bias = p.bias;
    step.base = grid(p.f_hat, p.f_hat_strides);
    step.out = grid(p.out, p.out_strides);
    step.channels_last = residual_step_chain(p) == p.channels;
    phi_step(step);
    if (p.has_next) area_downsample(p.next);
}

void residual_step_backward(const ResidualStepBackwardParams& p) {
    if (p.grad_weight) std::fill_n(p.grad_weight, p.channels * p.channels * 9, 0.0f);
    if (p.grad_bias) std::fill_n(p.grad_bias, p.channels, 0.0f);
    PhiBackward step = step_of<PhiBackward>(p);
    step.grad = grid(p.grad, p.grad_strides);
    step.grad_codes = grid(p.grad_codes, p.grad_codes_strides);
    step.grad_weight = p.grad_weight;
    step.grad_bias = p.grad_bias;
    phi_backward(step);
}

}  // namespace var_ext::cpu
