// What a transformer's forward pass is made of on the CPU, for one dtype of its weights and activations.
#pragma once

#include <cstdint>

namespace clipfast::cpu {

enum class Gelu { none, tanh, quick };

// C = A · B + bias for rows of A and panels of B
struct Product {
    enum class Then { store, gelu, add };  // C in the dtype; after a GELU; or added to float32 rows
    const void* a;                         // [rows, terms]
    int64_t rows, terms, columns;
    const void* b;      // as EncoderKernels::pack gives it
    const float* bias;  // [columns] or nullptr
    void* c;            // [rows, columns] with rows c_row elements apart
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
    void* out;  // tokens are out_row elements apart
    int64_t out_row;
};

struct EncoderKernels {
    int64_t element;  // bytes
    // a product's work comes in tiles of up to tile_rows rows and a panel's columns: those numbered begin..end-1
    int64_t (*tiles)(const Product&);
    void (*product)(const Product&, int64_t begin, int64_t end);
    // weights [columns, terms] to panels; terms is even
    int64_t (*packed_elements)(int64_t columns, int64_t terms);
    void (*pack)(const void* weights, int64_t columns, int64_t terms, void* to);
    // float32 row to a row in the dtype; width is a multiple of 16
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t width, void* y);
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
const EncoderKernels* encoder_bfloat16_avx512();
const EncoderKernels* encoder_bfloat16_neon();

}  // namespace clipfast::cpu
