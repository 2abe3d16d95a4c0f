// The kernels of rows.h on AVX2, FMA and F16C.
//
// twice: each set of instructions has a file of its own, whose pragmas reach no other.

#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__)

// before the pragmas: what these bring is for every CPU
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "instructions.h"

#define CLIPFAST_INSTRUCTIONS "avx2,fma,f16c"
#include "allow_instructions.h"

#define CLIPFAST_LANES 8
#include "lanes.h"
// behind the lanes
#include "rows_lanes.h"
// behind both
#include "gelu_lanes.h"
// behind all
#include "rows_kernels.h"

#include "end_instructions.h"

namespace clipfast::cpu {

const RowKernels* row_kernels_avx2() {
    // every CPU with AVX2 and FMA has F16C
    static const bool can = has_avx2() && __builtin_cpu_supports("f16c");
    return can ? &kernels : nullptr;
}

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const RowKernels* row_kernels_avx2() { return nullptr; }

}  // namespace clipfast::cpu

#endif
