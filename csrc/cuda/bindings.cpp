#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include "ops/adaln.h"
#include "ops/area_downsample.h"
#include "ops/bias_gelu.h"
#include "ops/bias_residual.h"
#include "ops/bicubic_upsample.h"
#include "ops/block_causal_attention.h"
#include "ops/cached_attention.h"
#include "ops/group_norm_silu.h"
#include "ops/nearest_code.h"
#include "ops/qk_norm.h"
#include "ops/quantize_rows.h"
#include "ops/residual_quantize.h"
#include "ops/residual_step.h"
#include "ops/sample_tokens.h"

namespace py = pybind11;

namespace var_ext {

namespace {

using Stream = py::class_<CudaStream>;

// A kernel as a method: `params` checks the arguments, called `names`, and `run` launches.
template <class Params, class... Args, class... Names>
void def(Stream& s, const char* name, Params (*params)(Args...),
         void (*run)(const Params&, const CudaStream&), const Names&... names) {
    s.def(
        name, [=](const CudaStream& stream, Args... args) { run(params(args...), stream); },
        py::arg(names)..., py::call_guard<py::gil_scoped_release>(),
        "Launches what the function of the same name computes on the CPU.");
}

void def_resample(Stream& s, const char* name, void (*run)(const ResampleParams&, const CudaStream&),
                  const char* in, const char* out) {
    s.def(
        name,
        [=](const CudaStream& stream, const TensorView& source, const TensorView& target) {
            run(resample_params(name, in, source, out, target), stream);
        },
        py::arg(in), py::arg(out), py::call_guard<py::gil_scoped_release>(),
        "Launches what the function of the same name computes on the CPU.");
}

}  // namespace

void def_cuda_kernels(py::module_& m) {
    // local to the module: the emulator has a class of this name beside that of the extension
    Stream s(m, "CudaStream", py::module_local(), "Launches kernels on a stream of a device; does not wait.");
    s.def(py::init<int, uintptr_t>(), py::arg("device"), py::arg("handle"));
    def_resample(s, "area_downsample", cuda::area_downsample, "x", "out");
    def_resample(s, "area_downsample_backward", cuda::area_downsample_backward, "grad_out", "grad_in");
    def_resample(s, "bicubic_upsample", cuda::bicubic_upsample, "x", "out");
    def_resample(s, "bicubic_upsample_backward", cuda::bicubic_upsample_backward, "grad_out", "grad_in");
    def(s, "adaln", adaln_params, cuda::adaln, "x", "scale", "shift", "branch", "gate", "h", "y", "eps");
    def(s, "adaln_backward", adaln_backward_params, cuda::adaln_backward, "grad_y", "x", "scale", "grad_h",
        "branch", "gate", "grad_x", "grad_scale", "grad_shift", "grad_branch", "grad_gate", "scratch", "eps");
    def(s, "bias_gelu", bias_gelu_params, cuda::bias_gelu, "x", "bias", "out");
    def(s, "bias_gelu_backward", bias_gelu_backward_params, cuda::bias_gelu_backward, "grad", "x", "bias",
        "grad_x", "grad_bias", "scratch");
    def(s, "bias_residual", bias_residual_params, cuda::bias_residual, "h", "x", "bias", "out");
    def(s, "block_causal_attention", block_causal_attention_params, cuda::block_causal_attention, "q", "k",
        "v", "out", "lse", "patch_nums", "scale");
    def(s, "block_causal_attention_backward", block_causal_attention_backward_params,
        cuda::block_causal_attention_backward, "grad_out", "q", "k", "v", "out", "lse", "dq", "dk", "dv",
        "delta", "patch_nums", "scale");
    def(s, "cached_attention", cached_attention_params, cuda::cached_attention, "qkv", "q_bias", "v_bias",
        "log_scale", "k_cache", "v_cache", "out", "offset", "scale");
    def(s, "nearest_code", nearest_code_params, cuda::nearest_code, "x", "codebook", "out", "cosine",
        "scratch");
    def(s, "group_norm_silu", group_norm_silu_params, cuda::group_norm_silu, "x", "weight", "bias",
        "input_bias", "out", "stats", "scratch", "groups", "eps");
    def(s, "group_norm_silu_backward", group_norm_silu_backward_params, cuda::group_norm_silu_backward,
        "grad", "x", "weight", "bias", "input_bias", "grad_x", "grad_weight", "grad_bias", "stats", "means",
        "scratch", "groups", "eps");
    def(s, "qk_norm", qk_norm_params, cuda::qk_norm, "qkv", "q_bias", "v_bias", "log_scale", "q", "k", "v");
    def(s, "qk_norm_backward", qk_norm_backward_params, cuda::qk_norm_backward, "grad_q", "grad_k", "grad_v",
        "qkv", "q_bias", "log_scale", "grad_qkv", "grad_q_bias", "grad_v_bias", "grad_log_scale", "scratch");
    def(s, "quantize_rows", quantize_rows_params, cuda::quantize_rows, "x", "q", "scale");
    def(s, "sample_tokens", sample_tokens_params, cuda::sample_tokens, "logits", "seeds", "out",
        "scale_index", "cfg", "top_k", "top_p");
    def(s, "residual_quantize", residual_quantize_params, cuda::residual_quantize, "features", "codebook",
        "phi_weight", "phi_bias", "phi_index", "patch_nums", "ratio", "cosine", "tokens", "f_hat", "scales",
        "scratch");
    def(s, "residual_quantize_backward", residual_quantize_backward_params, cuda::residual_quantize_backward,
        "grad_scales", "tokens", "codebook", "phi_weight", "phi_index", "patch_nums", "ratio",
        "grad_codebook", "grad_weight", "grad_bias", "scratch");
    def(s, "residual_step", residual_step_params, cuda::residual_step, "f_hat", "embedding", "phi_weight",
        "phi_bias", "ratio", "out", "next");
    def(s, "residual_step_backward", residual_step_backward_params, cuda::residual_step_backward, "grad",
        "embedding", "phi_weight", "ratio", "grad_embedding", "grad_weight", "grad_bias", "scratch");
}

}  // namespace var_ext
