// Products of bfloat16 features with float32 sums on AVX512-BF16 (vdpbf16ps multiplies pairs and adds them in float32).
//
// Every product is C[m, n] += Σ_k A[m, k] · B[k, n] over pairs k of neighbouring terms. B lies in panels of 32 columns,
// [k][32] pairs, which one register tile of 8 × 32 sums reads from end to end; A's pairs are broadcast one at a time.
//
//     logits   A = image rows           B = text columns, terms along D
//     d_image  A = G                    B = text rows, terms along the tile's columns
//     d_text   A = Gᵀ (pairs of rows)   B = image rows, terms along the tile's rows

#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "instructions.h"

#define CLIPFAST_INSTRUCTIONS "avx512f,avx512bw,avx512vl,avx512bf16"
#include "allow_instructions.h"

#define CLIPFAST_BFLOAT16 1
#define CLIPFAST_LANES 16
#include "register_tile.h"

namespace clipfast::cpu {
namespace {

constexpr int64_t tile_columns = 128, block_rows = 1024;

// ---------------------------------------------------------------------------------------------------------------
// the register tile

template <int rows>
void register_tile(int64_t pairs, const uint32_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b, float* c,
                   int64_t ldc, int64_t columns, bool add) {
    const __mmask16 left = first_lanes(columns), right = first_lanes(columns - 16);
    __m512 sum[rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        sum[r][0] = add ? _mm512_maskz_loadu_ps(left, c + r * ldc) : _mm512_setzero_ps();
        sum[r][1] = add ? _mm512_maskz_loadu_ps(right, c + r * ldc + 16) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < pairs; ++k) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * panel);
        const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k * panel + 16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[r * a_row + k * a_pair]));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        _mm512_mask_storeu_ps(c + r * ldc, left, sum[r][0]);
        _mm512_mask_storeu_ps(c + r * ldc + 16, right, sum[r][1]);
    }
}

// C[m, n] of one panel: rows eight at a time, what is left one at a time
void multiply_panel(int64_t m, int64_t pairs, const uint32_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b,
                    float* c, int64_t ldc, int64_t columns, bool add) {
    int64_t i = 0;
    for (; i + height <= m; i += height)
        register_tile<height>(pairs, a + i * a_row, a_row, a_pair, b, c + i * ldc, ldc, columns, add);
    for (; i < m; ++i) register_tile<1>(pairs, a + i * a_row, a_row, a_pair, b, c + i * ldc, ldc, columns, add);
}

// ---------------------------------------------------------------------------------------------------------------
// packing

const uint16_t* row_of(const Matrix& matrix, int64_t i) {
    return static_cast<const uint16_t*>(matrix.data) + i * matrix.stride;
}

// rows 2i and 2i+1 of `matrix` as one row of pairs in every panel: to[p][i][32]; `pairs` is a panel's height
void pack_row_pair(const Matrix& matrix, int64_t first, int64_t count, int64_t i, int64_t pairs, uint32_t* to) {
    const uint16_t* even = row_of(matrix, first + 2 * i);
    const uint16_t* odd = 2 * i + 1 < count ? row_of(matrix, first + 2 * i + 1) : nullptr;
    for (int64_t d = 0; d < matrix.width; d += 16) {
        const __mmask16 mask = first_lanes(matrix.width - d);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + d));
        const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + d)) : _mm512_setzero_si512();
        uint32_t* at = to + (d / panel * pairs + i) * panel + d % panel;
        _mm512_storeu_si512(at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// `width` terms of one row, then zeros up to an even number of them
void copy_padded(const uint16_t* from, int64_t width, uint32_t* to) {
    std::memcpy(to, from, width * sizeof(uint16_t));
    if (width % 2) to[width / 2] &= 0xffff;
}

// ---------------------------------------------------------------------------------------------------------------
// image rows, and the products

class PackedRows : public RowBlock {
public:
    PackedRows(const Matrix& source, int64_t most)
        : source(source),
          pairs_of_terms((source.width + 1) / 2),
          block(std::min(most, round_up(source.rows, sub_rows))),
          rows(block * pairs_of_terms),
          panels(round_up(source.width, panel) * block / 2) {}
    void fill(int64_t first, int64_t count, int64_t part, int64_t parts) override {
        // whole sub-blocks, so that the unused half of an odd last pair is zero
        const int64_t pairs = (count + 1) / 2, begin = pairs * part / parts, end = pairs * (part + 1) / parts;
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t r = 2 * i; r < std::min(2 * i + 2, count); ++r)
                copy_padded(row_of(source, first + r), source.width, rows.data() + r * pairs_of_terms);
            pack_row_pair(source, first, count, i, block / 2, panels.data());
        }
    }
    const Matrix source;
    const int64_t pairs_of_terms, block;
    std::vector<uint32_t> rows, panels;
};

class Avx512Bf16Products : public Products<float> {
public:
    Avx512Bf16Products(const PackedRows& image, const Matrix& text)
        : image_(image),
          text_(text),
          width_(text.width),
          terms_(image.pairs_of_terms),
          odd_row_(terms_ * 16),
          columns_panels_(tile_columns * terms_),
          rows_panels_(round_up(width_, panel) * tile_columns / 2),
          g_(sub_rows * tile_columns / 2),
          g_row_pairs_(sub_rows / 2 * tile_columns) {}

    void columns(int64_t first, int64_t count) override {
        count_ = count;
        for (int64_t c = 0; c < tile_columns; c += 16) {
            const uint32_t* from[16];
            for (int64_t i = 0; i < 16; ++i) from[i] = c + i < count ? even_row(first + c + i, i) : nullptr;
            uint32_t* to = columns_panels_.data() + c / panel * terms_ * panel + c % panel;
            for (int64_t k = 0; k < terms_; k += 16) transpose(from, k, terms_, to);
        }
        for (int64_t i = 0; i < (count + 1) / 2; ++i)
            pack_row_pair(text_, first, count, i, tile_columns / 2, rows_panels_.data());
    }

    void logits(int64_t first, int64_t count, float* logits) override {
        for (int64_t c = 0; c < count_; c += panel)
            multiply_panel(count, terms_, image_.rows.data() + first * terms_, terms_, 1,
                           columns_panels_.data() + c * terms_, logits + c, tile_columns, panel, false);
    }

    void gradients(int64_t first, int64_t count, const float* g, float* d_image, float* d_text) override {
        round_g(count, g);
        const int64_t column_pairs = (count_ + 1) / 2, row_pairs = (count + 1) / 2;
        for (int64_t d = 0; d < width_; d += panel) {
            const int64_t columns = std::min(panel, width_ - d);
            multiply_panel(count, column_pairs, g_.data(), tile_columns / 2, 1,
                           rows_panels_.data() + d * (tile_columns / 2), d_image + d, width_, columns, true);
            multiply_panel(count_, row_pairs, g_row_pairs_.data(), 1, tile_columns,
                           image_.panels.data() + d * (image_.block / 2) + first / 2 * panel, d_text + d, width_,
                           columns, true);
        }
    }

private:
    // a text row whose terms come in pairs: a copy where the last has no partner
    const uint32_t* even_row(int64_t i, int64_t slot) {
        const uint16_t* row = row_of(text_, i);
        if (width_ % 2 == 0) return reinterpret_cast<const uint32_t*>(row);
        copy_padded(row, width_, odd_row_.data() + slot * terms_);
        return odd_row_.data() + slot * terms_;
    }

    // G in 16 bits twice: row by row, and pairs of rows side by side; zeros beyond the last row and column
    void round_g(int64_t count, const float* g) {
        const int64_t columns = round_up(count_, 16);
        for (int64_t r = 0; r < count; r += 2)
            for (int64_t c = 0; c < columns; c += 16) {
                const __mmask16 mask = first_lanes(count_ - c);
                const __m512 even = _mm512_maskz_loadu_ps(mask, g + r * tile_columns + c);
                const __m512 odd = _mm512_maskz_loadu_ps(r + 1 < count ? mask : 0, g + (r + 1) * tile_columns + c);
                const __m256i low = (__m256i)_mm512_cvtneps_pbh(even), high = (__m256i)_mm512_cvtneps_pbh(odd);
                uint32_t* at = g_.data() + (r * tile_columns + c) / 2;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), low);
                if (r + 1 < count) _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + tile_columns / 2), high);
                const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
                _mm512_storeu_si512(g_row_pairs_.data() + r / 2 * tile_columns + c, pairs);
            }
    }

    const PackedRows& image_;
    const Matrix text_;
    const int64_t width_, terms_;
    int64_t count_ = 0;
    std::vector<uint32_t> odd_row_, columns_panels_, rows_panels_, g_, g_row_pairs_;
};

std::unique_ptr<RowBlock> packed_rows(const Matrix& image, int64_t block_rows) {
    return std::unique_ptr<RowBlock>(new PackedRows(image, block_rows));
}

std::unique_ptr<Products<float>> bf16_products(const RowBlock& rows, const Matrix& text) {
    return std::unique_ptr<Products<float>>(new Avx512Bf16Products(static_cast<const PackedRows&>(rows), text));
}

}  // namespace
}  // namespace clipfast::cpu

#include "end_instructions.h"

namespace clipfast::cpu {

const Gemm<float>* avx512_bf16_gemm() {
    static const Gemm<float> gemm{"avx512_bf16", tile_columns, block_rows, packed_rows, bf16_products};
    return has_avx512_bf16() ? &gemm : nullptr;
}

}  // namespace clipfast::cpu

#else

namespace clipfast::cpu {

const Gemm<float>* avx512_bf16_gemm() { return nullptr; }

}  // namespace clipfast::cpu

#endif
