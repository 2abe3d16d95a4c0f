// Whether this process may multiply by AMX: asked once.

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "amx.h"

namespace clipfast::cpu {
namespace {

#if CLIPFAST_HAS_TILES

// A product of whole numbers, which float32 holds exactly, against plain loops: no speed is worth wrong features
bool multiplies() {
    alignas(64) uint16_t a[16][32], b[16][32];
    alignas(64) float c[16][16];
    const auto bfloat16 = [](int x) {  // 0..15
        const float value = float(x);
        uint32_t bits;
        __builtin_memcpy(&bits, &value, sizeof bits);
        return uint16_t(bits >> 16);
    };
    const auto left = [](int m, int k) { return (3 * m + 5 * k + m * k) % 16; };
    const auto right = [](int k, int n) { return (7 * n + 2 * k + n * k) % 16; };
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 32; ++j) {
            a[i][j] = bfloat16(left(i, j));
            b[i][j] = bfloat16(right(2 * i + j % 2, j / 2));
        }
    {
        Tiles tiles;
        zero_tile<0>();
        load_tile<4>(a, 64);
        load_tile<6>(b, 64);
        dot<0, 4, 6>();
        store_tile<0>(c, 64);
    }
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            int sum = 0;
            for (int k = 0; k < 32; ++k) sum += left(m, k) * right(k, n);
            if (c[m][n] != float(sum)) return false;
        }
    return true;
}

#if defined(CLIPFAST_SOFTWARE_TILES)
const char* why_not() { return multiplies() ? nullptr : "its products came out wrong here"; }
#elif defined(__linux__)
const char* why_not() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    // AMX-TILE and AMX-BF16
    const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 22 & 1);
    if (!there) return "this CPU has no AMX";
    unsigned low = 0, high = 0;
    const bool keeps = __get_cpuid(1, &a, &b, &c, &d) && (c >> 27 & 1);  // OSXSAVE: xgetbv may be asked
    if (keeps) asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return "the system does not keep AMX's tiles for its threads";
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return "the system refused AMX (arch_prctl)";
    return multiplies() ? nullptr : "its products came out wrong here";
}
#else
const char* why_not() { return "AMX is asked for on Linux only"; }
#endif

#else
const char* why_not() { return "the op library was built without AMX"; }
#endif

}  // namespace

const char* amx_unavailable() {
    static const char* const reason = why_not();
    return reason;
}

}  // namespace clipfast::cpu
