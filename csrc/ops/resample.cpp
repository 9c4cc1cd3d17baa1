#include "ops/resample.h"

#include <algorithm>

namespace var_ext {

ResampleParams resample_params(const char* op, const char* in_name, const TensorView& in,
                               const char* out_name, const TensorView& out) {
    check_dtype(op, in_name, in, {DType::float32, DType::float64, DType::bfloat16, DType::float16});
    check_dtype(op, out_name, out, {in.dtype});
    check_shape(op, in_name, in, {{"B", any_size}, {"C", any_size}, {"H", any_size}, {"W", any_size}});
    check_shape(op, out_name, out,
                {{"B", in.shape[0]}, {"C", in.shape[1]}, {"h", any_size}, {"w", any_size}});
    check_output(op, out_name, out);
    for (const TensorView* view : {&in, &out}) {
        if (view->shape[2] < 1 || view->shape[3] < 1) {
            contract_error(op, std::string(view == &in ? in_name : out_name) +
                                   " must have at least one pixel, got shape " + view->shape_text());
        }
    }
    ResampleParams p;
    p.in = in.data;
    p.out = out.data;
    p.dtype = in.dtype;
    p.batch = in.shape[0];
    p.channels = in.shape[1];
    p.in_h = in.shape[2];
    p.in_w = in.shape[3];
    p.out_h = out.shape[2];
    p.out_w = out.shape[3];
    std::copy(in.strides.begin(), in.strides.end(), p.in_strides);
    std::copy(out.strides.begin(), out.strides.end(), p.out_strides);
    return p;
}

}  // namespace var_ext
