#include "ops/residual_quantize.h"

#include <algorithm>
#include <limits>

#include "ops/residual_step.h"

namespace var_ext {

namespace {

void check_floats(const char* op, const char* name, const TensorView& view,
                  std::initializer_list<Dim> shape) {
    check_dtype(op, name, view, {DType::float32});
    check_shape(op, name, view, shape);
    check_contiguous(op, name, view);
}

int64_t count_tokens(const std::vector<int64_t>& patch_nums) {
    int64_t count = 0;
    for (int64_t side : patch_nums) count += side * side;
    return count;
}

float* scratch_memory(const char* op, const TensorView* scratch, int64_t size) {
    if (scratch == nullptr) return nullptr;
    check_dtype(op, "scratch", *scratch, {DType::float32});
    check_shape(op, "scratch", *scratch, {{"S", size}});
    check_contiguous(op, "scratch", *scratch);
    return static_cast<float*>(scratch->data);
}

QuantizerShape quantizer_shape(const char* op, const TensorView& codebook, const TensorView& weight,
                               const TensorView& tokens, const std::vector<int64_t>& phi_index,
                               const std::vector<int64_t>& patch_nums, double ratio) {
    check_dtype(op, "codebook", codebook, {DType::float32});
    check_shape(op, "codebook", codebook, {{"V", any_size}, {"C", any_size}});
    const int64_t channels = codebook.shape[1];
    if (channels < 1 || codebook.shape[0] < 1 || codebook.shape[0] > std::numeric_limits<int32_t>::max()) {
        contract_error(op, "codebook must have 1 to 2^31 - 1 entries of at least one channel, got shape " +
                               codebook.shape_text());
    }
    check_floats(op, "phi_weight", weight,
                 {{"N", any_size}, {"C", channels}, {"C", channels}, {"3", 3}, {"3", 3}});
    QuantizerShape shape;
    shape.tokens = 0;
    for (int64_t side : patch_nums) {
        if (side < 1 || side > patch_nums.back()) {
            contract_error(op, "patch_nums must lie between 1 and the last one, got " + std::to_string(side));
        }
        shape.tokens += side * side;
    }
    if (patch_nums.empty() || phi_index.size() != patch_nums.size()) {
        contract_error(op, "phi_index and patch_nums must have one entry for each scale, got " +
                               std::to_string(phi_index.size()) + " and " +
                               std::to_string(patch_nums.size()));
    }
    for (int64_t n : phi_index) {
        if (n < 0 || n >= weight.shape[0]) {
            contract_error(op, "phi_index must name one of " + std::to_string(weight.shape[0]) +
                                   " convolutions, got " + std::to_string(n));
        }
    }
    check_dtype(op, "tokens", tokens, {DType::int64});
    check_shape(op, "tokens", tokens, {{"B", any_size}, {"L", shape.tokens}});
    check_contiguous(op, "tokens", tokens);
    shape.batch = tokens.shape[0];
    shape.channels = channels;
    shape.side = patch_nums.back();
    shape.codes = codebook.shape[0];
    shape.patch_nums = patch_nums;
    shape.phi_index = phi_index;
    shape.ratio = static_cast<float>(ratio);
    return shape;
}

}  // namespace

ResidualQuantizeLayout::ResidualQuantizeLayout(int64_t batch, int64_t channels, int64_t codes,
                                               const std::vector<int64_t>& patch_nums) {
    filters = nearest_code_filter(batch * patch_nums.back() * patch_nums.back(), codes, channels);
    residual = 0;
    for (int64_t side : patch_nums) {
        residual = std::max(residual, search(batch, side, channels, codes).size);
    }
    const int64_t side = patch_nums.back();
    pooled = residual + batch * channels * side * side;
    size = pooled + batch * channels * side * side;
}

NearestCodeLayout ResidualQuantizeLayout::search(int64_t batch, int64_t side, int64_t channels,
                                                 int64_t codes) const {
    const int64_t n = batch * side * side;
    return {n, codes, channels, nearest_code_filter(n, codes, channels), filters};
}

ResidualQuantizeBackwardLayout::ResidualQuantizeBackwardLayout(int64_t batch, int64_t channels,
                                                               const std::vector<int64_t>& patch_nums) {
    const int64_t side = patch_nums.back();
    codes = batch * channels * side * side;
    step = codes + batch * count_tokens(patch_nums) * channels;
    size = step + residual_step_scratch(batch, channels, side, side);
}

int64_t residual_quantize_scratch(int64_t batch, int64_t channels, int64_t codes,
                                  const std::vector<int64_t>& patch_nums) {
    return ResidualQuantizeLayout(batch, channels, codes, patch_nums).size;
}

int64_t residual_quantize_backward_scratch(int64_t batch, int64_t channels,
                                           const std::vector<int64_t>& patch_nums) {
    return ResidualQuantizeBackwardLayout(batch, channels, patch_nums).size;
}

ResidualQuantizeParams residual_quantize_params(
    const TensorView& features, const TensorView& codebook, const TensorView& weight, const TensorView& bias,
    const std::vector<int64_t>& phi_index, const std::vector<int64_t>& patch_nums, double ratio, bool cosine,
    const TensorView& tokens, const TensorView& f_hat, const TensorView* scales, const TensorView* scratch) {
    const char* op = "residual_quantize";
    ResidualQuantizeParams p;
    p.shape = quantizer_shape(op, codebook, weight, tokens, phi_index, patch_nums, ratio);
    const int64_t b = p.shape.batch, c = p.shape.channels, side = p.shape.side;
    check_dtype(op, "features", features, {DType::float32});
    check_shape(op, "features", features, {{"B", b}, {"C", c}, {"P", side}, {"P", side}});
    check_floats(op, "phi_bias", bias, {{"N", weight.shape[0]}, {"C", c}});
    check_floats(op, "f_hat", f_hat, {{"B", b}, {"C", c}, {"P", side}, {"P", side}});
    p.scales = nullptr;
    if (scales != nullptr) {
        check_floats(
            op, "scales", *scales,
            {{"K", static_cast<int64_t>(patch_nums.size())}, {"B", b}, {"C", c}, {"P", side}, {"P", side}});
        p.scales = static_cast<float*>(scales->data);
    }
    p.features = static_cast<const float*>(features.data);
    p.codebook = static_cast<const float*>(codebook.data);
    p.weight = static_cast<const float*>(weight.data);
    p.bias = static_cast<const float*>(bias.data);
    p.tokens = static_cast<int64_t*>(tokens.data);
    p.f_hat = static_cast<float*>(f_hat.data);
    std::copy(features.strides.begin(), features.strides.end(), p.features_strides);
    std::copy(codebook.strides.begin(), codebook.strides.end(), p.codebook_strides);
    p.cosine = cosine;
    p.scratch = scratch_memory(op, scratch, residual_quantize_scratch(b, c, p.shape.codes, patch_nums));
    return p;
}

ResidualQuantizeBackwardParams residual_quantize_backward_params(
    const TensorView& grad_scales, const TensorView& tokens, const TensorView& codebook,
    const TensorView& weight, const std::vector<int64_t>& phi_index, const std::vector<int64_t>& patch_nums,
    double ratio, const TensorView& grad_codebook, const TensorView& grad_weight, const TensorView& grad_bias,
    const TensorView* scratch) {
    const char* op = "residual_quantize_backward";
    ResidualQuantizeBackwardParams p;
    p.shape = quantizer_shape(op, codebook, weight, tokens, phi_index, patch_nums, ratio);
    const int64_t c = p.shape.channels, side = p.shape.side, n = weight.shape[0];
    check_floats(op, "grad_scales", grad_scales,
                 {{"K", static_cast<int64_t>(patch_nums.size())},
                  {"B", p.shape.batch},
                  {"C", c},
                  {"P", side},
                  {"P", side}});
    check_floats(op, "grad_codebook", grad_codebook, {{"V", p.shape.codes}, {"C", c}});
    check_floats(op, "grad_weight", grad_weight, {{"N", n}, {"C", c}, {"C", c}, {"3", 3}, {"3", 3}});
    check_floats(op, "grad_bias", grad_bias, {{"N", n}, {"C", c}});
    p.grad_scales = static_cast<const float*>(grad_scales.data);
    p.tokens = static_cast<const int64_t*>(tokens.data);
    p.codebook = static_cast<const float*>(codebook.data);
    p.weight = static_cast<const float*>(weight.data);
    p.grad_codebook = static_cast<float*>(grad_codebook.data);
    p.grad_weight = static_cast<float*>(grad_weight.data);
    p.grad_bias = static_cast<float*>(grad_bias.data);
    std::copy(codebook.strides.begin(), codebook.strides.end(), p.codebook_strides);
    p.convolutions = n;
    p.scratch = scratch_memory(op, scratch, residual_quantize_backward_scratch(p.shape.batch, c, patch_nums));
    return p;
}

}  // namespace var_ext
