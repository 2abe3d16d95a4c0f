// Lanes on Arm's NEON (lanes.h). It has no masks: what is left of a row goes through four floats on the stack.

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace clipfast::cpu {
namespace {

using Lanes = float32x4_t;
using Mask = int;  // how many lanes, from the first
constexpr int64_t lanes = 4;

inline Mask first_lanes(int64_t count) { return int(count < 0 ? 0 : count > lanes ? lanes : count); }
inline Lanes all(float x) { return vdupq_n_f32(x); }
inline Lanes load(const float* p) { return vld1q_f32(p); }
inline Lanes load(Mask mask, const float* p) {
    if (mask == lanes) return load(p);
    float some[lanes] = {};
    std::memcpy(some, p, size_t(mask) * sizeof(float));
    return load(some);
}
inline void store(float* p, Lanes x) { vst1q_f32(p, x); }
inline void store(float* p, Mask mask, Lanes x) {
    if (mask == lanes) return store(p, x);
    float some[lanes];
    store(some, x);
    std::memcpy(p, some, size_t(mask) * sizeof(float));
}
inline Lanes choose(Mask mask, Lanes x, Lanes other) {
    const int32_t numbers[lanes] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_s32(vld1q_s32(numbers), vdupq_n_s32(mask)), x, other);
}
inline Lanes choose_negative(Lanes of, Lanes x, Lanes other) { return vbslq_f32(vcltzq_f32(of), x, other); }
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c, a, b); }           // a·b + c
inline Lanes fused_negative(Lanes a, Lanes b, Lanes c) { return vfmsq_f32(c, a, b); }  // c - a·b
inline Lanes larger(Lanes a, Lanes b) { return vmaxq_f32(a, b); }                      // NaN where one is
inline Lanes smaller(Lanes a, Lanes b) { return vminq_f32(a, b); }                     // NaN where one is
inline Lanes magnitude(Lanes x) { return vabsq_f32(x); }
inline Lanes nearest_integer(Lanes x) { return vrndnq_f32(x); }

// x · 2ⁿ for whole n from -252 to 252: in two steps, since 2ⁿ alone may have no float
inline Lanes times_power_of_2(Lanes x, Lanes n) {
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1), rest = vsubq_s32(whole, half);
    const int32x4_t one = vdupq_n_s32(127);
    x = x * vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, one), 23));
    return x * vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, one), 23));
}

inline float sum_of(Lanes x) { return vaddvq_f32(x); }
inline float largest_of(Lanes x) { return vmaxvq_f32(x); }

#if CLIPFAST_BFLOAT16

inline uint16x4_t load_halves(Mask mask, const uint16_t* p) {
    if (mask == lanes) return vld1_u16(p);
    uint16_t some[lanes] = {};
    std::memcpy(some, p, size_t(mask) * sizeof(uint16_t));
    return vld1_u16(some);
}
inline Lanes load(Mask mask, const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(mask, p), 16)); }
inline void store(uint16_t* p, Mask mask, Lanes x) {
    const uint16x4_t halves = vreinterpret_u16_bf16(vcvt_bf16_f32(x));
    uint16_t some[lanes];
    vst1_u16(some, halves);
    std::memcpy(p, some, size_t(mask) * sizeof(uint16_t));
}

// sum + a₀·b₀ + a₁·b₁ in every lane, for one pair of bfloat16 and a pair a lane
inline Lanes multiply_add(Lanes sum, uint32_t a, const uint32_t* b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u32(vdupq_n_u32(a)), vreinterpretq_bf16_u32(vld1q_u32(b)));
}

// pairs of neighbouring rows: the first of a pair from `even`, the second from `odd`, zeros beyond their masks
inline void store_pairs(uint32_t* to, Mask even_mask, const uint16_t* even, Mask odd_mask, const uint16_t* odd) {
    const uint32x4_t first = vmovl_u16(load_halves(even_mask, even)), second = vmovl_u16(load_halves(odd_mask, odd));
    vst1q_u32(to, vorrq_u32(first, vshlq_n_u32(second, 16)));
}

inline Lanes rough_reciprocal(Lanes x) { return all(1.f) / x; }

#endif

}  // namespace
}  // namespace clipfast::cpu
