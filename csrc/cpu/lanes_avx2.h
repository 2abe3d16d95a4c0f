// Lanes on AVX2 (lanes.h).

#include <immintrin.h>

#include <cstdint>

namespace clipfast::cpu {
namespace {

using Lanes = __m256;
using Mask = __m256i;
constexpr int64_t lanes = 8;

// a mask of the first `count` lanes
inline Mask first_lanes(int64_t count) {
    const int n = int(count < 0 ? 0 : count > lanes ? lanes : count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Lanes all(float x) { return _mm256_set1_ps(x); }
inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
inline Lanes load(Mask mask, const float* p) { return _mm256_maskload_ps(p, mask); }
inline void store(float* p, Lanes x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, Mask mask, Lanes x) { _mm256_maskstore_ps(p, mask, x); }
inline Lanes choose(Mask mask, Lanes x, Lanes other) { return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(mask)); }
inline Lanes choose_negative(Lanes of, Lanes x, Lanes other) {
    return _mm256_blendv_ps(other, x, _mm256_cmp_ps(of, _mm256_setzero_ps(), _CMP_LT_OQ));
}
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }           // a·b + c
inline Lanes fused_negative(Lanes a, Lanes b, Lanes c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a·b
inline Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }                         // b where one is NaN
inline Lanes smaller(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }                        // b where one is NaN
inline Lanes magnitude(Lanes x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
inline Lanes nearest_integer(Lanes x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x · 2ⁿ for whole n from -252 to 252: in two steps, since 2ⁿ alone may have no float
inline Lanes times_power_of_2(Lanes x, Lanes n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const __m256i rest = _mm256_sub_epi32(whole, half), one = _mm256_set1_epi32(127);
    x = x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
}

inline float sum_of(Lanes x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest_of(Lanes x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

}  // namespace
}  // namespace clipfast::cpu
