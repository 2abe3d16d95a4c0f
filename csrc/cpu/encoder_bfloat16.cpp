// The encoder's kernels for bfloat16 on AVX512-BF16.

#define CLIPFAST_BFLOAT16 1
#define CLIPFAST_AVX2 0
#include "encoder_kernels.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_kernels_bfloat16() { return kernels_of_this_cpu(); }

}  // namespace clipfast::cpu
