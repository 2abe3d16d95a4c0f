// What the op library on software tiles leaves out.

#include "cpu/encoder.h"

namespace clipfast::cpu {

const EncoderKernels* encoder_kernels_float32() { return nullptr; }
// AVX512-BF16 is what the kernels need beside the tiles
const EncoderKernels* encoder_kernels_bfloat16() {
    static const EncoderKernels any{};
    return __builtin_cpu_supports("avx512bf16") ? &any : nullptr;
}

}  // namespace clipfast::cpu
