// Building blocks on AVX-512: a register tile of a matrix product, a transpose, and elementwise functions.
//
// Matrices are made of 32-bit units: one float, or a pair of neighbouring bfloat16 terms that vdpbf16ps multiplies and
// adds in float32. Include this between the pragmas that allow the instructions, with CLIPFAST_BFLOAT16 defined as 1
// or 0; everything is local to the file that does, so that no CPU without the instructions meets it.

#include <immintrin.h>

#include <cstdint>

namespace clipfast::cpu {
namespace {

constexpr int64_t panel = 32;  // columns of a register tile, and of the panels that B lies in: [panel][k][32] units
constexpr int64_t height = 8;  // its rows: 16 sums, 2 registers of B and 1 of A

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// a mask of the first `count` of 16 lanes
inline __mmask16 first_lanes(int64_t count) {
    return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
#if CLIPFAST_BFLOAT16
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
#endif
}

// Sums of more units than these are made of parts, as BLAS does: rounding errors grow with the length of a sum
constexpr int64_t units_a_part = 192;

// Σ_k A[r, k] · B[k, c] for `rows` rows and 32 columns: store(r, half, sum) gets columns 16·half to 16·half + 15 of row
// r. A sum is taken in one order whatever `rows` is: a row's result does not depend on its neighbours.
template <int rows, class Store>
inline void register_tile(int64_t units, const uint32_t* a, int64_t a_row, const uint32_t* b, const Store& store) {
    __m512 total[rows][2];
    for (int64_t part = 0; part == 0 || part < units; part += units_a_part) {
        const int64_t end = units - part < units_a_part ? units : part + units_a_part;
        __m512 sum[rows][2];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int64_t k = part; k < end; ++k) {
            const __m512i b0 = _mm512_loadu_si512(b + k * panel), b1 = _mm512_loadu_si512(b + k * panel + 16);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const __m512i x = _mm512_set1_epi32(int(a[r * a_row + k]));
                sum[r][0] = multiply_add(sum[r][0], x, b0);
                sum[r][1] = multiply_add(sum[r][1], x, b1);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half)
                total[r][half] = part ? _mm512_add_ps(total[r][half], sum[r][half]) : sum[r][half];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        store(r, 0, total[r][0]);
        store(r, 1, total[r][1]);
    }
}

// 16 rows of units to 16 columns: to[k][16] = from[16][k] for 16 k (`units` in all, less at the end), rows of `to` a panel
// or `to_row` units apart; rows that are nullptr count as zeros
template <int64_t to_row = panel>
inline void transpose_16(const uint32_t* const from[16], int64_t k, int64_t units, uint32_t* to) {
    const __mmask16 mask = first_lanes(units - k);
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = from[i] ? _mm512_maskz_loadu_epi32(mask, from[i] + k) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16 && k + i < units; ++i) _mm512_storeu_si512(to + (k + i) * to_row, r[i]);
}

// Elementwise functions: within 4e-7 for float32; within 1e-4, a twentieth of a rounding error, where results are
// rounded to bfloat16.

inline __m512 polynomial(__m512, __m512 sum) { return sum; }
template <class... Rest>
inline __m512 polynomial(__m512 x, __m512 sum, float next, Rest... rest) {
    return polynomial(x, _mm512_fmadd_ps(sum, x, _mm512_set1_ps(next)), rest...);
}

// e^x; 0 below -104, infinity above 88.7
inline __m512 exponential(__m512 x) {
    // in this order of operands NaN stays NaN
    x = _mm512_max_ps(_mm512_set1_ps(-104.f), _mm512_min_ps(_mm512_set1_ps(89.f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    // x - n·ln 2 in two steps, the first exact
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860682e-6f), r);
#if CLIPFAST_BFLOAT16
    const __m512 y = polynomial(r, _mm512_set1_ps(1.f / 24), 1.f / 6, .5f, 1.f, 1.f);
#else
    const __m512 y = polynomial(r, _mm512_set1_ps(1.f / 5040), 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f);
#endif
    return _mm512_scalef_ps(y, n);
}

inline __m512 reciprocal(__m512 x) {
#if CLIPFAST_BFLOAT16
    return _mm512_rcp14_ps(x);
#else
    return _mm512_div_ps(_mm512_set1_ps(1.f), x);
#endif
}

// x·Φ(x): Φ(-z) = e^(-z²/2) · t·P(t) with t = 1 / (1 + 0.3 z) and P a Chebyshev fit to half the scaled complementary
// error function, within 4e-9 of it (4e-6 for bfloat16)
inline __m512 gelu_erf(__m512 x) {
    const __m512 z = _mm512_abs_ps(x), one = _mm512_set1_ps(1.f);
    const __m512 t = reciprocal(_mm512_fmadd_ps(z, _mm512_set1_ps(0.3f), one));
#if CLIPFAST_BFLOAT16
    const __m512 p = polynomial(t, _mm512_set1_ps(-0.0814178176f), 0.229118987f, -0.0320792111f, 0.152508916f,
                                0.111583332f, 0.120285482f);
#else
    const __m512 p = polynomial(t, _mm512_set1_ps(-0.0208782615f), 0.113806517f, -0.231400287f, 0.195974186f,
                                -0.0828475512f, 0.0979556976f, 0.0777838584f, 0.110361191f, 0.119557241f, 0.119687407f);
#endif
    const __m512 e = exponential(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-.5f)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), negative, tail));
}

// x·σ(z)
inline __m512 times_sigmoid(__m512 x, __m512 z) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), z));
    return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.f), e)));
}

inline __m512 gelu_quick(__m512 x) { return times_sigmoid(x, _mm512_mul_ps(x, _mm512_set1_ps(1.702f))); }

// x/2·(1 + tanh(u)) = x·σ(2u), u = √(2/π)·(x + 0.044715·x³)
inline __m512 gelu_tanh(__m512 x) {
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.f));
    return times_sigmoid(x, _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(1.59576912f)));
}

}  // namespace
}  // namespace clipfast::cpu
