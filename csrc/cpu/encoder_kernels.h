// The kernels of encoder.h for one dtype on AVX-512: float32, or bfloat16 where CLIPFAST_BFLOAT16 is 1. Each dtype's
// file sets it, includes this and names the result.

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)

// before the pragmas: what these bring is for every CPU
#include <immintrin.h>

#include <algorithm>
#include <cstring>

// only what follows is compiled for these instructions, and all of it is local to the file that includes it
#if defined(__clang__) && CLIPFAST_BFLOAT16
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#elif CLIPFAST_BFLOAT16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#include "avx512.h"

namespace clipfast::cpu {
namespace {

#if CLIPFAST_BFLOAT16
using Element = uint16_t;
#else
using Element = float;
#endif
constexpr int64_t terms_a_unit = sizeof(uint32_t) / sizeof(Element);
constexpr int64_t tile_rows = 96;  // at most: their activations and a panel stay in the second-level cache

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
// products

template <Product::Then then, Gelu gelu, int rows>
void tile(const Product& p, int64_t row, int64_t column) {
    const int64_t units = p.terms / terms_a_unit;
    const __mmask16 masks[2] = {first_lanes(p.columns - column), first_lanes(p.columns - column - 16)};
    __m512 bias[2];
    for (int half = 0; half < 2; ++half)
        bias[half] = p.bias ? _mm512_maskz_loadu_ps(masks[half], p.bias + column + 16 * half) : _mm512_setzero_ps();
    register_tile<rows>(units, units_at(p.a, row * p.terms), units,
                        static_cast<const uint32_t*>(p.b) + column * units, [&](int r, int half, __m512 sum) {
                            const int64_t at = (row + r) * p.c_row + column + 16 * half;
                            sum = _mm512_add_ps(sum, bias[half]);
                            if constexpr (then == Product::Then::add) {
                                float* c = static_cast<float*>(p.c) + at;
                                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(masks[half], c));
                                _mm512_mask_storeu_ps(c, masks[half], sum);
                                return;
                            }
                            if constexpr (then == Product::Then::gelu)
                                sum = gelu == Gelu::none   ? gelu_erf(sum)
                                      : gelu == Gelu::tanh ? gelu_tanh(sum)
                                                           : gelu_quick(sum);
                            store(static_cast<Element*>(p.c) + at, masks[half], sum);
                        });
}

template <Product::Then then, Gelu gelu>
void rows_of_tile(const Product& p, int64_t row, int64_t end, int64_t column) {
    for (; row + height <= end; row += height) tile<then, gelu, height>(p, row, column);
    switch (end - row) {
        case 7: return tile<then, gelu, 7>(p, row, column);
        case 6: return tile<then, gelu, 6>(p, row, column);
        case 5: return tile<then, gelu, 5>(p, row, column);
        case 4: return tile<then, gelu, 4>(p, row, column);
        case 3: return tile<then, gelu, 3>(p, row, column);
        case 2: return tile<then, gelu, 2>(p, row, column);
        case 1: return tile<then, gelu, 1>(p, row, column);
    }
}

int64_t blocks_of_rows(const Product& p) { return (p.rows + tile_rows - 1) / tile_rows; }

// Panel by panel: threads that take equal numbers of tiles get equal work, but for a part of one panel's rows.
template <Product::Then then, Gelu gelu>
void run_tiles(const Product& p, int64_t begin, int64_t end) {
    const int64_t blocks = blocks_of_rows(p), rows = round_up((p.rows + blocks - 1) / blocks, height);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t % blocks * rows;
        rows_of_tile<then, gelu>(p, row, std::min(row + rows, p.rows), t / blocks * panel);
    }
}

int64_t tiles(const Product& p) { return blocks_of_rows(p) * ((p.columns + panel - 1) / panel); }

void product(const Product& p, int64_t begin, int64_t end) {
    using Then = Product::Then;
    if (p.then == Then::add) return run_tiles<Then::add, Gelu::none>(p, begin, end);
    if (p.then == Then::store) return run_tiles<Then::store, Gelu::none>(p, begin, end);
    switch (p.gelu) {
        case Gelu::none: return run_tiles<Then::gelu, Gelu::none>(p, begin, end);
        case Gelu::tanh: return run_tiles<Then::gelu, Gelu::tanh>(p, begin, end);
        case Gelu::quick: return run_tiles<Then::gelu, Gelu::quick>(p, begin, end);
    }
}

// `count` rows of units, `row` units apart, to panels: to[p][unit][32], zeros beyond the last row
void pack_rows(const uint32_t* from, int64_t count, int64_t row, int64_t units, uint32_t* to) {
    for (int64_t c = 0; c < round_up(count, panel); c += 16) {
        const uint32_t* rows[16];
        for (int64_t i = 0; i < 16; ++i) rows[i] = c + i < count ? from + (c + i) * row : nullptr;
        uint32_t* at = to + c / panel * units * panel + c % panel;
        for (int64_t k = 0; k < units; k += 16) transpose_16(rows, k, units, at);
    }
}

int64_t packed_elements(int64_t columns, int64_t terms) { return round_up(columns, panel) * terms; }

void pack(const void* weights, int64_t columns, int64_t terms, void* to) {
    const int64_t units = terms / terms_a_unit;
    pack_rows(static_cast<const uint32_t*>(weights), columns, units, units, static_cast<uint32_t*>(to));
}

// ---------------------------------------------------------------------------------------------------------------
// LayerNorm and conversions

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t width, void* y) {
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
        store(static_cast<Element*>(y) + i, 0xffff,
              _mm512_fmadd_ps(normed, _mm512_loadu_ps(weight + i), _mm512_loadu_ps(bias + i)));
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
// attention: eight queries at a time against all keys, whose scores fit the first-level cache

struct Scratch {
    uint32_t* keys;    // panels of keys: [keys / 32][head_dim units][32]
    uint32_t* values;  // panels of columns: [head_dim / 32][keys units][32]
    float* scores;     // [8][keys]
    Element* weights;  // [8][keys]
};

int64_t padded(int64_t tokens) { return round_up(tokens, panel); }

int64_t attention_scratch(int64_t tokens, int64_t head_dim) {
    const int64_t keys = padded(tokens);
    return sizeof(Element) * keys * (head_dim + round_up(head_dim, panel)) +
           height * keys * (sizeof(float) + sizeof(Element));
}

Scratch scratch_at(void* memory, int64_t tokens, int64_t head_dim) {
    const int64_t keys = padded(tokens);
    Scratch s;
    s.keys = static_cast<uint32_t*>(memory);
    s.values = s.keys + keys * head_dim / terms_a_unit;
    s.scores = reinterpret_cast<float*>(s.values + keys * round_up(head_dim, panel) / terms_a_unit);
    s.weights = reinterpret_cast<Element*>(s.scores + height * keys);
    return s;
}

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

template <int rows>
void attend(const Head& h, const Scratch& s, int64_t query) {
    const int64_t keys = padded(h.tokens), units = h.head_dim / terms_a_unit;
    // whole panels of keys up to the last that a row sees
    const int64_t end = h.causal ? padded(query + rows) : keys;
    for (int64_t j = 0; j < end; j += panel)
        register_tile<rows>(units, units_at(h.q, query * h.row), h.row / terms_a_unit, s.keys + j * units,
                            [&](int r, int half, __m512 sum) {
                                _mm512_storeu_ps(s.scores + r * keys + j + 16 * half, sum);
                            });
    __m512 rescale[rows];
    for (int r = 0; r < rows; ++r) {
        const int64_t visible = h.causal ? query + r + 1 : h.tokens;
        const float sum = exponentials(s.scores + r * keys, visible, end, h.scale, s.weights + r * keys);
        rescale[r] = reciprocal(_mm512_set1_ps(sum));
    }
    Element* out = static_cast<Element*>(h.out) + query * h.out_row;
    for (int64_t d = 0; d < h.head_dim; d += panel)
        register_tile<rows>(end / terms_a_unit, units_at(s.weights, 0), keys / terms_a_unit,
                            s.values + d * (keys / terms_a_unit), [&](int r, int half, __m512 sum) {
                                store(out + r * h.out_row + d + 16 * half, first_lanes(h.head_dim - d - 16 * half),
                                      _mm512_mul_ps(sum, rescale[r]));
                            });
}

void attend_rest(const Head& h, const Scratch& s, int64_t query) {
    switch (h.tokens - query) {
        case 7: return attend<7>(h, s, query);
        case 6: return attend<6>(h, s, query);
        case 5: return attend<5>(h, s, query);
        case 4: return attend<4>(h, s, query);
        case 3: return attend<3>(h, s, query);
        case 2: return attend<2>(h, s, query);
        case 1: return attend<1>(h, s, query);
    }
}

void attention(const Head& h, void* scratch) {
    const Scratch s = scratch_at(scratch, h.tokens, h.head_dim);
    pack_rows(units_at(h.k, 0), h.tokens, h.row / terms_a_unit, h.head_dim / terms_a_unit, s.keys);
    pack_values(h, s.values);
    int64_t query = 0;
    for (; query + height <= h.tokens; query += height) attend<height>(h, s, query);
    attend_rest(h, s, query);
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
        store(static_cast<Element*>(h.out) + d, mask, _mm512_mul_ps(sum, rescale));
    }
}

const EncoderKernels kernels{sizeof(Element), tiles,     product,          packed_elements, pack,      layer_norm,
                             attention_scratch, attention, attention_of_one, to_float,        from_float};

}  // namespace
}  // namespace clipfast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace clipfast::cpu {
namespace {

const EncoderKernels* kernels_of_this_cpu() {
#if CLIPFAST_BFLOAT16
    static const bool multiplies = __builtin_cpu_supports("avx512bf16");
#else
    static const bool multiplies = __builtin_cpu_supports("avx512f");
#endif
    static const bool can = multiplies && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    return can ? &kernels : nullptr;
}

}  // namespace
}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {
namespace {

const EncoderKernels* kernels_of_this_cpu() { return nullptr; }

}  // namespace
}  // namespace clipfast::cpu

#endif
