#include "cpu/frames.h"

#include <algorithm>

#include "common/cpu_features.h"

namespace var_ext::cpu {

Framer::Framer(const PhiShape& shape, const Grid& from, int64_t h, int64_t w)
    : shape_(shape), from_(from), same_(h == shape.height && w == shape.width) {
    if (same_) return;
    kernel_ = &VAR_EXT_SELECT(resample);
    y_ = bicubic_axis(h, shape.height);
    const bool square = h == w && shape.height == shape.width;
    if (!square) x_ = bicubic_axis(w, shape.width);
    strip_.p = {};
    strip_.p.batch = 1;
    strip_.p.channels = shape.channels;
    strip_.p.in_h = h;
    strip_.p.in_w = w;
    strip_.p.out_h = shape.height;
    strip_.p.out_w = shape.width;
    strip_.p.dtype = DType::float32;
    strip_.pass = Pass::weighted;
    strip_.y = view(y_);
    strip_.x = square ? strip_.y : view(x_);
    std::copy(from.strides, from.strides + 4, strip_.p.in_strides);
    const int64_t strides[] = {0, 1, (shape.width + 2) * shape.room(), shape.room()};
    std::copy(strides, strides + 4, strip_.p.out_strides);
}

int64_t Framer::frame() const {
    return (shape_.height + 2) * (shape_.width + 2) * shape_.room();
}

int64_t Framer::scratch(int64_t count) const {
    const auto& p = strip_.p;
    return same_ ? 0 : (p.in_h * (p.in_w + p.out_w) + count * p.out_w) * kernel_->lanes_f32;
}

void Framer::clear(float* frame) const {
    const int64_t room = shape_.room(), row = (shape_.width + 2) * room;
    if (room != shape_.channels) {
        std::fill_n(frame, this->frame(), 0.0f);
        return;
    }
    std::fill_n(frame, row, 0.0f);
    std::fill_n(frame + (shape_.height + 1) * row, row, 0.0f);
    for (int64_t y = 1; y <= shape_.height; ++y) {
        std::fill_n(frame + y * row, room, 0.0f);
        std::fill_n(frame + y * row + row - room, room, 0.0f);
    }
}

void Framer::rows(int64_t image, int64_t begin, int64_t end, float* frame, float* scratch) const {
    const int64_t room = shape_.room(), row = (shape_.width + 2) * room;
    float* inside = frame + row + room;
    const float* in = from_.data + image * from_.strides[0];
    if (same_) {
        shape_.kernel->load(in + begin * from_.strides[2], from_.strides + 1, shape_.channels, end - begin,
                            shape_.width, inside + begin * row, row, room);
        return;
    }
    ResampleStrip<float> strip = strip_;
    const int64_t lanes = kernel_->lanes_f32;
    strip.p.in = in;
    strip.p.out = inside;
    strip.row_begin = begin;
    strip.row_end = end;
    set_input_rows(y_, strip);
    strip.packed = scratch;
    strip.wide = strip.packed + strip.p.in_h * strip.p.in_w * lanes;
    strip.done = strip.wide + strip.p.in_h * strip.p.out_w * lanes;
    for (int64_t c = 0; c < shape_.channels; c += lanes) {
        strip.plane_begin = c;
        strip.plane_count = std::min(lanes, shape_.channels - c);
        kernel_->run_f32(strip);
    }
}

}  // namespace var_ext::cpu
