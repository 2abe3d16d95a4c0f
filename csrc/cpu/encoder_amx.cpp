// The encoder's kernels for bfloat16 on AMX.
//
// A product takes 32 × 32 sums in four tiles at a time: two tiles of activations and two of weights make four of
// products. Activations lie in tile order, so that a tile is sixteen cache lines in a row; weights lie in the panels of
// encoder_rows.h, whose rows of pairs are what the instruction wants. Columns are outermost: a panel of weights stays in
// the first-level cache while activations come from the second. Bias, GELU and residual are applied on the way out.

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)

// before the pragmas: what these bring is for every CPU
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#define CLIPFAST_INSTRUCTIONS "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"
#include "allow_instructions.h"

#define CLIPFAST_BFLOAT16 1
#define CLIPFAST_LANES 16
#define CLIPFAST_TILE_ORDER 1
#include "register_tile.h"
#include "amx_steps.h"
#include "encoder_rows.h"

#if CLIPFAST_HAS_TILES

namespace clipfast::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// products

// Terms of a product that is added to float32 rows, which keep the sums between blocks: activations and weights of so
// many stay in the caches for all columns
constexpr int64_t steps_a_block = 256 / tile_terms;
constexpr int64_t rows_a_share = 128;  // threads share columns, and rows by so many

template <Product::Then then, Gelu gelu>
inline __m512 finished(__m512 sum, __m512 bias) {
    sum = _mm512_add_ps(sum, bias);
    if constexpr (then != Product::Then::gelu) return sum;
    return gelu == Gelu::none ? gelu_erf(sum) : gelu == Gelu::tanh ? gelu_tanh(sum) : gelu_quick(sum);
}

// what is stored of `rows` rows of sums [32, 32]
template <Product::Then then, Gelu gelu>
inline void finish(const Product& p, const float* sums, int64_t row, int64_t rows, int64_t column) {
    const __mmask16 left = first_lanes(p.columns - column), right = first_lanes(p.columns - column - 16);
    const __m512 zero = _mm512_setzero_ps();
    const __m512 bias[2] = {p.bias ? _mm512_maskz_loadu_ps(left, p.bias + column) : zero,
                            p.bias ? _mm512_maskz_loadu_ps(right, p.bias + column + 16) : zero};
    for (int64_t r = 0; r < rows; ++r, sums += panel) {
        const __m512 x = finished<then, gelu>(_mm512_load_ps(sums), bias[0]);
        const __m512 y = finished<then, gelu>(_mm512_load_ps(sums + 16), bias[1]);
        if constexpr (then == Product::Then::add) {
            float* c = static_cast<float*>(p.c) + (row + r) * p.c_row + column;
            _mm512_mask_storeu_ps(c, left, x);
            _mm512_mask_storeu_ps(c + 16, right, y);
            continue;
        }
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
        uint16_t* c = static_cast<uint16_t*>(p.c);
        // beyond the columns a GELU's activations are GELU(0) = 0, as the next product's terms have to be
        if constexpr (then == Product::Then::gelu)
            _mm512_storeu_si512(c + activation_at(p.columns, row + r, column), both);
        else
            _mm512_mask_storeu_epi16(c + (row + r) * p.c_row + column, __mmask32(right) << 16 | left, both);
    }
}

// rows row..row+31 (at most) and columns column..column+31 over terms of the steps begin..end-1
template <Product::Then then, Gelu gelu, bool both>
inline void block(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t begin, int64_t end) {
    const int64_t all = round_up(p.terms, tile_terms) / tile_terms, a_row = all * tile_elements;
    const uint16_t* a = static_cast<const uint16_t*>(p.a) + row / tile_height * a_row + begin * tile_elements;
    const uint32_t* b = static_cast<const uint32_t*>(p.b) + (column * all + begin * panel) * (tile_terms / 2);
    float* c = static_cast<float*>(p.c) + row * p.c_row + column;
    if constexpr (then == Product::Then::add)
        load_sums<both>(c, p.c_row);
    else
        zero_sums<both>();
    // behind these rows come the next ones; beyond the last there is nothing to be had, and nothing is lost
    steps<both>({a, a_row, tile_elements}, b, end - begin, a + 2 * a_row);
    if (then == Product::Then::add && end < all) return store_sums<both>(c, p.c_row);
    alignas(64) float sums[2 * tile_height * panel];
    store_sums<both>(sums, panel);
    finish<then, gelu>(p, sums, row, rows, column);
}

int64_t shares_of_rows(const Product& p) { return (p.rows + rows_a_share - 1) / rows_a_share; }

// Panel by panel, as tiles are numbered: a thread with all of them has the columns outermost
template <Product::Then then, Gelu gelu>
void run_tiles(const Product& p, int64_t begin, int64_t end) {
    const int64_t shares = shares_of_rows(p), all = round_up(p.terms, tile_terms) / tile_terms;
    const int64_t together = then == Product::Then::add ? steps_a_block : all;
    const Tiles tiles;
    for (int64_t k = 0; k < all; k += together) {
        const int64_t last = std::min(k + together, all);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t column = t / shares * panel, first = t % shares * rows_a_share;
            for (int64_t row = first; row < std::min(first + rows_a_share, p.rows); row += 2 * tile_height) {
                const int64_t rows = std::min(p.rows - row, 2 * tile_height);
                if (rows > tile_height)
                    block<then, gelu, true>(p, row, rows, column, k, last);
                else
                    block<then, gelu, false>(p, row, rows, column, k, last);
            }
        }
    }
}

int64_t tiles(const Product& p) { return shares_of_rows(p) * ((p.columns + panel - 1) / panel); }

void product(const Product& p, int64_t begin, int64_t end) {
    for_kind(p, [&](auto then, auto gelu) { run_tiles<then.value, gelu.value>(p, begin, end); });
}

int64_t packed_elements(int64_t columns, int64_t terms) { return round_up(columns, panel) * round_up(terms, tile_terms); }

void pack(const void* weights, int64_t columns, int64_t terms, void* to) {
    const int64_t units = terms / terms_a_unit;
    pack_rows(static_cast<const uint32_t*>(weights), columns, units, units, static_cast<uint32_t*>(to),
              round_up(terms, tile_terms) / terms_a_unit);
}

void arrange(const void* rows, int64_t begin, int64_t end, int64_t width, void* to) {
    for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < width; c += tile_terms) {
            const __mmask32 mask = width - c < tile_terms ? (1u << (width - c)) - 1 : ~0u;
            const __m512i x = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows) + r * width + c);
            _mm512_storeu_si512(static_cast<uint16_t*>(to) + activation_at(width, r, c), x);
        }
}

// Activations of a chunk and a panel of weights share the second-level cache: 600 tokens of 768 channels were best
int64_t chunk_rows(int64_t width) { return std::max<int64_t>(64, 600 * 768 / width); }

// ---------------------------------------------------------------------------------------------------------------
// attention: sixteen queries at a time against all keys

struct Scratch {
    uint32_t* keys;     // panels of keys: [keys / 32][head_dim units][32]
    uint32_t* values;   // panels of columns: [head_dim / 32][keys units][32]
    float* scores;      // [16][keys]
    uint16_t* weights;  // [16][keys]
    uint16_t* queries;  // [16][head_dim], where rows of queries are no whole tiles
    float* sums;        // [16][64]
};

constexpr int64_t columns_at_once = 64;  // four tiles of sums, which do not wait for each other

int64_t attention_scratch(int64_t tokens, int64_t head_dim) {
    const int64_t keys = padded(tokens), dim = round_up(head_dim, panel);
    return sizeof(uint16_t) * (2 * keys * dim + tile_height * (keys + dim)) +
           sizeof(float) * tile_height * (keys + columns_at_once);
}

Scratch scratch_at(void* memory, int64_t tokens, int64_t head_dim) {
    const int64_t keys = padded(tokens), dim = round_up(head_dim, panel);
    Scratch s;
    s.keys = static_cast<uint32_t*>(memory);
    s.values = s.keys + keys * dim / terms_a_unit;
    s.scores = reinterpret_cast<float*>(s.values + keys * dim / terms_a_unit);
    s.sums = s.scores + tile_height * keys;
    s.weights = reinterpret_cast<uint16_t*>(s.sums + tile_height * columns_at_once);
    s.queries = s.weights + tile_height * keys;
    return s;
}

// to [16, 64], or [16, 32] where one panel is left, = 16 rows of A, `a_bytes` apart, · panels of B `b_panel` units apart
template <bool two_panels>
inline void multiply(const uint16_t* a, int64_t a_bytes, int64_t count, const uint32_t* b, int64_t b_panel, float* to,
                     int64_t to_row) {
    zero_sums<two_panels>();
    for (int64_t k = 0; k < count; ++k) {
        const uint32_t* pairs = b + k * (tile_terms / 2) * panel;
        load_tile<4>(a + k * tile_terms, a_bytes);
        load_tile<6>(pairs, panel_bytes);
        dot<0, 4, 6>();
        load_tile<7>(pairs + panel / 2, panel_bytes);
        dot<1, 4, 7>();
        if constexpr (two_panels) {
            load_tile<6>(pairs + b_panel, panel_bytes);
            dot<2, 4, 6>();
            load_tile<7>(pairs + b_panel + panel / 2, panel_bytes);
            dot<3, 4, 7>();
        }
    }
    const int64_t bytes = to_row * sizeof(float);
    store_tile<0>(to, bytes);
    store_tile<1>(to + 16, bytes);
    if constexpr (two_panels) {
        store_tile<2>(to + 32, bytes);
        store_tile<3>(to + 48, bytes);
    }
}

// softmax of sixteen queries' scores over the keys below `end`: weights, and what their products are multiplied by
inline void weigh(const Head& h, const Scratch& s, int64_t query, int64_t rows, int64_t end, __m512* rescale) {
    const int64_t keys = padded(h.tokens);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t visible = h.causal ? query + r + 1 : h.tokens;
        const float sum = exponentials(s.scores + r * keys, visible, end, h.scale, s.weights + r * keys);
        rescale[r] = reciprocal(_mm512_set1_ps(sum));
    }
}

void attend(const Head& h, const Scratch& s, int64_t query) {
    const int64_t keys = padded(h.tokens), dim = round_up(h.head_dim, panel);
    const int64_t rows = std::min(tile_height, h.tokens - query);
    // whole panels of keys up to the last that a row sees
    const int64_t end = h.causal ? padded(query + rows) : keys;
    // rows beyond the last may be anything: they are other tokens' or spare, and what comes of them is left
    const uint16_t* q = static_cast<const uint16_t*>(h.q) + query * h.row;
    int64_t q_bytes = h.row * sizeof(uint16_t);
    if (dim != h.head_dim) {
        // terms beyond a head are another's
        std::memset(s.queries, 0, tile_height * dim * sizeof(uint16_t));
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(s.queries + r * dim, q + r * h.row, h.head_dim * sizeof(uint16_t));
        q = s.queries;
        q_bytes = dim * sizeof(uint16_t);
    }
    for (int64_t j = 0; j < end; j += columns_at_once)
        (end - j > panel ? multiply<true> : multiply<false>)(q, q_bytes, dim / tile_terms, s.keys + j * dim / 2,
                                                             panel * dim / 2, s.scores + j, keys);
    __m512 rescale[tile_height];
    weigh(h, s, query, rows, end, rescale);
    for (int64_t d = 0; d < dim; d += columns_at_once) {
        (dim - d > panel ? multiply<true> : multiply<false>)(s.weights, keys * sizeof(uint16_t), end / tile_terms,
                                                             s.values + d * keys / 2, panel * keys / 2, s.sums,
                                                             columns_at_once);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns_at_once && d + c < h.head_dim; c += 16)
                put(h.out, h.width, h.first + query + r, h.column + d + c, first_lanes(h.head_dim - d - c),
                    _mm512_mul_ps(_mm512_loadu_ps(s.sums + r * columns_at_once + c), rescale[r]));
    }
}

void attention(const Head& h, void* scratch) {
    const Scratch s = scratch_at(scratch, h.tokens, h.head_dim);
    const Tiles tiles;
    pack_rows(units_at(h.k, 0), h.tokens, h.row / terms_a_unit, h.head_dim / terms_a_unit, s.keys,
              round_up(h.head_dim, panel) / terms_a_unit);
    pack_values(h, s.values);
    for (int64_t query = 0; query < h.tokens; query += tile_height) attend(h, s, query);
}

const EncoderKernels kernels{sizeof(uint16_t), true,    chunk_rows,      activation_elements, arrange,    copy_row,
                             tiles,            product, packed_elements, pack,                layer_norm, attention_scratch,
                             attention,        attention_of_one, to_float, from_float};

}  // namespace
}  // namespace clipfast::cpu

#endif

#include "end_instructions.h"

#endif

namespace clipfast::cpu {

const EncoderKernels* encoder_bfloat16_amx() {
#if CLIPFAST_HAS_TILES
    static const bool can = encoder_bfloat16_avx512() != nullptr && amx_unavailable() == nullptr;
    return can ? &kernels : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace clipfast::cpu
