// A vector register of float32 lanes under one set of names: CLIPFAST_LANES is 16 on AVX-512, 8 on AVX2, 4 on NEON. The
// compiler's own operators do +, -, * and /.
//
// Include this between the pragmas that allow the instructions; everything is local to the file that does, so that no
// CPU without the instructions meets it.

#if CLIPFAST_LANES == 16
#include "lanes_avx512.h"
#elif CLIPFAST_LANES == 8
#include "lanes_avx2.h"
#else
#include "lanes_neon.h"
#endif

namespace clipfast::cpu {
namespace {

// (sum·x + next)·x + …, Horner's scheme
inline Lanes polynomial(Lanes, Lanes sum) { return sum; }
template <class... Rest>
inline Lanes polynomial(Lanes x, Lanes sum, float next, Rest... rest) {
    return polynomial(x, fused(sum, x, all(next)), rest...);
}

}  // namespace
}  // namespace clipfast::cpu
