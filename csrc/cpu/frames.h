// Images in a frame of zeros, as a 3x3 convolution wants them.
#pragma once

#include <cstdint>

#include "cpu/phi.h"
#include "cpu/resample.h"

namespace var_ext::cpu {

// Brings rows of images, resampled to H x W, into frames (H + 2, W + 2, room). Not to be copied: it points
// into itself.
class Framer {
  public:
    Framer(const PhiShape& shape, const Grid& from, int64_t h, int64_t w);
    Framer(const Framer&) = delete;

    int64_t frame() const;                 // floats of a frame
    int64_t scratch(int64_t count) const;  // floats that `rows` needs for up to `count` rows
    void clear(float* frame) const;        // zeros where `rows` never writes
    void rows(int64_t image, int64_t begin, int64_t end, float* frame, float* scratch) const;

  private:
    PhiShape shape_;
    Grid from_;
    bool same_;  // the images have this size already
    const ResampleKernel* kernel_ = nullptr;
    AxisTable<float> y_, x_;
    ResampleStrip<float> strip_;
};

}  // namespace var_ext::cpu
