// The Python face of the kernels. Tensors come as TensorView; contract errors leave as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "common/tensor_view.h"
#include "ops/adaln.h"
#include "ops/area_downsample.h"
#include "ops/bias_gelu.h"
#include "ops/bicubic_upsample.h"
#include "ops/group_norm_silu.h"
#include "ops/nearest_code.h"
#include "ops/qk_norm.h"
#include "ops/sample_tokens.h"

#if defined(VAR_EXT_CUDA_VERSION)
#include "cuda/devices.h"
#endif

namespace py = pybind11;
using namespace var_ext;

namespace {

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

using View = const TensorView&;
using MaybeView = const TensorView*;  // None is null

void def_adaln(py::module_& m) {
    m.def(
        "adaln",
        [](View x, View scale, View shift, MaybeView branch, MaybeView gate, MaybeView h, View y,
           double eps) { cpu::adaln(adaln_params(x, scale, shift, branch, gate, h, y, eps)); },
        py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("branch"), py::arg("gate"), py::arg("h"),
        py::arg("y"), py::arg("eps"), py::call_guard<py::gil_scoped_release>(),
        "y = LayerNorm(h) * (1 + scale) + shift, h = x + gate * branch or x.");
    m.def(
        "adaln_backward",
        [](View grad_y, View x, View scale, MaybeView grad_h, MaybeView branch, MaybeView gate, View grad_x,
           View grad_scale, View grad_shift, MaybeView grad_branch, MaybeView grad_gate, double eps) {
            cpu::adaln_backward(adaln_backward_params(grad_y, x, scale, grad_h, branch, gate, grad_x,
                                                      grad_scale, grad_shift, grad_branch, grad_gate, eps));
        },
        py::arg("grad_y"), py::arg("x"), py::arg("scale"), py::arg("grad_h"), py::arg("branch"),
        py::arg("gate"), py::arg("grad_x"), py::arg("grad_scale"), py::arg("grad_shift"),
        py::arg("grad_branch"), py::arg("grad_gate"), py::arg("eps"),
        py::call_guard<py::gil_scoped_release>(), "Gradients of adaln.");
}

void def_qk_norm(py::module_& m) {
    m.def(
        "qk_norm",
        [](View qkv, View q_bias, View v_bias, MaybeView log_scale, View q, View k, View v, int64_t offset) {
            cpu::qk_norm(qk_norm_params(qkv, q_bias, v_bias, log_scale, q, k, v, offset));
        },
        py::arg("qkv"), py::arg("q_bias"), py::arg("v_bias"), py::arg("log_scale"), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("offset"), py::call_guard<py::gil_scoped_release>(),
        "(B, L, 3, H, D) -> q, and k and v from entry `offset` on: biases, L2 norm, scale.");
    m.def(
        "qk_norm_backward",
        [](View grad_q, View grad_k, View grad_v, View qkv, View q_bias, MaybeView log_scale, View grad_qkv,
           View grad_q_bias, View grad_v_bias, MaybeView grad_log_scale) {
            cpu::qk_norm_backward(qk_norm_backward_params(grad_q, grad_k, grad_v, qkv, q_bias, log_scale,
                                                          grad_qkv, grad_q_bias, grad_v_bias,
                                                          grad_log_scale));
        },
        py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("qkv"), py::arg("q_bias"),
        py::arg("log_scale"), py::arg("grad_qkv"), py::arg("grad_q_bias"), py::arg("grad_v_bias"),
        py::arg("grad_log_scale"), py::call_guard<py::gil_scoped_release>(), "Gradients of qk_norm.");
}

py::dict build_info() {
    py::dict info;
    info["version"] = VAR_EXT_VERSION;
    info["compiler"] = VAR_EXT_COMPILER;
    info["build_type"] = VAR_EXT_BUILD_TYPE;
#if defined(VAR_EXT_CUDA_VERSION)
    info["cuda"] = VAR_EXT_CUDA_VERSION;
#else
    info["cuda"] = py::none();
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
    py::dict table;  // a fresh one: callers may change theirs
    for (const char* op : {"adaln", "area_downsample", "bias_gelu", "bicubic_upsample", "group_norm_silu",
                           "nearest_code", "qk_norm", "sample_tokens"}) {
        table[op] = std::vector<std::string>{"cpu"};
    }
    return table;
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
        .value("int64", DType::int64);
    py::class_<TensorView>(m, "TensorView", "A borrowed strided tensor; strides are in elements.")
        .def(py::init<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, DType>(), py::arg("ptr"),
             py::arg("shape"), py::arg("strides"), py::arg("dtype"))
        .def_readonly("shape", &TensorView::shape)
        .def_readonly("strides", &TensorView::strides)
        .def_readonly("dtype", &TensorView::dtype);

    m.def(
        "nearest_code",
        [](const TensorView& x, const TensorView& codebook, const TensorView& out, bool cosine) {
            cpu::nearest_code(nearest_code_params(x, codebook, out, cosine));
        },
        py::arg("x"), py::arg("codebook"), py::arg("out"), py::arg("cosine"),
        py::call_guard<py::gil_scoped_release>(),
        "Index of the nearest codebook entry: (N, C), (V, C) -> (N,).");
    def_adaln(m);
    def_qk_norm(m);
    def_resample(m, "area_downsample", cpu::area_downsample, "x", "out",
                 "(B, C, H, W) -> (B, C, h, w): window means.");
    def_resample(m, "area_downsample_backward", cpu::area_downsample_backward, "grad_out", "grad_in",
                 "The transposed map: (B, C, h, w) -> (B, C, H, W).");
    def_resample(m, "bicubic_upsample", cpu::bicubic_upsample, "x", "out",
                 "(B, C, H, W) -> (B, C, h, w): cubic, a = -0.75.");
    def_resample(m, "bicubic_upsample_backward", cpu::bicubic_upsample_backward, "grad_out", "grad_in",
                 "The transposed map: (B, C, h, w) -> (B, C, H, W).");

    m.def(
        "sample_tokens",
        [](const TensorView& logits, const TensorView& seeds, const TensorView& out, int64_t scale_index,
           std::optional<double> cfg, int64_t top_k, double top_p) {
            cpu::sample_tokens(sample_tokens_params(logits, seeds, out, scale_index, cfg, top_k, top_p));
        },
        py::arg("logits"), py::arg("seeds"), py::arg("out"), py::arg("scale_index"), py::arg("cfg"),
        py::arg("top_k"), py::arg("top_p"), py::call_guard<py::gil_scoped_release>(),
        "One token a row: (B, L, V) or guided (2B, L, V), (B,) -> (B, L).");
    m.def(
        "group_norm_silu",
        [](const TensorView& x, const TensorView& weight, const TensorView& bias, const TensorView& out,
           int64_t groups,
           double eps) { cpu::group_norm_silu(group_norm_silu_params(x, weight, bias, out, groups, eps)); },
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("groups"), py::arg("eps"),
        py::call_guard<py::gil_scoped_release>(), "SiLU(GroupNorm(x)): (B, C, H, W) -> (B, C, H, W).");
    m.def(
        "group_norm_silu_backward",
        [](const TensorView& grad, const TensorView& x, const TensorView& weight, const TensorView& bias,
           const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad_bias,
           int64_t groups, double eps) {
            cpu::group_norm_silu_backward(group_norm_silu_backward_params(
                grad, x, weight, bias, grad_x, grad_weight, grad_bias, groups, eps));
        },
        py::arg("grad"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("grad_x"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("groups"), py::arg("eps"),
        py::call_guard<py::gil_scoped_release>(), "Gradients of group_norm_silu.");

    m.def(
        "bias_gelu",
        [](const TensorView& x, const TensorView& bias, const TensorView& out) {
            cpu::bias_gelu(bias_gelu_params(x, bias, out));
        },
        py::arg("x"), py::arg("bias"), py::arg("out"), py::call_guard<py::gil_scoped_release>(),
        "GELU(x + bias), tanh form: (..., C), (C,) -> (..., C).");
    m.def(
        "bias_gelu_backward",
        [](const TensorView& grad, const TensorView& x, const TensorView& bias, const TensorView& grad_x,
           const TensorView& grad_bias) {
            cpu::bias_gelu_backward(bias_gelu_backward_params(grad, x, bias, grad_x, grad_bias));
        },
        py::arg("grad"), py::arg("x"), py::arg("bias"), py::arg("grad_x"), py::arg("grad_bias"),
        py::call_guard<py::gil_scoped_release>(), "Gradients of bias_gelu.");

    m.def("build_info", build_info, "How this extension was built.");
    m.def("cpu_info", cpu_info, "Variants that run here, and the selected one.");
    m.def("kernels", kernels, "Ops of this build and the device types that they run on.");
    m.def(
        "cuda_devices", cuda_devices, py::call_guard<py::gil_scoped_release>(),
        "GPUs that this process can see, e.g. \"NVIDIA H100 (sm_90)\"; empty without any or in a CPU build.");
    m.def("isa", [] { return isa_name(current_isa()); }, "The selected variant.");
    m.def("set_isa", force_isa, py::arg("name"), "Force a variant; ValueError if it is not supported here.");
}
