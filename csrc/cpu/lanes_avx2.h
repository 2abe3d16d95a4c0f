// Eight float32 lanes by AVX2, FMA and F16C. Include it between the pragmas that allow the instructions.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace clipfast::cpu {
namespace {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr const char* vectors = "avx2";
constexpr int64_t lanes = 8;
using Vector = __m256;

inline __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vector all(float x) { return _mm256_set1_ps(x); }
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }    // a·b + c
inline Vector fnma(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a·b
// a product that is rounded, where the compiler would join it with the sum it goes to
inline Vector apart(Vector a) {
    asm("" : "+x"(a));
    return a;
}
inline Vector absolute(Vector a) { return _mm256_andnot_ps(all(-0.f), a); }
// NaN stays NaN in these
inline Vector at_least(Vector a, float low) { return _mm256_max_ps(all(low), a); }
inline Vector at_most(Vector a, float high) { return _mm256_min_ps(all(high), a); }
inline float sum_of(Vector a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// a where x < 0, else b
inline Vector where_negative(Vector x, Vector a, Vector b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_LT_OQ));
}

template <bool exact>
inline Vector reciprocal(Vector a) {
    return _mm256_div_ps(all(1.f), a);  // its estimate has 12 bits
}

inline Vector nearest_integer(Vector a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a · 2^n; both a and the result are normal numbers
inline Vector scaled(Vector a, Vector n) {
    return (Vector)_mm256_add_epi32((__m256i)a, _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
}
// 0 where x is below `low`, else a
inline Vector zero_below(Vector a, Vector x, float low) {
    return _mm256_and_ps(a, _mm256_cmp_ps(x, all(low), _CMP_NLT_UQ));
}

inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const float* p, int64_t count) { return _mm256_maskload_ps(p, first(count)); }
inline void store(float* p, Vector a) { _mm256_storeu_ps(p, a); }
inline void store(float* p, Vector a, int64_t count) { _mm256_maskstore_ps(p, first(count), a); }

inline Vector widened(__m128i bits, Bfloat16) { return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16); }
inline Vector widened(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }

// to the nearest, ties to even
inline __m128i narrowed(Vector a, Bfloat16) {
    const __m256i bits = (__m256i)a;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const Vector rounded =
        _mm256_blendv_ps((Vector)sum, (Vector)_mm256_set1_epi32(0x7fc00000), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrowed(Vector a, Float16) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

// as it is read again once it was stored
inline Vector rounded(Vector a, float) { return a; }
template <class T>
inline Vector rounded(Vector a, T type) {
    return widened(narrowed(a, type), type);
}

template <class T>
inline Vector load(const T* p) {
    return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
inline Vector load(const T* p, int64_t count) {
    T part[lanes] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}
template <class T>
inline void store(T* p, Vector a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed(a, T{}));
}
template <class T>
inline void store(T* p, Vector a, int64_t count) {
    T part[lanes];
    store(part, a);
    std::memcpy(p, part, count * sizeof(T));
}

}  // namespace
}  // namespace clipfast::cpu
