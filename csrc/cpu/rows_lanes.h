// What kernels over rows (rows_kernels.h) want beside lanes.h: 16-bit numbers as they lie in memory, and functions of
// lanes. Include it behind lanes.h.

#include <cstring>

namespace clipfast::cpu {
namespace {

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes sub(Lanes a, Lanes b) { return a - b; }
inline Lanes mul(Lanes a, Lanes b) { return a * b; }
// NaN stays NaN in these
inline Lanes at_least(Lanes a, float low) { return larger(all(low), a); }
inline Lanes at_most(Lanes a, float high) { return smaller(all(high), a); }

#if CLIPFAST_LANES == 16

constexpr const char* vectors = "avx512";

// a product that is rounded, where the compiler would join it with the sum it goes to
inline Lanes apart(Lanes a) {
    asm("" : "+v"(a));
    return a;
}

// 1 / a for a in 1..2^126: within a unit of rounding, or 6e-5
template <bool exact>
inline Lanes reciprocal(Lanes a) {
    const Lanes r = _mm512_rcp14_ps(a);
    return exact ? fused(r, fused_negative(a, r, all(1.f)), r) : r;
}

// a · 2^n
inline Lanes scaled(Lanes a, Lanes n) { return _mm512_scalef_ps(a, n); }
// 0 where x is below `low`, else a
inline Lanes zero_below(Lanes a, Lanes x, float low) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(low), _CMP_NLT_UQ), a);
}

inline Lanes widened(__m256i bits, Bfloat16) { return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
inline Lanes widened(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }

// to the nearest, ties to even. AVX512-BF16's own conversion loses numbers below the normal range.
inline __m256i narrowed(Lanes a, Bfloat16) {
    const __m512i bits = (__m512i)a;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline __m256i narrowed(Lanes a, Float16) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

template <class T>
inline Lanes load(const T* p) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline Lanes load(const T* p, int64_t count) {
    return widened(_mm256_maskz_loadu_epi16(first_lanes(count), p), T{});
}
template <class T>
inline void store(T* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(a, T{}));
}
template <class T>
inline void store(T* p, Lanes a, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), narrowed(a, T{}));
}

#else

constexpr const char* vectors = "avx2";

// a product that is rounded, where the compiler would join it with the sum it goes to
inline Lanes apart(Lanes a) {
    asm("" : "+x"(a));
    return a;
}

template <bool exact>
inline Lanes reciprocal(Lanes a) {
    return _mm256_div_ps(all(1.f), a);  // its estimate has 12 bits
}

// a · 2^n; both a and the result are normal numbers
inline Lanes scaled(Lanes a, Lanes n) {
    return (Lanes)_mm256_add_epi32((__m256i)a, _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
}
// 0 where x is below `low`, else a
inline Lanes zero_below(Lanes a, Lanes x, float low) {
    return _mm256_and_ps(a, _mm256_cmp_ps(x, all(low), _CMP_NLT_UQ));
}

inline Lanes widened(__m128i bits, Bfloat16) { return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16); }
inline Lanes widened(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }

// to the nearest, ties to even
inline __m128i narrowed(Lanes a, Bfloat16) {
    const __m256i bits = (__m256i)a;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const Lanes rounded =
        _mm256_blendv_ps((Lanes)sum, (Lanes)_mm256_set1_epi32(0x7fc00000), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrowed(Lanes a, Float16) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

template <class T>
inline Lanes load(const T* p) {
    return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
inline Lanes load(const T* p, int64_t count) {
    T part[lanes] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}
template <class T>
inline void store(T* p, Lanes a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed(a, T{}));
}
template <class T>
inline void store(T* p, Lanes a, int64_t count) {
    T part[lanes];
    store(part, a);
    std::memcpy(p, part, count * sizeof(T));
}

#endif

inline Lanes load(const float* p, int64_t count) { return load(first_lanes(count), p); }
inline void store(float* p, Lanes a, int64_t count) { store(p, first_lanes(count), a); }

// as it is read again once it was stored
inline Lanes rounded(Lanes a, float) { return a; }
template <class T>
inline Lanes rounded(Lanes a, T type) {
    return widened(narrowed(a, type), type);
}

}  // namespace
}  // namespace clipfast::cpu
