// Kernels that test the emulator itself.
#pragma once

#include <cstdint>
#include <string>

void run_kernel(const std::string& name, uintptr_t data, int count);
void run_probe(const std::string& name, uintptr_t data);
