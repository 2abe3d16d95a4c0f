// Products of bfloat16 features with float32 sums on AMX.
//
//     logits   left: image rows   right: text columns, terms along D
//     d_image  left: G            right: text rows, terms along the tile's columns
//     d_text   left: Gᵀ           right: image rows, terms along the tile's rows
//
// Left factors lie in tiles, right ones in panels (amx_steps.h), both with zeros up to whole steps of 32 terms. Columns
// are outermost: a panel stays in the first-level cache while the left factor comes from the second.

#include "products.h"

#include "encoder.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#define CLIPFAST_INSTRUCTIONS "avx512f,avx512bw,avx512vl,avx512bf16"
#include "allow_instructions.h"

#define CLIPFAST_BFLOAT16 1
#define CLIPFAST_LANES 16
#include "register_tile.h"
#include "amx_steps.h"

#if CLIPFAST_HAS_TILES

namespace clipfast::cpu {
namespace {

// logits, G twice, texts twice and their gradients: 1.5 MB at D = 512, beside a block's rows in the cache behind
constexpr int64_t tile_columns = 256, block_rows = 512;

int64_t steps_of(int64_t terms) { return (terms + tile_terms - 1) / tile_terms; }

inline __mmask32 first_terms(int64_t count) {
    return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

// ---------------------------------------------------------------------------------------------------------------
// products

// 32 × 32 sums, or fewer, at c: added to what is there, or put there
template <bool both>
void block(const Left& a, const uint32_t* b, int64_t count, float* c, int64_t c_row, int64_t rows, int64_t columns,
           bool add) {
    alignas(64) float edge[2 * tile_height * panel];
    const bool whole = rows == (both ? 2 : 1) * tile_height && columns == panel;
    float* to = whole ? c : edge;
    const int64_t to_row = whole ? c_row : panel;
    // rows and columns that are not there may be another's
    if (add && !whole)
        for (int64_t r = 0; r < rows; ++r) std::memcpy(edge + r * panel, c + r * c_row, columns * sizeof(float));
    if (add)
        load_sums<both>(to, to_row);
    else
        zero_sums<both>();
    steps<both>(a, b, count, a.tile + 2 * a.rows);
    store_sums<both>(to, to_row);
    if (!whole)
        for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * c_row, edge + r * panel, columns * sizeof(float));
}

// C[rows, columns] of one panel of B: 32 rows at a time
void multiply_panel(Left a, const uint32_t* b, int64_t count, float* c, int64_t c_row, int64_t rows, int64_t columns,
                    bool add) {
    for (int64_t r = 0; r < rows; r += 2 * tile_height, a.tile += 2 * a.rows, c += 2 * tile_height * c_row) {
        const int64_t left = std::min(rows - r, 2 * tile_height);
        if (left > tile_height)
            block<true>(a, b, count, c, c_row, left, columns, add);
        else
            block<false>(a, b, count, c, c_row, left, columns, add);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// packing

const uint16_t* row_of(const Matrix& matrix, int64_t i) {
    return static_cast<const uint16_t*>(matrix.data) + i * matrix.stride;
}

// one row to its place in tiles, with zeros beyond its width: `to` is row 0 of its tile of the first terms
void to_tiles(const uint16_t* from, int64_t width, int64_t row, uint16_t* to) {
    for (int64_t k = 0; k < width; k += tile_terms)
        _mm512_storeu_si512(to + k / tile_terms * tile_elements + row % tile_height * tile_terms,
                            _mm512_maskz_loadu_epi16(first_terms(width - k), from + k));
}

// two rows, or nullptr for zeros, as pairs: row `i` of every panel of a height of `pairs`
void to_panels(const uint16_t* even, const uint16_t* odd, int64_t width, int64_t i, int64_t pairs, uint32_t* to) {
    for (int64_t d = 0; d < width; d += 16) {
        const __mmask16 mask = first_lanes(width - d);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even ? mask : 0, even + d));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd ? mask : 0, odd + d));
        _mm512_storeu_si512(to + (d / panel * pairs + i) * panel + d % panel,
                            _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// image rows, and the products

class TiledRows : public RowBlock {
public:
    TiledRows(const Matrix& source, int64_t most)
        : source(source),
          width_steps(steps_of(source.width)),
          block(std::min(most, round_up(source.rows, sub_rows))),
          rows(block * width_steps * tile_terms),
          panels(round_up(source.width, panel) * block / 2) {}
    void fill(int64_t first, int64_t count, int64_t part, int64_t parts) override {
        // whole steps, so that what lies beyond the last row is zero
        const int64_t all = steps_of(count), begin = all * part / parts, end = all * (part + 1) / parts;
        for (int64_t r = begin * tile_terms; r < end * tile_terms; r += 2) {
            const uint16_t* even = r < count ? row_of(source, first + r) : nullptr;
            const uint16_t* odd = r + 1 < count ? row_of(source, first + r + 1) : nullptr;
            uint16_t* tiles = rows.data() + r / tile_height * width_steps * tile_elements;
            if (even) to_tiles(even, source.width, r, tiles);
            if (odd) to_tiles(odd, source.width, r + 1, tiles);
            to_panels(even, odd, source.width, r / 2, block / 2, panels.data());
        }
    }
    Left left(int64_t first) const {
        const int64_t next = width_steps * tile_elements;
        return {rows.data() + first / tile_height * next, next, tile_elements};
    }
    const Matrix source;
    const int64_t width_steps, block;
    std::vector<uint16_t> rows;
    std::vector<uint32_t> panels;
};

class AmxProducts : public Products<float> {
public:
    AmxProducts(const TiledRows& image, const Matrix& text)
        : image_(image),
          text_(text),
          width_(text.width),
          pairs_(image.width_steps * tile_terms / 2),
          odd_rows_(width_ % 2 ? 16 * pairs_ : 0),
          columns_panels_(tile_columns * pairs_),
          rows_panels_(round_up(width_, panel) * tile_columns / 2),
          g_(sub_rows * tile_columns),
          g_pairs_(sub_rows / 2 * tile_columns),
          g_transposed_(sub_rows / 2 * tile_columns) {}

    void columns(int64_t first, int64_t count) override {
        count_ = count;
        const int64_t units = (width_ + 1) / 2;
        for (int64_t c = 0; c < tile_columns; c += 16) {
            const uint32_t* from[16];
            for (int64_t i = 0; i < 16; ++i) from[i] = c + i < count ? even_row(first + c + i, i) : nullptr;
            // pairs beyond the width stay the zeros that they were made
            uint32_t* to = columns_panels_.data() + c / panel * pairs_ * panel + c % panel;
            for (int64_t k = 0; k < units; k += 16) transpose(from, k, units, to);
        }
        for (int64_t c = 0; c < steps_of(count) * tile_terms; c += 2)
            to_panels(c < count ? row_of(text_, first + c) : nullptr, c + 1 < count ? row_of(text_, first + c + 1) : nullptr,
                      width_, c / 2, tile_columns / 2, rows_panels_.data());
    }

    void logits(int64_t first, int64_t count, float* logits) override {
        const Tiles tiles;
        for (int64_t c = 0; c < count_; c += panel)
            multiply_panel(image_.left(first), columns_panels_.data() + c * pairs_, image_.width_steps, logits + c,
                           tile_columns, count, panel, false);
    }

    void gradients(int64_t first, int64_t count, const float* g, float* d_image, float* d_text) override {
        round_g(count, g);
        const Left rows{g_.data(), tile_columns / tile_terms * tile_elements, tile_elements};
        const Left columns{reinterpret_cast<const uint16_t*>(g_transposed_.data()), tile_elements,
                           tile_columns / tile_height * tile_elements};
        const Tiles tiles;
        for (int64_t d = 0; d < width_; d += panel) {
            const int64_t wide = std::min(panel, width_ - d);
            multiply_panel(rows, rows_panels_.data() + d * (tile_columns / 2), steps_of(count_), d_image + d, width_, count,
                           wide, true);
            multiply_panel(columns, image_.panels.data() + d * (image_.block / 2) + first / 2 * panel, steps_of(count),
                           d_text + d, width_, count_, wide, true);
        }
    }

private:
    // a text row whose terms come in pairs: a copy where the last has no partner
    const uint32_t* even_row(int64_t i, int64_t slot) {
        const uint16_t* row = row_of(text_, i);
        if (width_ % 2 == 0) return reinterpret_cast<const uint32_t*>(row);
        std::memcpy(odd_rows_.data() + slot * pairs_, row, width_ * sizeof(uint16_t));
        return odd_rows_.data() + slot * pairs_;
    }

    // G in 16 bits twice, as it is and transposed; zeros beyond the last row and column, up to whole steps
    void round_g(int64_t count, const float* g) {
        const int64_t rows = steps_of(count) * tile_terms, columns = steps_of(count_) * tile_terms;
        for (int64_t r = 0; r < rows; r += 2)
            for (int64_t c = 0; c < columns; c += 16) {
                const __mmask16 mask = first_lanes(count_ - c);
                const __m512 even = _mm512_maskz_loadu_ps(r < count ? mask : 0, g + r * tile_columns + c);
                const __m512 odd = _mm512_maskz_loadu_ps(r + 1 < count ? mask : 0, g + (r + 1) * tile_columns + c);
                const __m256i low = (__m256i)_mm512_cvtneps_pbh(even), high = (__m256i)_mm512_cvtneps_pbh(odd);
                uint16_t* at = g_.data() + (r / tile_height * (tile_columns / tile_terms) + c / tile_terms) * tile_elements +
                               r % tile_height * tile_terms + c % tile_terms;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), low);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + tile_terms), high);
                _mm512_storeu_si512(g_pairs_.data() + r / 2 * tile_columns + c,
                                    _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
            }
        // [pairs / 16][columns][16 pairs]: sixteen columns are a tile
        for (int64_t pair = 0; pair < rows / 2; pair += 16) {
            const uint32_t* from[16];
            for (int64_t i = 0; i < 16; ++i) from[i] = g_pairs_.data() + (pair + i) * tile_columns;
            for (int64_t c = 0; c < columns; c += 16)
                transpose<16>(from, c, columns, g_transposed_.data() + pair * tile_columns);
        }
    }

    const TiledRows& image_;
    const Matrix text_;
    const int64_t width_, pairs_;
    int64_t count_ = 0;
    std::vector<uint32_t> odd_rows_, columns_panels_, rows_panels_;
    std::vector<uint16_t> g_;
    std::vector<uint32_t> g_pairs_, g_transposed_;
};

std::unique_ptr<RowBlock> tiled_rows(const Matrix& image, int64_t block_rows) {
    return std::unique_ptr<RowBlock>(new TiledRows(image, block_rows));
}

std::unique_ptr<Products<float>> amx_products(const RowBlock& rows, const Matrix& text) {
    return std::unique_ptr<Products<float>>(new AmxProducts(static_cast<const TiledRows&>(rows), text));
}

const Gemm<float> gemm{"amx_bf16", tile_columns, block_rows, tiled_rows, amx_products};

}  // namespace
}  // namespace clipfast::cpu

#endif

#include "end_instructions.h"

#endif

namespace clipfast::cpu {

const Gemm<float>* amx_bf16_gemm() {
#if CLIPFAST_HAS_TILES
    return avx512_bf16_gemm() && !amx_unavailable() ? &gemm : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace clipfast::cpu
