// Layouts of image maps (B, C, H, W): contiguous, or channels-last in memory.
#pragma once

#include <iterator>
#include <string>

#include "common/tensor_view.h"

namespace var_ext {

// Whether the elements are contiguous in memory in this order of the axes.
inline bool is_dense(const TensorView& view, std::initializer_list<size_t> outer_to_inner) {
    int64_t step = 1;
    for (auto axis = std::rbegin(outer_to_inner); axis != std::rend(outer_to_inner); ++axis) {
        if (view.shape[*axis] != 1 && view.strides[*axis] != step) return false;
        step *= view.shape[*axis];
    }
    return true;
}

inline bool has_layout(const TensorView& view, bool channels_last) {
    return view.numel() == 0 || (channels_last ? is_dense(view, {0, 2, 3, 1}) : is_dense(view, {0, 1, 2, 3}));
}

// Whether maps are channels-last; throws if they are neither that nor contiguous.
inline bool is_channels_last(const char* op, const char* name, const TensorView& view) {
    const bool channels_last = !is_dense(view, {0, 1, 2, 3});
    if (has_layout(view, channels_last)) return channels_last;
    contract_error(op, std::string(name) + " must be contiguous or channels-last, got shape " +
                           view.shape_text() + " of other strides");
}

// Throws unless maps have the layout of those called `like`.
inline void check_layout(const char* op, const char* name, const TensorView& view, const char* like,
                         bool channels_last) {
    if (has_layout(view, channels_last)) return;
    contract_error(op, std::string(name) + " must be " + (channels_last ? "channels-last" : "contiguous") +
                           ", as " + like + " is, got shape " + view.shape_text() + " of other strides");
}

}  // namespace var_ext
