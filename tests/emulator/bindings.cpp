// The emulated kernels as a Python module: CudaStream with the methods of the extension's, and the machine's
// knobs.
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include "kernels/kernels.h"
#include "state.h"

namespace py = pybind11;
using namespace emulator;

PYBIND11_MODULE(_emulated, m) {
    m.doc() = "CUDA kernels of var_ext on a SIMT emulator.";
    py::register_exception<Error>(m, "EmulatorError", PyExc_RuntimeError);
    var_ext::def_cuda_kernels(m);

    m.def(
        "begin",
        [](const std::string& op, const std::vector<std::pair<uintptr_t, size_t>>& memory) {
            machine.op = op;
            machine.allowed.clear();
            for (const auto& [address, bytes] : memory) machine.allowed.push_back({address, address + bytes});
        },
        py::arg("op"), py::arg("memory"),
        "Names the op of the launches to come, and the memory that they may touch.");
    m.def(
        "seed", [](uint32_t seed) { machine.random.seed(seed); }, "Chooses the order of threads and blocks.");
    m.def(
        "trace",
        [](bool on) {
            machine.trace = on;
            forget_conflicts();
        },
        "Whether to look for bank conflicts.");
    m.def(
        "conflicts",
        [] {
            std::vector<std::tuple<std::string, unsigned, uint64_t>> found;
            for (const Conflict& c : conflicts()) found.emplace_back(c.where, c.ways, c.times);
            return found;
        },
        "(op, block, thread and line of the first, ways, times) of each instruction that had some; forgets "
        "them.");
    m.def(
        "sample", [](uint64_t blocks) { machine.sample = blocks; },
        "Runs only so many blocks of each launch, the first and the last among them; 0: all.");
    m.def(
        "multiprocessors", [](int count) { machine.multiprocessors = count; },
        "How many multiprocessors the chip pretends to have; 108 to begin with.");
    m.def("multiprocessors", emulator::multiprocessors);
    m.def("chip", choose_chip, py::arg("target"),
          "Chooses the shared memory that a block may have: that of 80, to begin with, 86, 89, 90 or 120.");
    m.def(
        "usage",
        [] {
            std::vector<std::tuple<std::string, unsigned, size_t>> found;
            for (const auto& [kernel, usage] : machine.usage)
                found.emplace_back(function_at(kernel), usage.threads, usage.shared_bytes);
            return found;
        },
        "(signature, threads, bytes of shared memory) of each kernel launched so far.");
    m.def("launches", [] { return machine.launches; }, "Kernels launched so far.");
    m.def("run", run_kernel, py::arg("name"), py::arg("data"), py::arg("count"),
          "Launches one of kernels/broken.cu on floats.");
    m.def("probe", run_probe, py::arg("name"), py::arg("data"),
          "Launches one of kernels/probes.cu on floats.");
}
