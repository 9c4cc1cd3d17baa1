// The Python face of the kernels. Tensors come as TensorView; contract errors leave as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "common/tensor_view.h"
#include "ops/area_downsample.h"
#include "ops/bicubic_upsample.h"
#include "ops/block_causal_attention.h"
#include "ops/cached_attention.h"
#include "ops/nearest_code.h"

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
    for (const char* op : {"nearest_code", "area_downsample", "bicubic_upsample", "block_causal_attention",
                           "cached_attention"}) {
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
        "block_causal_attention",
        [](const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
           const TensorView& lse, const std::vector<int64_t>& patch_nums, float scale) {
            cpu::block_causal_attention(block_causal_attention_params(q, k, v, out, lse, patch_nums, scale));
        },
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("patch_nums"),
        py::arg("scale"), py::call_guard<py::gil_scoped_release>(),
        "(B, L, H, D) each -> (B, L, H, D) and the log-sum-exp (B, H, L).");
    m.def(
        "block_causal_attention_backward",
        [](const TensorView& grad_out, const TensorView& q, const TensorView& k, const TensorView& v,
           const TensorView& out, const TensorView& lse, const TensorView& dq, const TensorView& dk,
           const TensorView& dv, const std::vector<int64_t>& patch_nums, float scale) {
            cpu::block_causal_attention_backward(block_causal_attention_backward_params(
                grad_out, q, k, v, out, lse, dq, dk, dv, patch_nums, scale));
        },
        py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("patch_nums"), py::arg("scale"),
        py::call_guard<py::gil_scoped_release>(), "Gradients of q, k and v, (B, L, H, D) each.");
    m.def(
        "cached_attention",
        [](const TensorView& q, const TensorView& k_cache, const TensorView& v_cache, const TensorView& out,
           int64_t length, float scale) {
            cpu::cached_attention(cached_attention_params(q, k_cache, v_cache, out, length, scale));
        },
        py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("out"), py::arg("length"),
        py::arg("scale"), py::call_guard<py::gil_scoped_release>(),
        "(B, Lq, H, D) against the first `length` of (B, Lmax, H, D) -> (B, Lq, H, D).");

    m.def("build_info", build_info, "How this extension was built.");
    m.def("cpu_info", cpu_info, "Variants that run here, and the selected one.");
    m.def("kernels", kernels, "Ops of this build and the device types that they run on.");
    m.def(
        "cuda_devices", cuda_devices, py::call_guard<py::gil_scoped_release>(),
        "GPUs that this process can see, e.g. \"NVIDIA H100 (sm_90)\"; empty without any or in a CPU build.");
    m.def("isa", [] { return isa_name(current_isa()); }, "The selected variant.");
    m.def("set_isa", force_isa, py::arg("name"), "Force a variant; ValueError if it is not supported here.");
}
