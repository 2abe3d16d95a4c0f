// The kernels of rows.h on AVX-512.
//
// twice: each set of instructions has a file of its own, whose pragmas reach no other.

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)

// before the pragmas: what these bring is for every CPU
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "instructions.h"

#define CLIPFAST_INSTRUCTIONS "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "allow_instructions.h"

#define CLIPFAST_LANES 16
#include "lanes.h"
// behind the lanes
#include "rows_lanes.h"
// behind both
#include "gelu_lanes.h"
// behind all
#include "rows_kernels.h"

#include "end_instructions.h"

namespace clipfast::cpu {

const RowKernels* row_kernels_avx512() {
    static const bool can = has_avx512() && __builtin_cpu_supports("f16c");
    return can ? &kernels : nullptr;
}

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const RowKernels* row_kernels_avx512() { return nullptr; }

}  // namespace clipfast::cpu

#endif
