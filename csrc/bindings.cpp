// The Python face of the kernels. Tensors come as TensorView; contract errors leave as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "common/tensor_view.h"
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

#if defined(VAR_EXT_CUDA_VERSION)
#include "cuda/bindings.h"
#include "cuda/devices.h"
#endif

namespace py = pybind11;
using namespace var_ext;

namespace {

// A kernel as a Python function: `params` checks the arguments, called `names`, and `run` computes.
template <class Params, class... Args, class... Names>
void def(py::module_& m, const char* name, Params (*params)(Args...), void (*run)(const Params&),
         const char* doc, const Names&... names) {
    m.def(
        name, [=](Args... args) { run(params(args...)); }, py::arg(names)...,
        py::call_guard<py::gil_scoped_release>(), doc);
}

using Resample = void (*)(const ResampleParams&);

void def_resample(py::module_& m, const char* name, Resample cpu, const char* in, const char* out,
                  const char* doc) {
    m.def(
        name,
        [=](const TensorView& source, const TensorView& target) {
            cpu(resample_params(name, in, source, out, target));
        },
        py::arg(in), py::arg(out), py::call_guard<py::gil_scoped_release>(), doc);
}

py::dict build_info() {
    py::dict info;
    info["version"] = VAR_EXT_VERSION;
    info["compiler"] = VAR_EXT_COMPILER;
    info["build_type"] = VAR_EXT_BUILD_TYPE;
#if defined(VAR_EXT_CUDA_VERSION)
    info["cuda"] = VAR_EXT_CUDA_VERSION;
    info["cuda_targets"] = VAR_EXT_CUDA_TARGETS;
#else
    info["cuda"] = py::none();
    info["cuda_targets"] = py::none();
#endif
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
}

#if !defined(VAR_EXT_CUDA_VERSION)
std::vector<std::string> cuda_devices() {
    return {};
}
#endif

py::dict cpu_info() {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
    py::dict info;
    info["isa"] = names;
    info["selected"] = isa_name(current_isa());
    return info;
}

py::dict kernels() {
#if defined(VAR_EXT_CUDA_VERSION)
    const std::vector<std::string> devices = {"cpu", "cuda"};
#else
    const std::vector<std::string> devices = {"cpu"};
#endif
    py::dict table;  // a fresh one: callers may change theirs
    for (const char* op :
         {"adaln", "area_downsample", "bias_gelu", "bias_residual", "bicubic_upsample",
          "block_causal_attention", "cached_attention", "group_norm_silu", "nearest_code", "qk_norm",
          "quantize_rows", "residual_quantize", "residual_step", "sample_tokens"}) {
        table[op] = devices;
    }
    return table;
}

void def_kernels(py::module_& m) {
    def(m, "adaln", adaln_params, cpu::adaln,
        "y = LayerNorm(h) * (1 + scale) + shift, h = x + gate * branch or x.", "x", "scale", "shift",
        "branch", "gate", "h", "y", "eps");
    def(m, "adaln_backward", adaln_backward_params, cpu::adaln_backward, "Gradients of adaln.", "grad_y", "x",
        "scale", "grad_h", "branch", "gate", "grad_x", "grad_scale", "grad_shift", "grad_branch", "grad_gate",
        "scratch", "eps");
    def_resample(m, "area_downsample", cpu::area_downsample, "x", "out",
                 "(B, C, H, W) -> (B, C, h, w): window means.");
    def_resample(m, "area_downsample_backward", cpu::area_downsample_backward, "grad_out", "grad_in",
                 "The transposed map: (B, C, h, w) -> (B, C, H, W).");
    def(m, "bias_gelu", bias_gelu_params, cpu::bias_gelu,
        "GELU(x + bias), tanh form: (..., C), (C,) -> (..., C).", "x", "bias", "out");
    def(m, "bias_gelu_backward", bias_gelu_backward_params, cpu::bias_gelu_backward,
        "Gradients of bias_gelu.", "grad", "x", "bias", "grad_x", "grad_bias", "scratch");
    def(m, "bias_residual", bias_residual_params, cpu::bias_residual,
        "h + bias + x: (B, C, H, W), (B, C, H, W), (C,) -> (B, C, H, W).", "h", "x", "bias", "out");
    def_resample(m, "bicubic_upsample", cpu::bicubic_upsample, "x", "out",
                 "(B, C, H, W) -> (B, C, h, w): cubic, a = -0.75.");
    def_resample(m, "bicubic_upsample_backward", cpu::bicubic_upsample_backward, "grad_out", "grad_in",
                 "The transposed map: (B, C, h, w) -> (B, C, H, W).");
    def(m, "block_causal_attention", block_causal_attention_params, cpu::block_causal_attention,
        "(B, L, H, D) each -> (B, L, H, D) and the log-sum-exp (B, H, L).", "q", "k", "v", "out", "lse",
        "patch_nums", "scale");
    def(m, "block_causal_attention_backward", block_causal_attention_backward_params,
        cpu::block_causal_attention_backward, "Gradients of q, k and v, (B, L, H, D) each.", "grad_out", "q",
        "k", "v", "out", "lse", "dq", "dk", "dv", "delta", "patch_nums", "scale");
    def(m, "cached_attention", cached_attention_params, cpu::cached_attention,
        "qk_norm of (B, l, 3, H, D) into caches (B, Lmax, H, D) at `offset`, and attention to all before: "
        "(B, l, H, D).",
        "qkv", "q_bias", "v_bias", "log_scale", "k_cache", "v_cache", "out", "offset", "scale");
    def(m, "group_norm_silu", group_norm_silu_params, cpu::group_norm_silu,
        "SiLU(GroupNorm(x)): (B, C, H, W) -> (B, C, H, W).", "x", "weight", "bias", "input_bias", "out",
        "stats", "scratch", "groups", "eps");
    def(m, "group_norm_silu_backward", group_norm_silu_backward_params, cpu::group_norm_silu_backward,
        "Gradients of group_norm_silu.", "grad", "x", "weight", "bias", "input_bias", "grad_x", "grad_weight",
        "grad_bias", "stats", "means", "scratch", "groups", "eps");
    def(m, "nearest_code", nearest_code_params, cpu::nearest_code,
        "Index of the nearest codebook entry: (N, C), (V, C) -> (N,).", "x", "codebook", "out", "cosine",
        "scratch");
    m.def("nearest_code_scratch", nearest_code_scratch, py::arg("n"), py::arg("v"), py::arg("c"),
          py::arg("filter") = py::none(), "Floats of scratch memory that nearest_code needs on CUDA.");
    def(m, "qk_norm", qk_norm_params, cpu::qk_norm,
        "(B, L, 3, H, D) -> q, k, v, (B, L, H, D) each: biases, L2 norm, scale.", "qkv", "q_bias", "v_bias",
        "log_scale", "q", "k", "v");
    def(m, "qk_norm_backward", qk_norm_backward_params, cpu::qk_norm_backward, "Gradients of qk_norm.",
        "grad_q", "grad_k", "grad_v", "qkv", "q_bias", "log_scale", "grad_qkv", "grad_q_bias", "grad_v_bias",
        "grad_log_scale", "scratch");
    def(m, "quantize_rows", quantize_rows_params, cpu::quantize_rows,
        "(R, C) -> (R, C) uint8 around 128 and a scale a row, (R,).", "x", "q", "scale");
    def(m, "residual_quantize", residual_quantize_params, cpu::residual_quantize,
        "All scales of the quantizer.", "features", "codebook", "phi_weight", "phi_bias", "phi_index",
        "patch_nums", "ratio", "cosine", "tokens", "f_hat", "scales", "scratch");
    def(m, "residual_quantize_backward", residual_quantize_backward_params, cpu::residual_quantize_backward,
        "The gradients of `scales`.", "grad_scales", "tokens", "codebook", "phi_weight", "phi_index",
        "patch_nums", "ratio", "grad_codebook", "grad_weight", "grad_bias", "scratch");
    m.def("residual_quantize_scratch", residual_quantize_scratch, py::arg("batch"), py::arg("channels"),
          py::arg("codes"), py::arg("patch_nums"),
          "Floats of scratch memory that residual_quantize needs on CUDA.");
    m.def("residual_quantize_backward_scratch", residual_quantize_backward_scratch, py::arg("batch"),
          py::arg("channels"), py::arg("patch_nums"),
          "Floats of scratch memory that residual_quantize_backward needs on CUDA.");
    def(m, "residual_step", residual_step_params, cpu::residual_step,
        "out = f_hat + phi(bicubic(embedding)), next = area(out).", "f_hat", "embedding", "phi_weight",
        "phi_bias", "ratio", "out", "next");
    def(m, "residual_step_backward", residual_step_backward_params, cpu::residual_step_backward,
        "The gradients of phi(bicubic(embedding)).", "grad", "embedding", "phi_weight", "ratio",
        "grad_embedding", "grad_weight", "grad_bias", "scratch");
    m.def("residual_step_scratch", residual_step_scratch, py::arg("batch"), py::arg("channels"),
          py::arg("height"), py::arg("width"),
          "Floats of scratch memory that residual_step_backward needs on CUDA.");
    def(m, "sample_tokens", sample_tokens_params, cpu::sample_tokens,
        "One token a row: (B, L, V) or guided (2B, L, V), (B,) -> (B, L).", "logits", "seeds", "out",
        "scale_index", "cfg", "top_k", "top_p");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of var_ext. Use the functions of var_ext.ops: they check, dispatch and differentiate.";
    force_isa_from_environment();

    py::enum_<DType>(m, "DType", "Element type of a TensorView.")
        .value("float32", DType::float32)
        .value("float64", DType::float64)
        .value("bfloat16", DType::bfloat16)
        .value("float16", DType::float16)
        .value("int64", DType::int64)
        .value("uint8", DType::uint8);
    py::class_<TensorView>(m, "TensorView", "A borrowed strided tensor; strides are in elements.")
        .def(py::init<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, DType>(), py::arg("ptr"),
             py::arg("shape"), py::arg("strides"), py::arg("dtype"))
        .def_property_readonly("ptr",
                               [](const TensorView& view) { return reinterpret_cast<uintptr_t>(view.data); })
        .def_readonly("shape", &TensorView::shape)
        .def_readonly("strides", &TensorView::strides)
        .def_readonly("dtype", &TensorView::dtype);

    def_kernels(m);
#if defined(VAR_EXT_CUDA_VERSION)
    def_cuda_kernels(m);
#endif

    m.def("build_info", build_info, "How this extension was built.");
    m.def("cpu_info", cpu_info, "Variants that run here, and the selected one.");
    m.def("kernels", kernels, "Ops of this build and the device types that they run on.");
    m.def(
        "cuda_devices", cuda_devices, py::call_guard<py::gil_scoped_release>(),
        "GPUs that this process can see, e.g. \"NVIDIA H100 (sm_90)\"; empty without any or in a CPU build.");
    m.def("isa", [] { return isa_name(current_isa()); }, "The selected variant.");
    m.def("set_isa", force_isa, py::arg("name"), "Force a variant; ValueError if it is not supported here.");
}
