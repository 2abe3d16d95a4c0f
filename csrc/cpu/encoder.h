// What a transformer's forward pass is made of on the CPU, for one dtype of its weights and activations.
#pragma once

#include <cstdint>

namespace clipfast::cpu {

enum class Gelu { none, tanh, quick };

// Activations are what products read: [rows, width] in the order that suits the kernels. In tile order (AMX) they are
// [rows / 16][width / 32][16][32], zeros beyond the width and anything beyond the rows; otherwise row by row.

// C = A · B + bias for rows of A and panels of B
struct Product {
    // C row by row in the dtype; activations after a GELU; or added to float32 rows
    enum class Then { store, gelu, add };
    const void* a;  // activations [rows, terms]
    int64_t rows, terms, columns;
    const void* b;      // as EncoderKernels::pack gives it
    const float* bias;  // [columns] or nullptr
    void* c;            // [rows, columns]; with rows c_row elements apart but for activations
    int64_t c_row;
    Then then;
    Gelu gelu;
};

// Self-attention of one head of one sequence
struct Head {
    const void* q;  // queries, keys and values of the first token; tokens are `row` elements apart
    const void* k;
    const void* v;
    int64_t row, tokens, head_dim;
    float scale;  // positive
    bool causal;
    void* out;  // activations [.., width]: this head's start at row `first` and `column`
    int64_t width, first, column;
};

// Rows that may be read and written beyond the last of activations, of float32 rows that are added to, and of queries
constexpr int64_t spare_rows = 32;

struct EncoderKernels {
    int64_t element;  // bytes
    // Whether a thread takes sequences of its own through all blocks where there are enough of them, and not a share of
    // every step: then nobody waits for anybody, and what a step leaves in the cache is there for the next one.
    bool apart;
    // tokens of a width that go through all blocks together
    int64_t (*chunk_rows)(int64_t width);
    int64_t (*activation_elements)(int64_t rows, int64_t width);
    // rows begin..end-1 of [.., width] to activations; nullptr where both are the same
    void (*arrange)(const void* rows, int64_t begin, int64_t end, int64_t width, void* to);
    // one row of activations to a row of others
    void (*copy_row)(const void* from, int64_t row, int64_t width, void* to, int64_t to_row);
    // a product's work comes in tiles of up to tile_rows rows and a panel's columns: those numbered begin..end-1
    int64_t (*tiles)(const Product&);
    void (*product)(const Product&, int64_t begin, int64_t end);
    // weights [columns, terms] to panels; terms is even
    int64_t (*packed_elements)(int64_t columns, int64_t terms);
    void (*pack)(const void* weights, int64_t columns, int64_t terms, void* to);
    // float32 row to a row of activations; width is a multiple of 16
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t width, void* y,
                       int64_t row);
    int64_t (*attention_scratch)(int64_t tokens, int64_t head_dim);  // bytes
    void (*attention)(const Head&, void* scratch);
    // one query [head_dim] at q over all keys
    void (*attention_of_one)(const Head&, void* scratch);
    void (*to_float)(const void* from, int64_t count, float* to);
    void (*from_float)(const float* from, int64_t count, void* to);
};

// nullptr where this CPU lacks the instructions, or is not to use them (instructions.h)
const EncoderKernels* encoder_float32_avx512();
const EncoderKernels* encoder_float32_avx2();
const EncoderKernels* encoder_float32_neon();
const EncoderKernels* encoder_bfloat16_amx();  // with AVX512-BF16 beside it
const EncoderKernels* encoder_bfloat16_avx512();
const EncoderKernels* encoder_bfloat16_neon();

// why bfloat16 is not multiplied by AMX here, or nullptr (amx.cpp)
const char* amx_unavailable();

}  // namespace clipfast::cpu
