// AMX: eight tiles of 16 rows of 64 bytes each, and the operations on them that the kernels use.
//
//     Tiles tiles;              the thread's tiles, all zero, until this goes out of scope
//     load_tile<t>(p, stride)   rows from memory, `stride` bytes apart
//     store_tile<t>(p, stride)  rows to memory
//     zero_tile<t>()
//     dot<c, a, b>()            C[m][n] += Σ_k A[m][2k] · B[k][2n] + A[m][2k+1] · B[k][2n+1], bfloat16 to float32
//
// A row of the sum is made of that row of A alone, in one order whatever else lies in the tiles. CLIPFAST_SOFTWARE_TILES
// takes amx_software.h in place of the instructions: tests prove the kernels' own source with it on any CPU. Include this
// where the file's instructions are allowed; everything is local to the file that does.

#include <cstdint>

namespace clipfast::cpu {
namespace {

// as the instruction reads it: all eight tiles in full size
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace
}  // namespace clipfast::cpu

#if defined(CLIPFAST_SOFTWARE_TILES)
#define CLIPFAST_HAS_TILES 1
#include "amx_software.h"
#elif defined(__x86_64__) && defined(__GNUC__) && __has_include(<amxbf16intrin.h>) && !defined(CLIPFAST_WITHOUT_AMX)
// the compiler brings the header where it, and the assembler beside it, know the instructions
#define CLIPFAST_HAS_TILES 1

namespace clipfast::cpu {
namespace {

#define CLIPFAST_TILE inline __attribute__((always_inline))

// Written here and not taken from the compiler's header: GCC's loads do not say that they read memory, and stores to it
// may then move past them. No compiler option is needed either.
class Tiles {
public:
    Tiles() {
        const TileConfig config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    // the system need not save what is released
    ~Tiles() { asm volatile("tilerelease" ::); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int t>
CLIPFAST_TILE void load_tile(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
CLIPFAST_TILE void store_tile(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
CLIPFAST_TILE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int c, int a, int b>
CLIPFAST_TILE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace
}  // namespace clipfast::cpu
#endif
