// Which instructions this CPU has and may use.
//
// ATEN_CPU_CAPABILITY is PyTorch's own setting: `default` and `avx2` keep it, and these kernels, from wider instructions
// than those. It is read once.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace clipfast::cpu {

#if defined(__x86_64__) && defined(__GNUC__)

inline bool has_avx2() {
    static const bool has = [] {
        const char* most = std::getenv("ATEN_CPU_CAPABILITY");
        return !(most && std::string_view(most) == "default") && __builtin_cpu_supports("avx2") &&
               __builtin_cpu_supports("fma");
    }();
    return has;
}

// the four that every CPU with 512 bits has had since 2017
inline bool has_avx512() {
    static const bool has = [] {
        const char* most = std::getenv("ATEN_CPU_CAPABILITY");
        return has_avx2() && !(most && std::string_view(most) == "avx2") && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    }();
    return has;
}

inline bool has_avx512_bf16() {
    static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
    return has;
}

#elif defined(__aarch64__)

inline bool has_neon_bf16() {
#ifdef __linux__
    constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16
    static const bool has = (getauxval(AT_HWCAP2) & bf16) != 0;
    return has;
#else
    return false;
#endif
}

#endif

}  // namespace clipfast::cpu
