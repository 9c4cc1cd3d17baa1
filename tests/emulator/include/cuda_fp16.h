// float16 on the emulator: what numeric.cuh uses of it. The compiler's own type does the rounding.
#pragma once

#include <cuda_runtime.h>

struct __half {
    _Float16 value;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half x) {
    return static_cast<float>(x.value);
}
inline __half __float2half_rn(float x) {
    return {static_cast<_Float16>(x)};
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 pair) {
    return {__half2float(pair.x), __half2float(pair.y)};
}
