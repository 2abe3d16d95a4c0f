// Lanes on AVX-512 (lanes.h).

#include <immintrin.h>

#include <cstdint>

namespace clipfast::cpu {
namespace {

using Lanes = __m512;
using Mask = __mmask16;
constexpr int64_t lanes = 16;

// a mask of the first `count` lanes
inline Mask first_lanes(int64_t count) { return Mask(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline Lanes load(Mask mask, const float* p) { return _mm512_maskz_loadu_ps(mask, p); }
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Mask mask, Lanes x) { _mm512_mask_storeu_ps(p, mask, x); }
inline Lanes choose(Mask mask, Lanes x, Lanes other) { return _mm512_mask_mov_ps(other, mask, x); }
inline Lanes choose_negative(Lanes of, Lanes x, Lanes other) {
    return choose(_mm512_cmp_ps_mask(of, _mm512_setzero_ps(), _CMP_LT_OQ), x, other);
}
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }           // a·b + c
inline Lanes fused_negative(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a·b
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }                         // b where one is NaN
inline Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }                        // b where one is NaN
inline Lanes magnitude(Lanes x) { return _mm512_abs_ps(x); }
inline Lanes nearest_integer(Lanes x) { return _mm512_roundscale_ps(x, 0); }
inline Lanes times_power_of_2(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Lanes x) { return _mm512_reduce_max_ps(x); }

#if CLIPFAST_BFLOAT16

inline Lanes load(Mask mask, const uint16_t* p) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
}
inline void store(uint16_t* p, Mask mask, Lanes x) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// sum + a₀·b₀ + a₁·b₁ in every lane, for one pair of bfloat16 and a pair a lane
inline Lanes multiply_add(Lanes sum, uint32_t a, const uint32_t* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)_mm512_loadu_si512(b));
}

// pairs of neighbouring rows: the first of a pair from `even`, the second from `odd`, zeros beyond their masks
inline void store_pairs(uint32_t* to, Mask even_mask, const uint16_t* even, Mask odd_mask, const uint16_t* odd) {
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even_mask, even));
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_mask, odd));
    _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

// 1 / x within 2⁻¹⁴
inline Lanes rough_reciprocal(Lanes x) { return _mm512_rcp14_ps(x); }

#endif

}  // namespace
}  // namespace clipfast::cpu
