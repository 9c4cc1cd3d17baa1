#include "ops/residual_step.h"

#include <algorithm>

namespace var_ext {

namespace {

void check_grid(const char* op, const char* name, const TensorView& view, int64_t batch, int64_t channels) {
    check_dtype(op, name, view, {DType::float32});
    check_shape(op, name, view, {{"B", batch}, {"C", channels}, {"H", any_size}, {"W", any_size}});
    if (view.shape[2] < 1 || view.shape[3] < 1) {
        contract_error(op,
                       std::string(name) + " must have at least one pixel, got shape " + view.shape_text());
    }
}

void check_phi(const char* op, const char* name, const TensorView& view, std::initializer_list<Dim> shape) {
    check_dtype(op, name, view, {DType::float32});
    check_shape(op, name, view, shape);
    check_contiguous(op, name, view);
}

template <class Params>
void set_sizes(Params& p, const TensorView& wide, const TensorView& codes, double ratio) {
    p.batch = wide.shape[0];
    p.channels = wide.shape[1];
    p.height = wide.shape[2];
    p.width = wide.shape[3];
    p.codes_height = codes.shape[2];
    p.codes_width = codes.shape[3];
    p.codes = static_cast<const float*>(codes.data);
    std::copy(codes.strides.begin(), codes.strides.end(), p.codes_strides);
    p.ratio = static_cast<float>(ratio);
}

// torch's rule for the layout of results computed from the codes, except that the stride of a batch of one,
// which means nothing, does not count: an image alone is computed as in a batch.
bool channels_last(const ResidualStepParams& p) {
    const int64_t sizes[4] = {p.batch, p.channels, p.codes_height, p.codes_width};
    const int64_t* strides = p.codes_strides;
    if (strides[1] == 0) return false;
    int64_t least = 0;
    for (int axis : {1, 3, 2}) {
        if (strides[axis] < least) return false;
        least = strides[axis] * sizes[axis];
    }
    return least != strides[1] && (p.batch == 1 || strides[0] >= least);
}

}  // namespace

ResidualStepLayout::ResidualStepLayout(int64_t batch, int64_t channels, int64_t height, int64_t width) {
    // At most two blocks for each of 132 multiprocessors, at least 64 pixels each: sums depend on it, so it
    // is the same on all chips.
    parts = std::clamp<int64_t>((batch * height * width + 63) / 64, 1, 264);
    sums = batch * channels * height * width;
    size = sums + parts * (9 * channels + 1) * channels;
}

int64_t residual_step_scratch(int64_t batch, int64_t channels, int64_t height, int64_t width) {
    return ResidualStepLayout(batch, channels, height, width).size;
}

int residual_step_chain(const ResidualStepParams& p) {
    return static_cast<int>(channels_last(p) ? p.channels : std::min<int64_t>(p.channels, 16));
}

ResidualStepParams residual_step_params(const TensorView& f_hat, const TensorView& codes,
                                        const TensorView& weight, const TensorView& bias, double ratio,
                                        const TensorView& out, const TensorView* next) {
    const char* op = "residual_step";
    check_grid(op, "f_hat", f_hat, any_size, any_size);
    const int64_t batch = f_hat.shape[0], channels = f_hat.shape[1];
    check_grid(op, "embedding", codes, batch, channels);
    check_phi(op, "phi_weight", weight, {{"C", channels}, {"C", channels}, {"3", 3}, {"3", 3}});
    check_phi(op, "phi_bias", bias, {{"C", channels}});
    check_dtype(op, "out", out, {DType::float32});
    check_shape(op, "out", out,
                {{"B", batch}, {"C", channels}, {"H", f_hat.shape[2]}, {"W", f_hat.shape[3]}});
    check_output(op, "out", out);
    ResidualStepParams p;
    p.f_hat = static_cast<const float*>(f_hat.data);
    p.weight = static_cast<const float*>(weight.data);
    p.bias = static_cast<const float*>(bias.data);
    p.out = static_cast<float*>(out.data);
    std::copy(f_hat.strides.begin(), f_hat.strides.end(), p.f_hat_strides);
    std::copy(out.strides.begin(), out.strides.end(), p.out_strides);
    set_sizes(p, f_hat, codes, ratio);
    p.has_next = next != nullptr;
    if (next != nullptr) p.next = resample_params(op, "out", out, "next", *next);
    return p;
}

ResidualStepBackwardParams residual_step_backward_params(const TensorView& grad, const TensorView& codes,
                                                         const TensorView& weight, double ratio,
                                                         const TensorView* grad_codes,
                                                         const TensorView* grad_weight,
                                                         const TensorView* grad_bias,
                                                         const TensorView* scratch) {
    const char* op = "residual_step_backward";
    check_grid(op, "grad", grad, any_size, any_size);
    const int64_t batch = grad.shape[0], channels = grad.shape[1];
    check_grid(op, "embedding", codes, batch, channels);
    check_phi(op, "phi_weight", weight, {{"C", channels}, {"C", channels}, {"3", 3}, {"3", 3}});
    ResidualStepBackwardParams p{};
    p.grad = static_cast<const float*>(grad.data);
    p.weight = static_cast<const float*>(weight.data);
    if (grad_codes != nullptr) {
        check_dtype(op, "grad_embedding", *grad_codes, {DType::float32});
        check_shape(op, "grad_embedding", *grad_codes,
                    {{"B", batch}, {"C", channels}, {"h", codes.shape[2]}, {"w", codes.shape[3]}});
        check_output(op, "grad_embedding", *grad_codes);
        p.grad_codes = static_cast<float*>(grad_codes->data);
        std::copy(grad_codes->strides.begin(), grad_codes->strides.end(), p.grad_codes_strides);
    }
    if (grad_weight != nullptr) {
        check_phi(op, "grad_weight", *grad_weight, {{"C", channels}, {"C", channels}, {"3", 3}, {"3", 3}});
        p.grad_weight = static_cast<float*>(grad_weight->data);
    }
    if (grad_bias != nullptr) {
        check_phi(op, "grad_bias", *grad_bias, {{"C", channels}});
        p.grad_bias = static_cast<float*>(grad_bias->data);
    }
    std::copy(grad.strides.begin(), grad.strides.end(), p.grad_strides);
    set_sizes(p, grad, codes, ratio);
    if (scratch != nullptr) {
        check_dtype(op, "scratch", *scratch, {DType::float32});
        check_shape(op, "scratch", *scratch,
                    {{"S", residual_step_scratch(batch, channels, p.height, p.width)}});
        check_contiguous(op, "scratch", *scratch);
        p.scratch = static_cast<float*>(scratch->data);
    }
    return p;
}

}  // namespace var_ext
