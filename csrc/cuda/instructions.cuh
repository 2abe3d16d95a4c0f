// The few instructions that have no C++ spelling, the element types, and the arithmetic that differs among them.
//
// Under CLIPFAST_FIBRE_SHIM the same names come from the tests' CPU shim, which runs each kernel thread as a fibre.
#pragma once

#ifdef CLIPFAST_FIBRE_SHIM
#include "fibre_shim.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch_errors.cuh"

#define CLIPFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define CLIPFAST_LAUNCH(kernel, grid, threads, shared, stream, ...) \
    kernel<<<(grid), (threads), (shared), (stream)>>>(__VA_ARGS__)

namespace clipfast {

// ---------------------------------------------------------------------------------------------------------------------
// instructions of sm_80 and later

// threadIdx.x, read anew: what is worked out from it is not kept in registers through a loop that has none to spare
__device__ inline int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(index));
    return index;
}

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// copies 16 bytes to shared memory behind the program's back
__device__ inline void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// waits until at most `kPending` of this thread's groups are under way
template <int kPending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// four 8x8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8, and gets two elements of each
__device__ inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// [16, 8] += [16, 16] · [16, 8]: lane l holds rows l / 4 (upper) and l / 4 + 8 (lower), columns 2 · (l % 4) and the next
#define CLIPFAST_MMA(type)                                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                       \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
                 : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <typename T>
__device__ void mma_m16n8k16(float* upper, float* lower, const uint32_t* a, const uint32_t* b);

template <>
__device__ inline void mma_m16n8k16<__half>(float* upper, float* lower, const uint32_t* a, const uint32_t* b) {
    CLIPFAST_MMA("f16");
}

template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float* upper, float* lower, const uint32_t* a, const uint32_t* b) {
    CLIPFAST_MMA("bf16");
}

}  // namespace clipfast
#endif

namespace clipfast {

// ---------------------------------------------------------------------------------------------------------------------
// element types: logits and sums are float32, for float64 features float64

template <typename T>
struct Element {
    using Sum = float;
    static constexpr bool tensor_cores = sizeof(T) == 2;
    // rows of a tile that one thread holds: 8 · 8 float32 sums fill half of its registers, float64 takes twice as many
    static constexpr int thread_rows = 8;
};
template <>
struct Element<double> {
    using Sum = double;
    static constexpr bool tensor_cores = false;
    static constexpr int thread_rows = 4;
};
template <typename T>
using Sum = typename Element<T>::Sum;

// 2^x, 0 where it would be under 2^-126: exp2f spends three instructions more on those numbers, which no sum beside a 1
// would see
#ifdef CLIPFAST_FIBRE_SHIM
__device__ inline float power_of_two(float x) {
    const float power = exp2f(x);
    return power < 1.17549435e-38f ? 0.0f : power;
}
__device__ inline float quotient(float a, float b) { return a / b; }
#else
__device__ inline float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
// within two units of rounding, for b within 2^-126 ... 2^126
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
#endif
__device__ inline double quotient(double a, double b) { return a / b; }

// exp of a difference that was taken first: x · log2(e) alone would lose what digits are left of logits past 1e4
__device__ inline float exponential(float x) { return power_of_two(x * 1.4426950408889634f); }
__device__ inline double exponential(double x) { return exp(x); }

// a product that is rounded before it meets a sum: the same bits wherever it is worked out
#ifdef CLIPFAST_FIBRE_SHIM
__device__ inline float times(float a, float b) { return a * b; }
__device__ inline double times(double a, double b) { return a * b; }
#else
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }
#endif

__device__ inline float log_one_plus(float x) { return log1pf(x); }
__device__ inline double log_one_plus(double x) { return log1p(x); }

__device__ inline float natural_log(float x) { return logf(x); }
__device__ inline double natural_log(double x) { return log(x); }

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

template <typename A>
__device__ inline A minus_infinity() {
    return -static_cast<A>(INFINITY);
}

template <typename T>
__device__ inline T rounded(Sum<T> x) {
    return static_cast<T>(x);
}
template <>
__device__ inline __half rounded<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// --------------------------------------------------------------------------------------------------------------------
// two neighbours in memory at once; the first lies on a multiple of both

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T at[2];
};

template <typename T>
__device__ inline Pair<T> pair_at(const T* from) {
    return *reinterpret_cast<const Pair<T>*>(from);
}

template <typename T>
__device__ inline void put_pair(T* to, Sum<T> a, Sum<T> b) {
    *reinterpret_cast<Pair<T>*>(to) = {{rounded<T>(a), rounded<T>(b)}};
}
#ifndef CLIPFAST_FIBRE_SHIM
// one conversion for both
template <>
__device__ inline void put_pair<__half>(__half* to, float a, float b) {
    *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
template <>
__device__ inline void put_pair<__nv_bfloat16>(__nv_bfloat16* to, float a, float b) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}
#endif

}  // namespace clipfast
