#include "ops/residual_step.h"

#include <algorithm>
#include <string>

#include "cuda/residual_step_backward.cuh"
#include "cuda/residual_step_phi.cuh"

namespace var_ext::cuda {

namespace {

constexpr const char* op = "residual_step";

PhiGrid grid(const float* data, const int64_t* strides) {
    return {data, {strides[0], strides[1], strides[2], strides[3]}};
}

template <class Params>
PhiTiles sizes(const Params& p) {
    const int64_t sides[] = {p.height, p.width, p.codes_height, p.codes_width};
    for (int64_t side : sides) {
        if (side > resample_max_side) {
            contract_error(op, "sides must be at most " + std::to_string(resample_max_side) +
                                   " on CUDA, got " + std::to_string(side));
        }
    }
    if (p.channels > 4096) {
        contract_error(op, "C must be at most 4096 on CUDA, got " + std::to_string(p.channels));
    }
    PhiTiles tiles{};
    tiles.channels = static_cast<int>(p.channels);
    tiles.height = static_cast<int>(p.height);
    tiles.width = static_cast<int>(p.width);
    tiles.codes_height = static_cast<int>(p.codes_height);
    tiles.codes_width = static_cast<int>(p.codes_width);
    return tiles;
}

// out = f_hat + phi.
struct AddPhi {
    PhiGrid f_hat;
    PhiStore out;
    __device__ float operator()(int64_t b, int c, int y, int x, float phi) const {
        const float before = f_hat.pixel(b, y, x)[c * f_hat.stride_channel()];
        return out(b, c, y, x, plus(phi, before));
    }
};

}  // namespace

void residual_step(const ResidualStepParams& p, const CudaStream& stream) {
    if (p.batch * p.channels == 0) return;
    PhiParams phi{};
    phi.tiles = sizes(p);
    phi.weight = p.weight;
    phi.bias = p.bias;
    phi.ratio = p.ratio;
    phi.chain = residual_step_chain(p);
    phi.pools = p.has_next;
    if (p.has_next) {
        if (std::max(p.next.out_h, p.next.out_w) > resample_max_side) {
            contract_error(op, "sides must be at most " + std::to_string(resample_max_side) +
                                   " on CUDA, got " + std::to_string(std::max(p.next.out_h, p.next.out_w)));
        }
        phi.next = static_cast<float*>(p.next.out);
        phi.next_height = static_cast<int>(p.next.out_h);
        phi.next_width = static_cast<int>(p.next.out_w);
        std::copy(p.next.out_strides, p.next.out_strides + 4, phi.next_strides);
    }
    const PhiGrid out = grid(p.out, p.out_strides);
    const auto store = [](float* data, const int64_t* strides) {
        return PhiStore{data, {strides[0], strides[1], strides[2], strides[3]}};
    };
    const AddPhi add = {grid(p.f_hat, p.f_hat_strides), store(p.out, p.out_strides)};
    const bool pooled = launch_phi(op, stream, p.batch, phi, grid(p.codes, p.codes_strides), add);
    if (pooled || !p.has_next) return;
    launch_pool(op, stream, p.batch, phi, out, store(phi.next, phi.next_strides));
}

void residual_step_backward(const ResidualStepBackwardParams& p, const CudaStream& stream) {
    if (p.channels == 0) return;
    if (p.scratch == nullptr) {
        const int64_t size = residual_step_scratch(p.batch, p.channels, p.height, p.width);
        contract_error("residual_step_backward",
                       "scratch must have shape (" + std::to_string(size) + ",) on CUDA, got none");
    }
    PhiBackward<PhiGrid> backward{};
    backward.tiles = sizes(p);
    backward.batch = p.batch;
    backward.grad = grid(p.grad, p.grad_strides);
    backward.codes = grid(p.codes, p.codes_strides);
    backward.weight = p.weight;
    backward.ratio = p.ratio;
    backward.wants_codes = p.grad_codes != nullptr && p.batch > 0;
    backward.grad_weight = p.grad_weight;
    backward.grad_bias = p.grad_bias;
    backward.scratch = p.scratch;
    const int64_t* strides = p.grad_codes_strides;
    phi_backward(op, stream, backward,
                 PhiStore{p.grad_codes, {strides[0], strides[1], strides[2], strides[3]}});
}

}  // namespace var_ext::cuda
