#include "cuda/bindings.h"

#include "common/bindings.h"
#include "ops/kernels.h"

namespace var_ext {

void def_cuda_kernels(py::module_& m) {
    // local to the module: the emulator has a class of this name beside that of the extension
    py::class_<CudaStream> stream(m, "CudaStream", py::module_local(),
                                  "Launches kernels on a stream of a device; does not wait.");
    stream.def(py::init<int, uintptr_t>(), py::arg("device"), py::arg("handle"));
#define KERNEL(name, names, doc) def(stream, #name, names, doc, name##_params, cuda::name);
#define CPU_KERNEL(name, names, doc)
#define FUNCTION(name, names, doc)
    VAR_EXT_KERNELS(KERNEL, CPU_KERNEL, FUNCTION)
#undef KERNEL
#undef CPU_KERNEL
#undef FUNCTION
}

}  // namespace var_ext
