// Elementwise functions of Lanes (lanes.h): within 4e-7 for float32; within 1e-4, a twentieth of a rounding error, where
// CLIPFAST_BFLOAT16 is 1 and results are rounded to bfloat16.

#include "lanes.h"

namespace clipfast::cpu {
namespace {

// e^x; 0 below -104, infinity above 88.7
inline Lanes exponential(Lanes x) {
    // in this order of operands NaN stays NaN
    x = larger(all(-104.f), smaller(all(89.f), x));
    const Lanes n = nearest_integer(x * all(1.44269504f));
    // x - n·ln 2 in two steps, the first exact
    Lanes r = fused_negative(n, all(0.693145752f), x);
    r = fused_negative(n, all(1.42860682e-6f), r);
#if CLIPFAST_BFLOAT16
    const Lanes y = polynomial(r, all(1.f / 24), 1.f / 6, .5f, 1.f, 1.f);
#else
    const Lanes y = polynomial(r, all(1.f / 5040), 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f);
#endif
    return times_power_of_2(y, n);
}

inline Lanes reciprocal(Lanes x) {
#if CLIPFAST_BFLOAT16
    return rough_reciprocal(x);
#else
    return all(1.f) / x;
#endif
}

// x·Φ(x): Φ(-z) = e^(-z²/2) · t·P(t) with t = 1 / (1 + 0.3 z) and P a Chebyshev fit to half the scaled complementary
// error function, within 4e-9 of it (4e-6 for bfloat16)
inline Lanes gelu_erf(Lanes x) {
    const Lanes z = magnitude(x), one = all(1.f);
    const Lanes t = reciprocal(fused(z, all(0.3f), one));
#if CLIPFAST_BFLOAT16
    const Lanes p = polynomial(t, all(-0.0814178176f), 0.229118987f, -0.0320792111f, 0.152508916f, 0.111583332f,
                               0.120285482f);
#else
    const Lanes p = polynomial(t, all(-0.0208782615f), 0.113806517f, -0.231400287f, 0.195974186f, -0.0828475512f,
                               0.0979556976f, 0.0777838584f, 0.110361191f, 0.119557241f, 0.119687407f);
#endif
    const Lanes tail = p * t * exponential(z * z * all(-.5f));
    return x * choose_negative(x, tail, one - tail);
}

// x·σ(z)
inline Lanes times_sigmoid(Lanes x, Lanes z) { return x * reciprocal(all(1.f) + exponential(all(0.f) - z)); }

inline Lanes gelu_quick(Lanes x) { return times_sigmoid(x, x * all(1.702f)); }

// x/2·(1 + tanh(u)) = x·σ(2u), u = √(2/π)·(x + 0.044715·x³)
inline Lanes gelu_tanh(Lanes x) {
    const Lanes cubic = fused(x * x, all(0.044715f), all(1.f));
    return times_sigmoid(x, x * cubic * all(1.59576912f));
}

}  // namespace
}  // namespace clipfast::cpu
