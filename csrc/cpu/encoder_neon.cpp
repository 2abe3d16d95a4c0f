// The encoder's kernels for float32 on NEON.
//
// twice: each set of instructions has a file of its own, whose pragmas reach no other.

#include "encoder.h"

#if defined(__aarch64__) && defined(__GNUC__)

#define CLIPFAST_LANES 4
#define CLIPFAST_BFLOAT16 0
#define CLIPFAST_INSTRUCTIONS "+simd"
#define CLIPFAST_HAS true
#include "encoder_kernels.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_float32_neon() { return kernels_of_this_cpu(); }

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const EncoderKernels* encoder_float32_neon() { return nullptr; }

}  // namespace clipfast::cpu

#endif
