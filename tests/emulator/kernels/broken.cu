// Kernels that are wrong, one for each thing that the emulator claims to find, and some that are right.
#include <map>
#include <stdexcept>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "kernels.h"

namespace {

using namespace var_ext;

__device__ float* shared() {
    return reinterpret_cast<float*>(ptx::shared_memory());
}

// Right: each thread passes its value to another through shared memory.
__global__ void reverse(float* data, int count) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    __syncthreads();
    data[i] = shared()[count - 1 - i];
}

// Right: the same within each warp.
__global__ void reverse_in_warp(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    __syncwarp();
    data[i] = shared()[i ^ 31];
}

// Right: copies that are waited for, in two groups.
__global__ void copy(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    ptx::cp_async_16(shared() + 4 * i, data + 4 * i, true);
    ptx::cp_async_commit();
    ptx::cp_async_16(shared() + 512 + 4 * i, data, false);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    const float value = shared()[4 * (i ^ 33)];
    ptx::cp_async_wait<0>();
    __syncthreads();
    data[4 * i] = value + shared()[512 + 4 * (i ^ 33)];
}

// Right: sums by atomics.
__global__ void atomics(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x == 0) shared()[0] = 0.0f;
    __syncthreads();
    atomicAdd(shared(), 1.0f);
    __syncthreads();
    data[threadIdx.x] = shared()[0];
}

__global__ void device_overrun(float* data, int count) {
    ptx::wait_for_previous();
    data[threadIdx.x] = data[threadIdx.x + (threadIdx.x == 63 ? count - 63 : 0)];
}

__global__ void device_write_overrun(float* data, int count) {
    ptx::wait_for_previous();
    data[threadIdx.x == 63 ? count : threadIdx.x] = 1.0f;
}

__global__ void read_before_the_wait(float* data, int) {
    const float value = data[threadIdx.x];
    ptx::wait_for_previous();
    data[threadIdx.x] = value;
}

__global__ void left_before_the_wait(float* data, int) {
    if (threadIdx.x == 5) return;
    ptx::wait_for_previous();
    data[threadIdx.x] = 1.0f;
}

__global__ void no_wait(float*, int) {}

__global__ void shared_overrun(float* data, int) {
    ptx::wait_for_previous();
    shared()[threadIdx.x * 256] = data[0];
}

__global__ void misaligned(float* data, int) {
    ptx::wait_for_previous();
    const uint4 value = ptx::load_16(data + threadIdx.x);
    data[threadIdx.x] = static_cast<float>(value.x);
}

__global__ void misaligned_copy(float* data, int) {
    ptx::wait_for_previous();
    ptx::cp_async_16(shared() + threadIdx.x, data, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}

__global__ void unwritten(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x < 63) shared()[threadIdx.x] = 1.0f;
    __syncthreads();
    data[threadIdx.x] = shared()[threadIdx.x];
}

__global__ void no_barrier(float* data, int count) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    data[i] = shared()[count - 1 - i];
}

__global__ void warp_barrier_across_warps(float* data, int count) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    __syncwarp();
    data[i] = shared()[count - 1 - i];
}

__global__ void no_warp_barrier(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    data[i] = shared()[i ^ 31];
}

// A shuffle brings threads together but does not order their accesses of memory.
__global__ void shuffle_as_barrier(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    const float other = __shfl_xor_sync(0xffffffff, 1.0f, 1);
    data[i] = shared()[i ^ 31] + other;
}

__global__ void overwritten_too_soon(float* data, int count) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    shared()[i] = data[i];
    __syncthreads();
    const float value = shared()[count - 1 - i];
    shared()[i] = value;  // another thread may still have to read it
    data[i] = value;
}

__global__ void two_writers(float* data, int) {
    ptx::wait_for_previous();
    shared()[threadIdx.x / 2] = data[threadIdx.x];
}

__global__ void copy_without_wait(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    ptx::cp_async_16(shared() + 4 * i, data + 4 * i, true);
    ptx::cp_async_commit();
    data[4 * i] = shared()[4 * i];
}

__global__ void copy_waits_for_too_few(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    ptx::cp_async_16(shared() + 4 * i, data + 4 * i, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    data[4 * i] = shared()[4 * i];
}

__global__ void copy_without_barrier(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    ptx::cp_async_16(shared() + 4 * i, data + 4 * i, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    data[4 * i] = shared()[4 * (i ^ 33)];
}

__global__ void copy_over_a_tile_in_use(float* data, int) {
    ptx::wait_for_previous();
    const int i = threadIdx.x;
    ptx::store_16(shared() + 4 * i, ptx::load_16(data + 4 * i));
    __syncthreads();
    const float value = shared()[4 * (i ^ 33)];
    ptx::cp_async_16(shared() + 4 * i, data + 4 * i, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    data[4 * i] = value;
}

__global__ void copy_forgotten(float* data, int) {
    ptx::wait_for_previous();
    ptx::cp_async_16(shared() + 4 * threadIdx.x, data, true);
    ptx::cp_async_commit();
}

__global__ void barrier_for_some(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x < 40) __syncthreads();
    data[threadIdx.x] = 1.0f;
}

__global__ void left_before_barrier(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x == 5) return;
    __syncthreads();
    data[threadIdx.x] = 1.0f;
}

__global__ void two_barriers_at_once(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x < 32) {
        __syncthreads();
        data[0] = 1.0f;
    } else {
        __syncthreads();
        data[1] = 1.0f;
    }
}

__global__ void shuffle_for_some(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x != 7) data[threadIdx.x] = __shfl_sync(0xffffffff, data[threadIdx.x], 0);
}

__global__ void atomic_and_plain(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x == 0) shared()[0] = 0.0f;
    __syncthreads();
    atomicAdd(shared(), 1.0f);
    data[threadIdx.x] = shared()[0];
}

__global__ void atomic_overrun(float* data, int count) {
    ptx::wait_for_previous();
    atomicAdd(data + (threadIdx.x == 63 ? count : threadIdx.x), 1.0f);
}

__global__ void atomic_misaligned(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x < 32) shared()[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    atomicAdd(reinterpret_cast<float*>(ptx::shared_memory() + 2), 1.0f);
}

__global__ void strided(float* data, int) {
    ptx::wait_for_previous();
    // all lanes in one bank, then four lanes a bank
    shared()[threadIdx.x % 32 * 32 + threadIdx.x / 32] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = shared()[threadIdx.x % 32 * 32 + threadIdx.x / 32];
}

__global__ void matrix_rows_in_line(float* data, int) {
    ptx::wait_for_previous();
    // rows of 128 bytes: each begins in bank 0
    for (int i = threadIdx.x; i < 2048; i += 64) shared()[i] = 0.0f;
    __syncthreads();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, shared() + threadIdx.x % 8 * 32);
    data[threadIdx.x] = static_cast<float>(r[0]);
}

__global__ void count_blocks(float* data, int) {
    ptx::wait_for_previous();
    if (threadIdx.x == 0) data[blockIdx.x] = 1.0f;
}

__global__ void nothing(float*, int) {
    ptx::wait_for_previous();
}

struct Case {
    void (*kernel)(float*, int);
    unsigned threads = 64;
    size_t shared_bytes = 8192;
    unsigned blocks = 1;
};

const std::map<std::string, Case> cases = {
    {"reverse", {reverse}},
    {"reverse_in_warp", {reverse_in_warp}},
    {"copy", {copy}},
    {"atomics", {atomics}},
    {"device_overrun", {device_overrun}},
    {"device_write_overrun", {device_write_overrun}},
    {"read_before_the_wait", {read_before_the_wait}},
    {"left_before_the_wait", {left_before_the_wait}},
    {"no_wait", {no_wait}},
    {"shared_overrun", {shared_overrun}},
    {"misaligned", {misaligned}},
    {"misaligned_copy", {misaligned_copy}},
    {"unwritten", {unwritten}},
    {"no_barrier", {no_barrier}},
    {"warp_barrier_across_warps", {warp_barrier_across_warps}},
    {"no_warp_barrier", {no_warp_barrier}},
    {"shuffle_as_barrier", {shuffle_as_barrier}},
    {"overwritten_too_soon", {overwritten_too_soon}},
    {"two_writers", {two_writers}},
    {"copy_without_wait", {copy_without_wait}},
    {"copy_waits_for_too_few", {copy_waits_for_too_few}},
    {"copy_without_barrier", {copy_without_barrier}},
    {"copy_over_a_tile_in_use", {copy_over_a_tile_in_use}},
    {"copy_forgotten", {copy_forgotten}},
    {"barrier_for_some", {barrier_for_some}},
    {"left_before_barrier", {left_before_barrier}},
    {"two_barriers_at_once", {two_barriers_at_once}},
    {"shuffle_for_some", {shuffle_for_some}},
    {"atomic_and_plain", {atomic_and_plain}},
    {"atomic_overrun", {atomic_overrun}},
    {"atomic_misaligned", {atomic_misaligned}},
    {"strided", {strided}},
    {"matrix_rows_in_line", {matrix_rows_in_line}},
    {"count_blocks", {count_blocks, 64, 0, 1000}},
    {"too_many_threads", {nothing, 1056}},
    {"part_of_a_warp", {nothing, 48}},
    {"too_much_shared_memory", {nothing, 64, 200 * 1024}},
};

}  // namespace

void run_kernel(const std::string& name, uintptr_t data, int count) {
    const auto found = cases.find(name);
    if (found == cases.end()) throw std::invalid_argument("no kernel of this name: " + name);
    const auto& [kernel, threads, shared_bytes, blocks] = found->second;
    cuda::launch(name.c_str(), {0, 0}, dim3(blocks), threads, shared_bytes, kernel,
                 reinterpret_cast<float*>(data), count);
}
