// The Python face of the kernels. Tensors come as TensorView; contract errors leave as ValueError.
#include <string_view>

#include "common/bindings.h"
#include "common/cpu_features.h"
#include "common/tensor_view.h"
#include "ops/kernels.h"

#if defined(VAR_EXT_CUDA_VERSION)
#include "cuda/bindings.h"
#include "cuda/devices.h"
#endif

using namespace var_ext;

namespace {

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

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

py::dict kernels() {
#if defined(VAR_EXT_CUDA_VERSION)
    const std::vector<std::string> devices = {"cpu", "cuda"};
#else
    const std::vector<std::string> devices = {"cpu"};
#endif
    py::dict table;  // a fresh one: callers may change theirs
#define KERNEL(name, names, doc) \
    if (!ends_with(#name, "_backward")) table[#name] = devices;
#define CPU_KERNEL(name, names, doc) \
    if (!ends_with(#name, "_backward")) table[#name] = std::vector<std::string>{"cpu"};
#define FUNCTION(name, names, doc)
    VAR_EXT_KERNELS(KERNEL, CPU_KERNEL, FUNCTION)
#undef KERNEL
#undef CPU_KERNEL
#undef FUNCTION
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

#define KERNEL(name, names, doc) def(m, #name, names, doc, name##_params, cpu::name);
#define CPU_KERNEL KERNEL
#define FUNCTION(name, names, doc) def(m, #name, names, doc, name);
    VAR_EXT_KERNELS(KERNEL, CPU_KERNEL, FUNCTION)
#undef KERNEL
#undef CPU_KERNEL
#undef FUNCTION
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
    m.def("multiplies_faster", multiplies_faster, py::arg("bf16"),
          "Whether linear is faster here than torch's products, with factors of bfloat16 or float32.");
    m.def("set_isa", force_isa, py::arg("name"), "Force a variant; ValueError if it is not supported here.");
}
