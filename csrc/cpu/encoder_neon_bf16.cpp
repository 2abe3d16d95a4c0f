// The encoder's kernels for bfloat16 on NEON's BF16.
//
// twice: each set of instructions has a file of its own, whose pragmas reach no other.

#include "encoder.h"

#if defined(__aarch64__) && defined(__GNUC__)

#define CLIPFAST_LANES 4
#define CLIPFAST_BFLOAT16 1
#define CLIPFAST_INSTRUCTIONS "arch=armv8.2-a+bf16"
#define CLIPFAST_HAS has_neon_bf16()
#include "encoder_kernels.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_bfloat16_neon() { return kernels_of_this_cpu(); }

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const EncoderKernels* encoder_bfloat16_neon() { return nullptr; }

}  // namespace clipfast::cpu

#endif
