// How a kernel becomes a Python function, on the CPU and on a stream of a GPU.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/stream.h"

namespace var_ext {

namespace py = pybind11;

template <class T>
struct Argument {
    static py::arg named(const std::string& name) { return py::arg(name.c_str()); }
};
template <class T>
struct Argument<std::optional<T>> {  // may be left out
    static py::arg_v named(const std::string& name) { return py::arg(name.c_str()) = py::none(); }
};

// Defines `name` in a module or class: a function of Args, which `names`, a word each, call in Python.
template <class... Args, class Scope, class Body, size_t... Index>
void def(Scope& scope, const char* name, const char* names, const char* doc, const Body& body,
         std::index_sequence<Index...>) {
    std::istringstream stream(names);
    const std::vector<std::string> words{std::istream_iterator<std::string>(stream), {}};
    if (words.size() != sizeof...(Args)) {
        throw std::logic_error(std::string(name) + ": " + std::to_string(sizeof...(Args)) +
                               " arguments, called \"" + names + "\"");
    }
    scope.def(name, body, Argument<Args>::named(words[Index])..., py::call_guard<py::gil_scoped_release>(),
              doc);
}

// A kernel on the CPU: `params` checks the arguments, `run` computes.
template <class Params, class... Args>
void def(py::module_& m, const char* name, const char* names, const char* doc, Params (*params)(Args...),
         void (*run)(const Params&)) {
    def<Args...>(
        m, name, names, doc, [=](Args... args) { run(params(args...)); }, std::index_sequence_for<Args...>());
}

// A kernel on a GPU: `run` launches it.
template <class Params, class... Args>
void def(py::class_<CudaStream>& stream, const char* name, const char* names, const char* doc,
         Params (*params)(Args...), void (*run)(const Params&, const CudaStream&)) {
    def<Args...>(
        stream, name, names, doc, [=](const CudaStream& on, Args... args) { run(params(args...), on); },
        std::index_sequence_for<Args...>());
}

// A function on the host.
template <class Result, class... Args>
void def(py::module_& m, const char* name, const char* names, const char* doc, Result (*run)(Args...)) {
    def<Args...>(m, name, names, doc, run, std::index_sequence_for<Args...>());
}

}  // namespace var_ext
