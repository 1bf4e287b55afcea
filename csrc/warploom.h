// The library as others see it: functions with C linkage over pointers, sizes, strides, a device
// and a stream.
//
// A function answers 0, or a number that is not 0; `warploom_last_error` then has the sentence.
// Strides count elements from row to row; the elements of a row lie side by side. Nothing is
// allocated, nothing waits for the device: work is queued on `stream`, which is one of `device`.
#pragma once
#include <cstdint>

#define WARPLOOM_API extern "C" __attribute__((visibility("default")))

// Codes of element types, in the order of kernels/native.py.
enum WarploomType : int { WARPLOOM_FLOAT16 = 0, WARPLOOM_BFLOAT16 = 1, WARPLOOM_FLOAT32 = 2 };

// The sentence of the last call that failed in this thread.
WARPLOOM_API const char* warploom_last_error();

// y = h * rstd * weight, h = x + residual rounded to the type of x. `residual` and `h` are null or
// both there. x, residual, y, h [tokens, width] of `type`; weight [width] of
// `weight_type`, which is `type` or float32; rstd
// [tokens] float32. y and h have no gaps between rows.
WARPLOOM_API int warploom_rms_norm_forward(const void* x, const void* residual, const void* weight,
                                           void* y, void* h, float* rstd, int64_t tokens,
                                           int64_t width, int64_t x_stride, int64_t residual_stride,
                                           float eps, int type, int weight_type, int device,
                                           void* stream);

// How many rows `shares` has in the backward on a device with so many multiprocessors; at least 1.
WARPLOOM_API int64_t warploom_rms_norm_parts(int64_t tokens, int64_t width, int type,
                                             int processors);

// dx of `type`, without gaps between rows (dh is added, if not null), and dweight of
// `dweight_type`. `shares` is scratch, float32 [parts, width]; each of its rows is one block's
// share of dweight.
WARPLOOM_API int warploom_rms_norm_backward(const void* dy, const void* dh, const void* h,
                                            const void* weight, const float* rstd, void* dx,
                                            void* dweight, float* shares, int64_t tokens,
                                            int64_t width, int64_t dy_stride, int64_t dh_stride,
                                            int64_t h_stride, int64_t parts, int type,
                                            int weight_type, int dweight_type, int device,
                                            void* stream);
