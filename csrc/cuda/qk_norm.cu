#include "ops/qk_norm.h"

#include "cuda/launch.cuh"
#include "cuda/qk_norm.cuh"
#include "cuda/qk_norm_add.cuh"
#include "cuda/qk_norm_backward.cuh"
#include "cuda/qk_norm_backward_any.cuh"
#include "cuda/qk_norm_forward.cuh"

namespace var_ext::cuda {

namespace {

constexpr int any_place = -1;

// Can all heads be read and written in 16 bytes?
template <class Params, class Pointer>
bool is_aligned(const Params& p, const HeadsOf<Pointer>& heads) {
    const int64_t step = 16 / dtype_size(p.dtype);
    return at_16_bytes(heads.data) && (p.batch == 1 || heads.b % step == 0) &&
           (p.length == 1 || heads.l % step == 0) && (p.heads == 1 || heads.h % step == 0);
}

// Log2 of the lanes that hold a head, 16 bytes each; any_place where that does not divide it.
template <class Params>
int log_lanes_of(const Params& p) {
    for (int log_lanes = 0; log_lanes <= 5; ++log_lanes) {
        if (p.channels * dtype_size(p.dtype) == int64_t{16} << log_lanes) return log_lanes;
    }
    return any_place;
}

int log_lanes_of_all(const QkNormParams& p) {
    bool aligned = is_aligned(p, p.q_bias) && is_aligned(p, p.v_bias);
    for (int i = 0; i < 3; ++i) aligned = aligned && is_aligned(p, p.qkv[i]) && is_aligned(p, p.out[i]);
    return aligned ? log_lanes_of(p) : any_place;
}

int log_lanes_of_all(const QkNormBackwardParams& p) {
    bool aligned = is_aligned(p, p.q_bias);
    for (int i = 0; i < 3; ++i) {
        aligned = aligned && is_aligned(p, p.grad_out[i]) && is_aligned(p, p.qkv[i]) &&
                  is_aligned(p, p.grad_qkv[i]);
    }
    return aligned ? log_lanes_of(p) : any_place;
}

}  // namespace

bool has_aligned_rows(const QkNormParams& p) {
    return log_lanes_of_all(p) != any_place;
}

void launch_qk_norm(const char* op, const QkNormParams& p, const CudaStream& stream) {
    const uint32_t units = counted(op, "B * L * H", p.batch * p.length * p.heads);
    if (units == 0 || p.channels == 0) return;
    const int log_lanes = log_lanes_of_all(p);
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (log_lanes == any_place) {
            launch(op, stream, dim3(ceil_div(units, qk_norm_warps)), qk_norm_threads, 0,
                   qk_norm_any_kernel<T>, p, units);
        } else {
            launch(op, stream, dim3(ceil_div(units, qk_norm_threads >> log_lanes)), qk_norm_threads, 0,
                   qk_norm_aligned_kernel<T>, p, units, log_lanes);
        }
    });
}

void qk_norm(const QkNormParams& p, const CudaStream& stream) {
    launch_qk_norm("qk_norm", p, stream);
}

void qk_norm_backward(const QkNormBackwardParams& p, const CudaStream& stream) {
    const char* op = "qk_norm";
    counted(op, "B * L", p.batch * p.length);
    const uint32_t columns = counted(op, "H * (2 D + 1)", p.heads * (2 * p.channels + 1));
    if (columns == 0) return;
    if (p.scratch == nullptr) contract_error(op, "scratch must have shape (P, H, 2 D + 1) on CUDA, got none");
    const uint32_t tasks = counted(op, "P * H of scratch", p.partials * p.heads);
    const int log_lanes = log_lanes_of_all(p);
    for_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (log_lanes == any_place) {
            launch(op, stream, dim3(ceil_div(tasks, qk_norm_warps)), qk_norm_threads, 0,
                   qk_norm_backward_any_kernel<T>, p, tasks);
        } else {
            const uint32_t partials = static_cast<uint32_t>(p.partials);
            const uint32_t head_groups = ceil_div(static_cast<uint32_t>(p.heads), 32u >> log_lanes);
            launch(op, stream, dim3(partials * head_groups), qk_norm_threads,
                   qk_norm_warps * sums_of_warp<T> * sizeof(float), qk_norm_backward_aligned_kernel<T>, p,
                   head_groups, log_lanes);
        }
        launch(op, stream, dim3(ceil_div(columns, 32)), sum_columns_threads,
               sum_columns_threads * sizeof(float), qk_norm_add_kernel<T>, p);
    });
}

}  // namespace var_ext::cuda
