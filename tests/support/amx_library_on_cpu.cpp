// What the op library on software tiles leaves out.

#include "cpu/encoder.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_float32_avx512() { return nullptr; }
const EncoderKernels* encoder_float32_avx2() { return nullptr; }
const EncoderKernels* encoder_float32_neon() { return nullptr; }
const EncoderKernels* encoder_bfloat16_neon() { return nullptr; }
// AVX512-BF16 is what the kernels need beside the tiles
const EncoderKernels* encoder_bfloat16_avx512() {
    static const EncoderKernels any{};
    return __builtin_cpu_supports("avx512bf16") ? &any : nullptr;
}

}  // namespace clipfast::cpu
