// Building blocks of matrix products: a register tile, and a transpose.
//
// Matrices are made of 32-bit units: one float, or a pair of neighbouring bfloat16 terms that vdpbf16ps multiplies and
// adds in float32. Include this between the pragmas that allow the instructions, with CLIPFAST_BFLOAT16 defined as 1
// or 0; everything is local to the file that does, so that no CPU without the instructions meets it.

#include <cstdint>
#include <cstring>

#include "elementwise_functions.h"

namespace clipfast::cpu {
namespace {

// columns of a register tile, and of the panels that B lies in: [panel][k][2 · lanes] units
constexpr int64_t panel = 2 * lanes;
// its rows: two sums each, beside 2 registers of B and 1 of A; AVX2 has 16 registers, the others 32
constexpr int64_t height = CLIPFAST_LANES == 16 ? 8 : CLIPFAST_LANES == 8 ? 6 : 12;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if !CLIPFAST_BFLOAT16
inline Lanes multiply_add(Lanes sum, uint32_t a, const uint32_t* b) {
    float one;
    std::memcpy(&one, &a, sizeof(one));
    return fused(all(one), load(reinterpret_cast<const float*>(b)), sum);
}
#endif

// Sums of more units than these are made of parts, as BLAS does: rounding errors grow with the length of a sum
constexpr int64_t units_a_part = 192;

// Σ_k A[r, k] · B[k, c] for `rows` rows and a panel's columns: store(r, half, sum) gets row r of the panel's first or
// second half. A sum is taken in one order whatever `rows` is: a row's result does not depend on its neighbours.
template <int rows, class Store>
inline void register_tile(int64_t units, const uint32_t* a, int64_t a_row, const uint32_t* b, const Store& store) {
    Lanes total[rows][2];
    for (int64_t part = 0; part == 0 || part < units; part += units_a_part) {
        const int64_t end = units - part < units_a_part ? units : part + units_a_part;
        Lanes sum[rows][2];
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = all(0.f);
        for (int64_t k = part; k < end; ++k) {
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r)
                for (int half = 0; half < 2; ++half)
                    sum[r][half] = multiply_add(sum[r][half], a[r * a_row + k], b + k * panel + half * lanes);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half)
                total[r][half] = part ? total[r][half] + sum[r][half] : sum[r][half];
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
        store(r, 0, total[r][0]);
        store(r, 1, total[r][1]);
    }
}

// As many rows of units as there are lanes to columns: to[k][lane] = from[lane][k] for as many k (`units` in all, less
// at the end), rows of `to` a panel or `to_row` units apart; rows that are nullptr count as zeros
template <int64_t to_row = panel>
inline void transpose(const uint32_t* const from[lanes], int64_t k, int64_t units, uint32_t* to) {
#if CLIPFAST_LANES == 4
    float32x4_t r[4], t[4];
    for (int i = 0; i < 4; ++i)
        r[i] = from[i] ? load(first_lanes(units - k), reinterpret_cast<const float*>(from[i] + k)) : all(0.f);
    for (int i = 0; i < 4; i += 2) {
        t[i] = vtrn1q_f32(r[i], r[i + 1]);
        t[i + 1] = vtrn2q_f32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        const float64x2_t low = vreinterpretq_f64_f32(t[i]), high = vreinterpretq_f64_f32(t[i + 2]);
        r[i] = vreinterpretq_f32_f64(vtrn1q_f64(low, high));
        r[i + 2] = vreinterpretq_f32_f64(vtrn2q_f64(low, high));
    }
    for (int i = 0; i < 4 && k + i < units; ++i) store(reinterpret_cast<float*>(to + (k + i) * to_row), r[i]);
#elif CLIPFAST_LANES == 8
    const __m256i mask = first_lanes(units - k);
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i)
        r[i] = from[i] ? load(mask, reinterpret_cast<const float*>(from[i] + k)) : _mm256_setzero_ps();
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8 && k + i < units; ++i) store(reinterpret_cast<float*>(to + (k + i) * to_row), t[i]);
#else
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
#endif
}

}  // namespace
}  // namespace clipfast::cpu
