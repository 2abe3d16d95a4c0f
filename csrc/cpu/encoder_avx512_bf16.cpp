// The encoder's kernels for bfloat16 on AVX512-BF16.
//
// twice: each set of instructions has a file of its own, whose pragmas reach no other.

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define CLIPFAST_LANES 16
#define CLIPFAST_BFLOAT16 1
#define CLIPFAST_INSTRUCTIONS "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"
#define CLIPFAST_HAS has_avx512_bf16()
#include "encoder_kernels.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_bfloat16_avx512() { return kernels_of_this_cpu(); }

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const EncoderKernels* encoder_bfloat16_avx512() { return nullptr; }

}  // namespace clipfast::cpu

#endif
