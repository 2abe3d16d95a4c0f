// The three GELUs and their derivatives on vectors of float32: each a function of its own. Include it behind the lanes.
//
// `exact` asks for float32's digits; without it results are within 7e-5, for those that are rounded to 16 bits.

namespace clipfast::cpu {
namespace {

// 2^(n + r) for an integer n in ±125 and r in ±1/2: a minimax fit, within 1e-7 (3e-6 where not exact)
template <bool exact>
inline Lanes power_of_two(Lanes n, Lanes r) {
    const Lanes y = exact ? polynomial(r, all(0.00132647273f), 0.00967151299f, 0.0555073358f, 0.240222424f,
                                        0.693147004f, 1.f)
                           : polynomial(r, all(0.00958285294f), 0.0559064262f, 0.240240991f, 0.693124175f, 1.f);
    return scaled(y, n);
}

// σ(u) and 2^t, which is e^-u, for t = -u / ln 2 in ±126. σ(-u) is their product: 1 - σ(u) would have no digits left in
// the tail.
struct Sigmoid {
    Lanes value, power;
};
template <bool exact>
inline Sigmoid sigmoid(Lanes t) {
    const Lanes n = nearest_integer(t), e = power_of_two<exact>(n, sub(t, n));
    return {reciprocal<exact>(add(all(1.f), e)), e};
}

// Φ(x) for x in ±13, and e^(-x²/2). Φ(-z) = e^(-z²/2) · t·P(t) with t = 1 / (1 + 0.34 z), and P a minimax fit to half
// the scaled complementary error function over t, within 3e-8 of it (0.3 and 9e-6 where not exact)
struct Normal {
    Lanes below, bell;
};
template <bool exact>
inline Normal normal(Lanes x) {
    const Lanes z = magnitude(x), one = all(1.f);
    const Lanes t = reciprocal<exact>(fused(z, all(exact ? 0.34f : 0.3f), one));
    const Lanes p = exact ? polynomial(t, all(-0.0261205081f), 0.139499635f, -0.27313301f, 0.202182963f,
                                        -0.0447186232f, 0.115359224f, 0.115197644f, 0.136112198f, 0.135620505f)
                           : polynomial(t, all(-0.0770973712f), 0.216036931f, -0.0169479474f, 0.144196332f,
                                        0.113741934f, 0.120074227f);
    const Lanes w = mul(z, all(0.849321800f));  // w² = z²/2 / ln 2
    const Lanes n = nearest_integer(mul(w, w));
    const Lanes bell = power_of_two<exact>(sub(all(0.f), n), fused_negative(w, w, n));
    const Lanes tail = mul(mul(p, t), bell);
    return {choose_negative(x, tail, sub(one, tail)), bell};
}

inline Lanes within(Lanes x, float limit) { return at_least(at_most(x, limit), -limit); }

// Beyond these the functions are x and 0 in float32, and their derivatives 1 and 0
constexpr float erf_end = 13.f, quick_end = 51.f, tanh_end = 9.9f;

constexpr float per_e = -1.44269504f;                // -1 / ln 2
constexpr float quick = 1.702f;                      // x·σ(1.702·x)
constexpr float root = 1.59576912f, cubic = 0.044715f;  // x·σ(u), u = 2·√(2/π)·(x + 0.044715·x³), the tanh form

template <Form form, bool exact>
inline Lanes gelu(Lanes x) {
    if constexpr (form == Form::erf)
        return zero_below(mul(x, normal<exact>(within(x, erf_end)).below), x, -erf_end);
    if constexpr (form == Form::quick) {
        const Sigmoid s = sigmoid<exact>(mul(within(x, quick_end), all(quick * per_e)));
        return zero_below(mul(x, s.value), x, -quick_end);
    }
    const Lanes near = within(x, tanh_end);
    const Sigmoid s =
        sigmoid<exact>(mul(near, fused(mul(near, near), all(cubic * root * per_e), all(root * per_e))));
    return zero_below(mul(x, s.value), x, -tanh_end);
}

template <Form form, bool exact>
inline Lanes gelu_derivative(Lanes x) {
    if constexpr (form == Form::erf) {
        const Lanes near = within(x, erf_end);
        const Normal n = normal<exact>(near);
        return zero_below(fused(mul(near, all(0.398942280f)), n.bell, n.below), x, -erf_end);
    }
    // (x·σ(u))' = σ(u)·(1 + x·u'·σ(-u))
    if constexpr (form == Form::quick) {
        const Lanes u = mul(within(x, quick_end), all(quick));
        const Sigmoid s = sigmoid<exact>(mul(u, all(per_e)));
        return zero_below(mul(s.value, fused(u, mul(s.power, s.value), all(1.f))), x, -quick_end);
    }
    const Lanes near = within(x, tanh_end), square = mul(near, near);
    const Sigmoid s = sigmoid<exact>(mul(near, fused(square, all(cubic * root * per_e), all(root * per_e))));
    const Lanes slope = mul(near, fused(square, all(3 * cubic * root), all(root)));
    return zero_below(mul(s.value, fused(slope, mul(s.power, s.value), all(1.f))), x, -tanh_end);
}

}  // namespace
}  // namespace clipfast::cpu
