// The Python face of the kernels. Tensors come as TensorView; contract errors leave as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "common/tensor_view.h"
#include "ops/area_downsample.h"
#include "ops/bicubic_upsample.h"
#include "ops/nearest_code.h"
#include "ops/residual_quantize.h"
#include "ops/residual_step.h"

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
    for (const char* op :
         {"nearest_code", "area_downsample", "bicubic_upsample", "residual_step", "residual_quantize"}) {
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
    def_resample(m, "area_downsample", cpu::area_downsample, "x", "out",
                 "(B, C, H, W) -> (B, C, h, w): window means.");
    def_resample(m, "area_downsample_backward", cpu::area_downsample_backward, "grad_out", "grad_in",
                 "The transposed map: (B, C, h, w) -> (B, C, H, W).");
    def_resample(m, "bicubic_upsample", cpu::bicubic_upsample, "x", "out",
                 "(B, C, H, W) -> (B, C, h, w): cubic, a = -0.75.");
    def_resample(m, "bicubic_upsample_backward", cpu::bicubic_upsample_backward, "grad_out", "grad_in",
                 "The transposed map: (B, C, h, w) -> (B, C, H, W).");

    m.def(
        "residual_step",
        [](const TensorView& f_hat, const TensorView& embedding, const TensorView& phi_weight,
           const TensorView& phi_bias, double ratio, const TensorView& out, const TensorView* next) {
            cpu::residual_step(
                residual_step_params(f_hat, embedding, phi_weight, phi_bias, ratio, out, next));
        },
        py::arg("f_hat"), py::arg("embedding"), py::arg("phi_weight"), py::arg("phi_bias"), py::arg("ratio"),
        py::arg("out"), py::arg("next"), py::call_guard<py::gil_scoped_release>(),
        "out = f_hat + phi(bicubic(embedding)), next = area(out).");
    m.def(
        "residual_step_backward",
        [](const TensorView& grad, const TensorView& embedding, const TensorView& phi_weight, double ratio,
           const TensorView* grad_embedding, const TensorView* grad_weight, const TensorView* grad_bias) {
            cpu::residual_step_backward(residual_step_backward_params(
                grad, embedding, phi_weight, ratio, grad_embedding, grad_weight, grad_bias));
        },
        py::arg("grad"), py::arg("embedding"), py::arg("phi_weight"), py::arg("ratio"),
        py::arg("grad_embedding"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::call_guard<py::gil_scoped_release>(), "The gradients of phi(bicubic(embedding)).");
    m.def(
        "residual_quantize",
        [](const TensorView& features, const TensorView& codebook, const TensorView& phi_weight,
           const TensorView& phi_bias, const std::vector<int64_t>& phi_index,
           const std::vector<int64_t>& patch_nums, double ratio, bool cosine, const TensorView& tokens,
           const TensorView& f_hat, const TensorView* scales) {
            cpu::residual_quantize(residual_quantize_params(features, codebook, phi_weight, phi_bias,
                                                            phi_index, patch_nums, ratio, cosine, tokens,
                                                            f_hat, scales));
        },
        py::arg("features"), py::arg("codebook"), py::arg("phi_weight"), py::arg("phi_bias"),
        py::arg("phi_index"), py::arg("patch_nums"), py::arg("ratio"), py::arg("cosine"), py::arg("tokens"),
        py::arg("f_hat"), py::arg("scales"), py::call_guard<py::gil_scoped_release>(),
        "All scales of the quantizer.");
    m.def(
        "residual_quantize_backward",
        [](const TensorView& grad_scales, const TensorView& tokens, const TensorView& codebook,
           const TensorView& phi_weight, const std::vector<int64_t>& phi_index,
           const std::vector<int64_t>& patch_nums, double ratio, const TensorView& grad_codebook,
           const TensorView& grad_weight, const TensorView& grad_bias) {
            cpu::residual_quantize_backward(
                residual_quantize_backward_params(grad_scales, tokens, codebook, phi_weight, phi_index,
                                                  patch_nums, ratio, grad_codebook, grad_weight, grad_bias));
        },
        py::arg("grad_scales"), py::arg("tokens"), py::arg("codebook"), py::arg("phi_weight"),
        py::arg("phi_index"), py::arg("patch_nums"), py::arg("ratio"), py::arg("grad_codebook"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::call_guard<py::gil_scoped_release>(),
        "The gradients of `scales`.");

    m.def("build_info", build_info, "How this extension was built.");
    m.def("cpu_info", cpu_info, "Variants that run here, and the selected one.");
    m.def("kernels", kernels, "Ops of this build and the device types that they run on.");
    m.def(
        "cuda_devices", cuda_devices, py::call_guard<py::gil_scoped_release>(),
        "GPUs that this process can see, e.g. \"NVIDIA H100 (sm_90)\"; empty without any or in a CPU build.");
    m.def("isa", [] { return isa_name(current_isa()); }, "The selected variant.");
    m.def("set_isa", force_isa, py::arg("name"), "Force a variant; ValueError if it is not supported here.");
}
