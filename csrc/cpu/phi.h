// phi(x) = (1 - ratio) x + ratio conv3x3(x) after bicubic upsampling, forward and backward: what
// residual_step and residual_quantize are made of.
//
// In scratch memory a grid is kept pixel by pixel: the channels of a pixel side by side, `room` of them, C
// filled up to whole vectors. The input of a convolution stands in a frame of one pixel of zeros: (H + 2, W +
// 2, room).
#pragma once

#include <cstdint>

#include "common/buffer.h"
#include "cpu/variants.h"

namespace var_ext::cpu {

// Rows of an image through the convolution, on one thread.
struct PhiRows {
    int64_t channels, room, width;
    int64_t chain;  // input channels that are summed in one chain: see phi_variant.cpp
    int64_t row_begin, row_end;
    const float* x;       // framed
    const float* weight;  // packed by PhiKernel::pack
    const float* bias;    // (room,)
    float ratio;
    const float* base;  // what phi is added to, by pixel and row from row_begin on; null for nothing
    int64_t base_pixel, base_row;
    float* out;  // likewise; may be `base`
    int64_t out_pixel, out_row;
    const float* target;  // null, or (H, W, room) like residual ...
    float* residual;      // ... where target - out goes
    float* sum;           // scratch, where there is more than a chain: (rows, W, room)
};

// A part of the convolution's weight gradient, over some images: taps x (input channels begin .. end) x all.
struct PhiWeightRows {
    int64_t channels, room, height, width, images;
    const float* x;  // (images, H + 2, W + 2, room), framed; followed by `grad`: it is read a little beyond
    const float* grad;   // likewise
    int64_t tap, begin;  // at most `input_block` channels from `begin` on
    float* sum;          // (9, C, room), added to
};

struct PhiKernel {
    int64_t lanes;        // channels of a vector
    int64_t input_block;  // of a part of the weight gradient

    // (C, C, 3, 3), contiguous, into the order in which `rows` reads it: 9 C room floats.
    void (*pack)(const float* weight, int64_t channels, int64_t chain, float* packed);
    void (*rows)(const PhiRows& p);
    void (*weight_rows)(const PhiWeightRows& p);
    // Rows of a strided image (strides of C, H, W) into pixels and back.
    void (*load)(const float* in, const int64_t* strides, int64_t channels, int64_t rows, int64_t width,
                 float* out, int64_t out_row, int64_t out_pixel);
    void (*store)(const float* in, int64_t in_row, int64_t in_pixel, int64_t channels, int64_t rows,
                  int64_t width, float* out, const int64_t* strides);
};

VAR_EXT_DECLARE_VARIANTS(PhiKernel, phi);

// A tensor (B, C, H, W) of floats.
struct Grid {
    float* data;
    int64_t strides[4];
    bool pixels = false;  // scratch: (B, H, W, room) in memory
};

struct PhiShape {
    const PhiKernel* kernel;
    int64_t batch, channels, height, width;

    int64_t room() const { return (channels + kernel->lanes - 1) / kernel->lanes * kernel->lanes; }
    int64_t row_cost() const { return 9 * width * channels * room() / kernel->lanes; }  // for thread_count
    int64_t image() const { return height * width * room(); }  // floats of an image, by pixel
    Grid pixels(float* data) const { return {data, {image(), 1, width * room(), room()}, true}; }
};
PhiShape phi_shape(int64_t batch, int64_t channels, int64_t height, int64_t width);

struct PhiStep {
    PhiShape shape;
    Grid codes;  // (B, C, h, w), resampled unless that is their size already
    int64_t codes_height, codes_width;
    const float* weight;  // (C, C, 3, 3), contiguous
    const float* bias;    // (C,)
    float ratio;
    Grid base;  // out = base + phi(codes)
    Grid out;
    bool channels_last = true;      // whether torch would keep the upsampled codes so: the order of summation
    const float* target = nullptr;  // by pixel; with it, residual = target - out is written too
    float* residual = nullptr;
};
void phi_step(const PhiStep& step);

// The gradients of phi(codes) for the gradient `grad` of its result. Those of weight and bias are added to
// what is there; any may be null.
struct PhiBackward {
    PhiShape shape;
    Grid grad;
    Grid codes;  // (B, C, h, w)
    int64_t codes_height, codes_width;
    const float* weight;
    float ratio;
    Grid grad_codes;     // (B, C, h, w)
    float* grad_weight;  // (C, C, 3, 3), contiguous
    float* grad_bias;    // (C,)
};
void phi_backward(const PhiBackward& step);

}  // namespace var_ext::cpu
