// The encoder's kernels for float32 on AVX2.
//
// twice: each set of instructions has a file of its own, whose pragmas reach no other.

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define CLIPFAST_LANES 8
#define CLIPFAST_BFLOAT16 0
#define CLIPFAST_INSTRUCTIONS "avx2,fma"
#define CLIPFAST_HAS has_avx2()
#include "encoder_kernels.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_float32_avx2() { return kernels_of_this_cpu(); }

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const EncoderKernels* encoder_float32_avx2() { return nullptr; }

}  // namespace clipfast::cpu

#endif
