// What the elementwise operators do with a range of rows, for every set of vector instructions (rows_kernels.h).
//
// All compute in float32 whatever the rows' dtype is. Rows are contiguous; weights, biases and statistics are float32.
// A row's result depends on that row alone, and a sum over rows on which rows they are, never on the threads.
#pragma once

#include <cstdint>

#include "products.h"

namespace clipfast::cpu {

enum class Form { erf, tanh, quick };

// y = LayerNorm(x), or stream = x + residual and y = LayerNorm(stream)
struct Norm {
    const void *x, *residual;  // residual: nullptr where nothing is added
    Dtype x_dtype, residual_dtype;
    Dtype dtype;  // of stream and y: that of both, or float32
    const float *weight, *bias;
    float eps;
    int64_t width;
    void *y, *stream;
    float *mean, *rstd;
};

struct NormGradient {
    const void *dy, *d_stream, *x;  // d_stream: nullptr where nothing was added; x: what was normalised
    Dtype dtype;                    // of these three
    const float *weight, *mean, *rstd;
    int64_t width;
    void *dx, *d_residual;  // d_residual: nullptr where it is dx
    Dtype dx_dtype, d_residual_dtype;
};

struct NormSums {
    float *d_weight, *d_bias, *dx;
};

// y = GELU(x + bias)
struct Activation {
    const void *x, *dy;  // dy: the gradient of y, for a backward pass
    const float* bias;   // nullptr where there is none
    Dtype dtype;
    Form form;
    int64_t width;
    void* y;  // or dx
};

struct RowKernels {
    const char* name;
    // scratch: [4, width] of the thread's own, where dtypes differ
    void (*norm)(const Norm&, int64_t begin, int64_t end, float* scratch);
    // adds the rows' terms to sums [width] of the gradients of weight and bias, and of dx unless that is nullptr
    void (*norm_gradient)(const NormGradient&, int64_t begin, int64_t end, NormSums, float* scratch);
    // elements, and not rows
    void (*gelu)(const Activation&, int64_t begin, int64_t end);
    // rows; adds their terms to d_bias [width] unless that is nullptr
    void (*gelu_gradient)(const Activation&, int64_t begin, int64_t end, float* d_bias);
    // sums[c] = the sum of parts [count, width] over the first dimension, for columns begin to end - 1
    void (*sum_parts)(const float* parts, int64_t count, int64_t width, int64_t begin, int64_t end, float* sums);
    void (*to_float)(const void* from, Dtype dtype, int64_t count, float* to);
    void (*from_float)(const float* from, int64_t count, void* to, Dtype dtype);
};

// nullptr where the compiler or this CPU lacks the instructions
const RowKernels* row_kernels_avx512();
const RowKernels* row_kernels_avx2();

}  // namespace clipfast::cpu
