// What the encoder's kernels have in common on AVX-512, whatever multiplies: rows that are loaded, stored, normed and
// packed, softmax, and attention of one query. Included by encoder_kernels.h and encoder_amx.cpp between the pragmas that
// allow the instructions, after avx512.h; CLIPFAST_TILE_ORDER is 1 where activations lie in tile order (encoder.h).

namespace clipfast::cpu {
namespace {

#if CLIPFAST_BFLOAT16
using Element = uint16_t;
#else
using Element = float;
#endif
constexpr int64_t terms_a_unit = sizeof(uint32_t) / sizeof(Element);

const uint32_t* units_at(const void* p, int64_t element) {
    return reinterpret_cast<const uint32_t*>(static_cast<const Element*>(p) + element);
}

inline __m512 load(__mmask16 mask, const Element* p) {
#if CLIPFAST_BFLOAT16
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
#else
    return _mm512_maskz_loadu_ps(mask, p);
#endif
}
inline void store(Element* p, __mmask16 mask, __m512 x) {
#if CLIPFAST_BFLOAT16
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
#else
    _mm512_mask_storeu_ps(p, mask, x);
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// activations

#if CLIPFAST_TILE_ORDER
inline int64_t activation_elements(int64_t rows, int64_t width) {
    return round_up(rows, 2 * tile_height) * round_up(width, tile_terms);
}
inline int64_t activation_at(int64_t width, int64_t row, int64_t column) {
    const int64_t tile = row / tile_height * (round_up(width, tile_terms) / tile_terms) + column / tile_terms;
    return tile * tile_height * tile_terms + row % tile_height * tile_terms + column % tile_terms;
}
#else
inline int64_t activation_elements(int64_t rows, int64_t width) { return rows * width; }
inline int64_t activation_at(int64_t width, int64_t row, int64_t column) { return row * width + column; }
#endif

// 16 columns from `column` on, those of the mask, of one row of activations
inline void put(void* activations, int64_t width, int64_t row, int64_t column, __mmask16 mask, __m512 x) {
    Element* to = static_cast<Element*>(activations) + activation_at(width, row, column);
#if CLIPFAST_TILE_ORDER
    const int64_t left = tile_terms - column % tile_terms;
    if (left < 16) {  // the rest lies in the next tile
        const __mmask16 here = first_lanes(left);
        store(static_cast<Element*>(activations) + activation_at(width, row, column + left) - left, mask & ~here, x);
        mask &= here;
    }
#endif
    store(to, mask, x);
}

void copy_row(const void* from, int64_t row, int64_t width, void* to, int64_t to_row) {
#if CLIPFAST_TILE_ORDER
    const int64_t together = tile_terms;
#else
    const int64_t together = width;
#endif
    for (int64_t c = 0; c < width; c += together)
        std::memcpy(static_cast<Element*>(to) + activation_at(width, to_row, c),
                    static_cast<const Element*>(from) + activation_at(width, row, c), together * sizeof(Element));
}

// `count` rows of units, `row` units apart, to panels: to[p][unit][32] of `to_units` each, zeros beyond the last row
// and unit
void pack_rows(const uint32_t* from, int64_t count, int64_t row, int64_t units, uint32_t* to, int64_t to_units) {
    for (int64_t c = 0; c < round_up(count, panel); c += 16) {
        const uint32_t* rows[16];
        for (int64_t i = 0; i < 16; ++i) rows[i] = c + i < count ? from + (c + i) * row : nullptr;
        uint32_t* at = to + c / panel * to_units * panel + c % panel;
        for (int64_t k = 0; k < units; k += 16) transpose_16(rows, k, units, at);
        if (c % panel == 0) std::memset(at + units * panel, 0, (to_units - units) * panel * sizeof *at);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// LayerNorm and conversions

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t width, void* y,
                int64_t row) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(width));
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / float(width);
    const __m512 rstd = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(_mm512_set1_ps(variance + eps)));
    for (int64_t i = 0; i < width; i += 16) {
        const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), rstd);
        put(y, width, row, i, 0xffff, _mm512_fmadd_ps(normed, _mm512_loadu_ps(weight + i), _mm512_loadu_ps(bias + i)));
    }
}

void to_float(const void* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        _mm512_mask_storeu_ps(to + i, mask, load(mask, static_cast<const Element*>(from) + i));
    }
}

void from_float(const float* from, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        store(static_cast<Element*>(to) + i, mask, _mm512_maskz_loadu_ps(mask, from + i));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// attention

int64_t padded(int64_t tokens) { return round_up(tokens, panel); }

// values [tokens, head_dim] to panels of columns whose units are neighbouring tokens
void pack_values(const Head& h, uint32_t* to) {
    const int64_t units = padded(h.tokens) / terms_a_unit;
    for (int64_t u = 0; u < units; ++u)
        for (int64_t d = 0; d < round_up(h.head_dim, panel); d += 16) {
            const int64_t t = u * terms_a_unit;
            const Element* at = static_cast<const Element*>(h.v) + t * h.row + d;
            const __mmask16 mask = first_lanes(h.head_dim - d);
#if CLIPFAST_BFLOAT16
            const __m256i even = _mm256_maskz_loadu_epi16(t < h.tokens ? mask : 0, at);
            const __m256i odd = _mm256_maskz_loadu_epi16(t + 1 < h.tokens ? mask : 0, at + h.row);
            const __m512i unit =
                _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
#else
            const __m512i unit = _mm512_maskz_loadu_epi32(t < h.tokens ? mask : 0, at);
#endif
            _mm512_storeu_si512(to + (d / panel * units + u) * panel + d % panel, unit);
        }
}

// softmax numerators of one row over its first `visible` keys, in the dtype, with zeros up to `keys`; returns their sum
float exponentials(const float* scores, int64_t visible, int64_t keys, float scale, Element* weights) {
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (int64_t j = 0; j < visible; j += 16)
        most = _mm512_mask_max_ps(most, first_lanes(visible - j), most, _mm512_loadu_ps(scores + j));
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(most)), s = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < keys; j += 16) {
        const __mmask16 mask = first_lanes(visible - j);
        const __m512 e = _mm512_maskz_mov_ps(
            mask, exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), shift), s)));
        sum = _mm512_add_ps(sum, e);
        store(weights + j, 0xffff, e);
    }
    return _mm512_reduce_add_ps(sum);
}

void attention_of_one(const Head& h, void* scratch) {
    const int64_t keys = padded(h.tokens);
    float* scores = static_cast<float*>(scratch);
    Element* weights = reinterpret_cast<Element*>(scores + keys);
    const Element *q = static_cast<const Element*>(h.q), *k = static_cast<const Element*>(h.k);
    for (int64_t j = 0; j < h.tokens; ++j) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < h.head_dim; d += 16) {
            const __mmask16 mask = first_lanes(h.head_dim - d);
            sum = _mm512_fmadd_ps(load(mask, q + d), load(mask, k + j * h.row + d), sum);
        }
        scores[j] = _mm512_reduce_add_ps(sum);
    }
    const __m512 rescale = reciprocal(_mm512_set1_ps(exponentials(scores, h.tokens, keys, h.scale, weights)));
    for (int64_t d = 0; d < h.head_dim; d += 16) {
        const __mmask16 mask = first_lanes(h.head_dim - d);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < h.tokens; ++j) {
            const __m512 value = load(mask, static_cast<const Element*>(h.v) + j * h.row + d);
#if CLIPFAST_BFLOAT16
            const __m512 weight = (__m512)_mm512_set1_epi32(int(uint32_t(weights[j]) << 16));
#else
            const __m512 weight = _mm512_set1_ps(weights[j]);
#endif
            sum = _mm512_fmadd_ps(weight, value, sum);
        }
        put(h.out, h.width, h.first, h.column + d, mask, _mm512_mul_ps(sum, rescale));
    }
}

}  // namespace
}  // namespace clipfast::cpu
