// Which instructions this CPU has and may use.
//
// ATEN_CPU_CAPABILITY is PyTorch's own setting: `default` and `avx2` keep it, and these kernels, from wider instructions
// than those. It is read once.
#pragma once

#include <cstdlib>
#include <string_view>

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

#endif

}  // namespace clipfast::cpu
