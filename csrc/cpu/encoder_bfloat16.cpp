// The encoder's kernels for bfloat16 on AVX512-BF16.

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)

// before the pragmas: what these bring is for every CPU
#include <immintrin.h>

#include <algorithm>
#include <cstring>

// only what follows is compiled for these instructions, and all of it is local to this file
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

#define CLIPFAST_BFLOAT16 1
#include "avx512.h"
#include "encoder_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace clipfast::cpu {

const EncoderKernels* encoder_kernels_bfloat16() {
    static const bool can = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return can ? &kernels : nullptr;
}

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {
const EncoderKernels* encoder_kernels_bfloat16() { return nullptr; }
}  // namespace clipfast::cpu

#endif
