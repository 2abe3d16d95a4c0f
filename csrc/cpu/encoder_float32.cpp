// The encoder's kernels for float32 on AVX-512.

#define CLIPFAST_BFLOAT16 0
#define CLIPFAST_AVX2 0
#include "encoder_kernels.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_kernels_float32_avx512() { return kernels_of_this_cpu(); }

}  // namespace clipfast::cpu
