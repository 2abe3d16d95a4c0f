// Sixteen float32 lanes by AVX-512. Include it between the pragmas that allow the instructions.

#include <immintrin.h>

#include <cstdint>

namespace clipfast::cpu {
namespace {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr const char* vectors = "avx512";
constexpr int64_t lanes = 16;
using Vector = __m512;

inline __mmask16 first(int64_t count) { return __mmask16(count >= lanes ? 0xffff : (1u << count) - 1); }

inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }    // a·b + c
inline Vector fnma(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a·b
// a product that is rounded, where the compiler would join it with the sum it goes to
inline Vector apart(Vector a) {
    asm("" : "+v"(a));
    return a;
}
inline Vector absolute(Vector a) { return _mm512_abs_ps(a); }
// NaN stays NaN in these
inline Vector at_least(Vector a, float low) { return _mm512_max_ps(all(low), a); }
inline Vector at_most(Vector a, float high) { return _mm512_min_ps(all(high), a); }
inline float sum_of(Vector a) { return _mm512_reduce_add_ps(a); }

// a where x < 0, else b
inline Vector where_negative(Vector x, Vector a, Vector b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), a);
}

// 1 / a for a in 1..2^126: within a unit of rounding, or 6e-5
template <bool exact>
inline Vector reciprocal(Vector a) {
    const Vector r = _mm512_rcp14_ps(a);
    return exact ? fma(r, fnma(a, r, all(1.f)), r) : r;
}

inline Vector nearest_integer(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
// a · 2^n
inline Vector scaled(Vector a, Vector n) { return _mm512_scalef_ps(a, n); }
// 0 where x is below `low`, else a
inline Vector zero_below(Vector a, Vector x, float low) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(low), _CMP_NLT_UQ), a);
}

inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline void store(float* p, Vector a) { _mm512_storeu_ps(p, a); }
inline void store(float* p, Vector a, int64_t count) { _mm512_mask_storeu_ps(p, first(count), a); }

inline Vector widened(__m256i bits, Bfloat16) { return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
inline Vector widened(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }

// to the nearest, ties to even. AVX512-BF16's own conversion loses numbers below the normal range.
inline __m256i narrowed(Vector a, Bfloat16) {
    const __m512i bits = (__m512i)a;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline __m256i narrowed(Vector a, Float16) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

// as it is read again once it was stored
inline Vector rounded(Vector a, float) { return a; }
template <class T>
inline Vector rounded(Vector a, T type) {
    return widened(narrowed(a, type), type);
}

template <class T>
inline Vector load(const T* p) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline Vector load(const T* p, int64_t count) {
    return widened(_mm256_maskz_loadu_epi16(first(count), p), T{});
}
template <class T>
inline void store(T* p, Vector a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(a, T{}));
}
template <class T>
inline void store(T* p, Vector a, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), narrowed(a, T{}));
}

}  // namespace
}  // namespace clipfast::cpu
