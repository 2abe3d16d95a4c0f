// The kernels of encoder.h for one dtype and one set of instructions. A file for each pair says what it may use, includes
// this and names the result:
//
//     CLIPFAST_LANES         16 on AVX-512, 8 on AVX2, 4 on NEON
//     CLIPFAST_BFLOAT16      1 for bfloat16, 0 for float32
//     CLIPFAST_INSTRUCTIONS  what the compiler may take beyond the build's, as its target attribute has it
//     CLIPFAST_HAS           whether this CPU has them

#include "encoder.h"

// before the pragmas: what these bring is for every CPU
#if CLIPFAST_LANES == 4
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "instructions.h"

#include "allow_instructions.h"

#include "register_tile.h"
// behind it
#include "encoder_rows.h"

namespace clipfast::cpu {
namespace {

constexpr int64_t tile_rows = 96;  // at most: their activations and a panel stay in the second-level cache

// ---------------------------------------------------------------------------------------------------------------
// products

template <Product::Then then, Gelu gelu, int rows>
void tile(const Product& p, int64_t row, int64_t column) {
    const int64_t units = p.terms / terms_a_unit;
    const Mask masks[2] = {first_lanes(p.columns - column), first_lanes(p.columns - column - lanes)};
    Lanes bias[2];
    for (int half = 0; half < 2; ++half)
        bias[half] = p.bias ? load(masks[half], p.bias + column + lanes * half) : all(0.f);
    register_tile<rows>(units, units_at(p.a, row * p.terms), units,
                        static_cast<const uint32_t*>(p.b) + column * units, [&](int r, int half, Lanes sum) {
                            const int64_t at = (row + r) * p.c_row + column + lanes * half;
                            sum = sum + bias[half];
                            if constexpr (then == Product::Then::add) {
                                float* c = static_cast<float*>(p.c) + at;
                                store(c, masks[half], sum + load(masks[half], c));
                                return;
                            }
                            if constexpr (then == Product::Then::gelu)
                                sum = gelu == Gelu::none   ? gelu_erf(sum)
                                      : gelu == Gelu::tanh ? gelu_tanh(sum)
                                                           : gelu_quick(sum);
                            store(static_cast<Element*>(p.c) + at, masks[half], sum);
                        });
}

// what is left of a block of rows, less than a tile's height
template <Product::Then then, Gelu gelu, int rows>
void last_rows(const Product& p, int64_t row, int64_t count, int64_t column) {
    if (count == rows) return tile<then, gelu, rows>(p, row, column);
    if constexpr (rows > 1) last_rows<then, gelu, rows - 1>(p, row, count, column);
}

template <Product::Then then, Gelu gelu>
void rows_of_tile(const Product& p, int64_t row, int64_t end, int64_t column) {
    for (; row + height <= end; row += height) tile<then, gelu, height>(p, row, column);
    last_rows<then, gelu, height - 1>(p, row, end - row, column);
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
    for_kind(p, [&](auto then, auto gelu) { run_tiles<then.value, gelu.value>(p, begin, end); });
}

int64_t packed_elements(int64_t columns, int64_t terms) { return round_up(columns, panel) * terms; }

void pack(const void* weights, int64_t columns, int64_t terms, void* to) {
    const int64_t units = terms / terms_a_unit;
    pack_rows(static_cast<const uint32_t*>(weights), columns, units, units, static_cast<uint32_t*>(to), units);
}

// ---------------------------------------------------------------------------------------------------------------
// attention: a few queries at a time against all keys, whose scores fit the first-level cache

struct Scratch {
    uint32_t* keys;    // panels of keys: [keys / panel][head_dim units][panel]
    uint32_t* values;  // panels of columns: [head_dim / panel][keys units][panel]
    float* scores;     // [height][keys]
    Element* weights;  // [height][keys]
};

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

template <int rows>
void attend(const Head& h, const Scratch& s, int64_t query) {
    const int64_t keys = padded(h.tokens), units = h.head_dim / terms_a_unit;
    // whole panels of keys up to the last that a row sees
    const int64_t end = h.causal ? padded(query + rows) : keys;
    for (int64_t j = 0; j < end; j += panel)
        register_tile<rows>(units, units_at(h.q, query * h.row), h.row / terms_a_unit, s.keys + j * units,
                            [&](int r, int half, Lanes sum) { store(s.scores + r * keys + j + lanes * half, sum); });
    Lanes rescale[rows];
    for (int r = 0; r < rows; ++r) {
        const int64_t visible = h.causal ? query + r + 1 : h.tokens;
        const float sum = exponentials(s.scores + r * keys, visible, end, h.scale, s.weights + r * keys);
        rescale[r] = reciprocal(all(sum));
    }
    for (int64_t d = 0; d < h.head_dim; d += panel)
        register_tile<rows>(end / terms_a_unit, units_at(s.weights, 0), keys / terms_a_unit,
                            s.values + d * (keys / terms_a_unit), [&](int r, int half, Lanes sum) {
                                put(h.out, h.width, h.first + query + r, h.column + d + lanes * half,
                                    first_lanes(h.head_dim - d - lanes * half), sum * rescale[r]);
                            });
}

// the last queries, fewer than a tile's height
template <int rows>
void attend_last(const Head& h, const Scratch& s, int64_t query) {
    if (h.tokens - query == rows) return attend<rows>(h, s, query);
    if constexpr (rows > 1) attend_last<rows - 1>(h, s, query);
}

void attention(const Head& h, void* scratch) {
    const Scratch s = scratch_at(scratch, h.tokens, h.head_dim);
    pack_rows(units_at(h.k, 0), h.tokens, h.row / terms_a_unit, h.head_dim / terms_a_unit, s.keys,
              h.head_dim / terms_a_unit);
    pack_values(h, s.values);
    int64_t query = 0;
    for (; query + height <= h.tokens; query += height) attend<height>(h, s, query);
    attend_last<height - 1>(h, s, query);
}

int64_t chunk_rows(int64_t) { return 512; }

const EncoderKernels kernels{sizeof(Element), false,   chunk_rows,      activation_elements, nullptr,    copy_row,
                             tiles,           product, packed_elements, pack,                layer_norm, attention_scratch,
                             attention,       attention_of_one, to_float, from_float};

}  // namespace
}  // namespace clipfast::cpu

#include "end_instructions.h"

namespace clipfast::cpu {
namespace {

const EncoderKernels* kernels_of_this_cpu() { return CLIPFAST_HAS ? &kernels : nullptr; }

}  // namespace
}  // namespace clipfast::cpu
