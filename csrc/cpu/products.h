// The three matrix products behind a tile of logits, by the best GEMM at hand.
//
// A loss walks over row blocks of images and column tiles of texts. One Products object serves one thread:
//
//     rows(i, n)        take image rows i..i+n-1, at most block_rows of them (shared by all threads: see RowBlock)
//     columns(j, n)     take text rows j..j+n-1, at most tile_columns
//     logits(...)       S = I · Tᵀ for sub_rows rows
//     gradients(...)    d_image += G · T, d_text += Gᵀ · I for the same rows
//
// Sums are float32 for float32, float16 and bfloat16 features, float64 for float64.
#pragma once

#include <cstdint>
#include <memory>

namespace clipfast::cpu {

enum class Dtype { float64, float32, bfloat16, float16 };

// [rows, width], rows `stride` elements apart
struct Matrix {
    const void* data;
    int64_t rows, width, stride;
    Dtype dtype;
};

constexpr int64_t sub_rows = 128;  // rows of one tile of logits: with its columns it stays in the second-level cache

// Image rows in the form that products read them in, made once a block and read by every thread.
class RowBlock {
public:
    virtual ~RowBlock() = default;
    // Take `count` rows from `first` on; `part` of `parts` threads does its share.
    virtual void fill(int64_t first, int64_t count, int64_t part, int64_t parts) = 0;
};

template <class Real>
class Products {
public:
    virtual ~Products() = default;
    virtual void columns(int64_t first, int64_t count) = 0;
    // logits[r · tile_columns + c] for `count` ≤ sub_rows rows that start at row `first` of the block
    virtual void logits(int64_t first, int64_t count, Real* logits) = 0;
    // g as logits; d_image starts at the same row of the block, d_text at the first of the columns; both D wide
    virtual void gradients(int64_t first, int64_t count, const Real* g, Real* d_image, Real* d_text) = 0;
};

template <class Real>
struct Gemm {
    const char* name;
    int64_t tile_columns, block_rows;
    std::unique_ptr<RowBlock> (*row_block)(const Matrix& image, int64_t block_rows);
    std::unique_ptr<Products<Real>> (*products)(const RowBlock&, const Matrix& text);
};

// The GEMM for features of this dtype. CLIPFAST_CPU_GEMM = portable | blas | avx512_bf16 | amx_bf16 | mkl_bf16 asks for one
// of them, for tests and comparisons; one that this CPU or dtype cannot have is an error.
template <class Real>
const Gemm<Real>& choose_gemm(Dtype dtype);

// nullptr where the CPU has no AVX512-BF16 (products_bf16.cpp), or no AMX beside it (products_amx.cpp)
const Gemm<float>* avx512_bf16_gemm();
const Gemm<float>* amx_bf16_gemm();

}  // namespace clipfast::cpu
