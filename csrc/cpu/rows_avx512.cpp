// The kernels of rows.h on AVX-512.

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)

// before the pragmas: what these bring is for every CPU
#include <immintrin.h>

#include <cstring>
#include <type_traits>

// only what follows is compiled for these instructions, and all of it is local to this file
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "lanes_avx512.h"
// behind the lanes
#include "gelu_lanes.h"
// behind both
#include "rows_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace clipfast::cpu {

const RowKernels* row_kernels_avx512() {
    static const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return can ? &kernels : nullptr;
}

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const RowKernels* row_kernels_avx512() { return nullptr; }

}  // namespace clipfast::cpu

#endif
