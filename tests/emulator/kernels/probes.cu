// Single instructions on values of the caller's choice: their layouts are checked from Python.
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "kernels.h"

namespace {

using namespace var_ext;

// A lane's numbers lie side by side: 8 of a, 4 of b, 4 of d; d is replaced.
template <class T>
__global__ void mma(float* data) {
    ptx::wait_for_previous();
    float* mine = data + threadIdx.x * 16;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = cuda::pack<T>(mine[2 * i], mine[2 * i + 1]);
    for (int i = 0; i < 2; ++i) b[i] = cuda::pack<T>(mine[8 + 2 * i], mine[9 + 2 * i]);
    float d[4] = {mine[12], mine[13], mine[14], mine[15]};
    ptx::mma_16816<T>(d, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) mine[12 + i] = d[i];
}

// Four matrices of 8 x 8 numbers, one after another, become 8 numbers a lane.
template <bool transposed>
__global__ void ldmatrix(float* data) {
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<uint32_t*>(ptx::shared_memory());
    const int lane = threadIdx.x;
    for (int i = 0; i < 4; ++i) {
        const int pair = lane * 4 + i;
        shared[pair] = cuda::pack<__half>(data[2 * pair], data[2 * pair + 1]);
    }
    __syncthreads();
    uint32_t r[4];
    if (transposed) {
        ptx::ldmatrix_x4_trans(r, shared + lane * 4);
    } else {
        ptx::ldmatrix_x4(r, shared + lane * 4);
    }
    for (int i = 0; i < 4; ++i) {
        const float2 pair = cuda::unpack<__half>(r[i]);
        data[lane * 8 + 2 * i] = pair.x;
        data[lane * 8 + 2 * i + 1] = pair.y;
    }
}

// The four kinds of shuffle by 1 or of lane 3, then the ballot of odd lanes in two halves.
__global__ void collectives(float* data) {
    ptx::wait_for_previous();
    const float mine = data[threadIdx.x];
    float* out = data + threadIdx.x * 6;
    const float got[4] = {__shfl_sync(0xffffffff, mine, 3), __shfl_xor_sync(0xffffffff, mine, 1, 8),
                          __shfl_down_sync(0xffffffff, mine, 1), __shfl_up_sync(0xffffffff, mine, 1)};
    const unsigned ballot = __ballot_sync(0xffffffff, threadIdx.x % 2 == 1);
    __syncthreads();
    for (int i = 0; i < 4; ++i) out[i] = got[i];
    out[4] = static_cast<float>(ballot >> 16);
    out[5] = static_cast<float>(ballot & 0xffff);
}

}  // namespace

void run_probe(const std::string& name, uintptr_t address) {
    auto* data = reinterpret_cast<float*>(address);
    const auto run = [&](void (*kernel)(float*)) {
        cuda::launch(name.c_str(), {0, 0}, dim3(1), 32, 1024, kernel, data);
    };
    if (name == "mma_bf16") return run(mma<__nv_bfloat16>);
    if (name == "mma_fp16") return run(mma<__half>);
    if (name == "ldmatrix") return run(ldmatrix<false>);
    if (name == "ldmatrix_trans") return run(ldmatrix<true>);
    if (name == "collectives") return run(collectives);
    throw std::invalid_argument("no probe of this name: " + name);
}
