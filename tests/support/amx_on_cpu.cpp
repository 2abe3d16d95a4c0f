// The kernels of csrc/cpu/encoder_amx.cpp and products_amx.cpp, on software tiles, behind functions of plain arrays.
//
// What they are given as packed or arranged memory starts as NaN: zeros that they forget show.

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/encoder.h"
#include "cpu/products.h"
// in its own namespaces, behind the standard headers
#include "cpu/amx.h"

namespace clipfast::cpu {

// AVX512-BF16 is what the kernels need beside the tiles
const EncoderKernels* encoder_bfloat16_avx512() {
    static const EncoderKernels any{};
    return __builtin_cpu_supports("avx512bf16") ? &any : nullptr;
}
const Gemm<float>* avx512_bf16_gemm() {
    static const Gemm<float> any{};
    return __builtin_cpu_supports("avx512bf16") ? &any : nullptr;
}

namespace {

std::vector<uint16_t> nans(int64_t elements) { return std::vector<uint16_t>(elements, 0xffff); }

// [rows, width] of activations in tile order
void read_tiles(const uint16_t* from, int64_t rows, int64_t width, uint16_t* to) {
    const int64_t across = (width + 31) / 32;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; ++c)
            to[r * width + c] = from[((r / 16 * across + c / 32) * 16 + r % 16) * 32 + c % 32];
}

}  // namespace
}  // namespace clipfast::cpu

using namespace clipfast::cpu;

extern "C" {

// 1 where this CPU can run them, else 0
int64_t can_run() { return encoder_bfloat16_amx() && amx_bf16_gemm(); }

#if defined(CLIPFAST_SOFTWARE_TILES)
// C += A · B by one instruction, of tiles that a configuration describes
void one_dot(const void* config, const void* a, const void* b, void* c) {
    TileConfig described;
    std::memcpy(&described, config, sizeof described);
    const Tiles tiles(described);
    load_tile<2>(c, 64);
    load_tile<5>(a, 64);
    load_tile<7>(b, 64);
    dot<2, 5, 7>();
    store_tile<2>(c, 64);
}

// What is left of a tile that was loaded, after: 0 nothing, 1 a new configuration, 2 a zero
void what_stays(int64_t what, const void* a, void* c) {
    {
        const Tiles tiles;
        load_tile<3>(a, 64);
        if (what == 2) zero_tile<3>();
        if (what != 1) return store_tile<3>(c, 64);
    }
    const Tiles tiles;
    store_tile<3>(c, 64);
}

#endif

// C of a product whose tiles two threads share at `split`; c has rows of c_row elements
void product(const uint16_t* x, const uint16_t* weights, const float* bias, void* c, int64_t rows, int64_t terms,
             int64_t columns, int64_t c_row, int64_t then, int64_t gelu, int64_t split) {
    const EncoderKernels& k = *encoder_bfloat16_amx();
    auto a = nans(k.activation_elements(rows, terms)), b = nans(k.packed_elements(columns, terms));
    k.arrange(x, 0, rows, terms, a.data());
    k.pack(weights, columns, terms, b.data());
    Product p{a.data(), rows, terms, columns, b.data(), bias, c, c_row, Product::Then(then), Gelu(gelu)};
    auto hidden = nans(k.activation_elements(rows, columns));
    if (p.then == Product::Then::gelu) p.c = hidden.data();
    const int64_t tiles = k.tiles(p), first = std::min(split, tiles);
    k.product(p, first, tiles);
    k.product(p, 0, first);
    if (p.then == Product::Then::gelu) read_tiles(hidden.data(), rows, columns, static_cast<uint16_t*>(c));
}

// out [tokens, heads · dim] of qkv [tokens and spare ones, 3 · heads · dim]
void attention(const uint16_t* qkv, uint16_t* out, int64_t tokens, int64_t heads, int64_t dim, int64_t causal) {
    const EncoderKernels& k = *encoder_bfloat16_amx();
    const int64_t width = heads * dim, before = 5;
    // other sequences' rows lie before and behind
    auto attended = nans(k.activation_elements(before + tokens, width));
    auto scratch = nans(k.attention_scratch(tokens, dim) / 2 + 32);
    void* memory = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    for (int64_t h = 0; h < heads; ++h) {
        const uint16_t* q = qkv + h * dim;
        k.attention({q, q + width, q + 2 * width, 3 * width, tokens, dim, 1 / __builtin_sqrtf(float(dim)), causal != 0,
                     attended.data(), width, before, h * dim},
                    memory);
    }
    std::vector<uint16_t> rows((before + tokens) * width);
    read_tiles(attended.data(), before + tokens, width, rows.data());
    std::copy(rows.begin() + before * width, rows.end(), out);
}

// logits [rows, 256], and what G [rows, 256] adds to the gradients, of rows `row`.. of a block of images
void loss_products(const uint16_t* image, const uint16_t* text, const float* g, float* logits, float* d_image,
                   float* d_text, int64_t images, int64_t texts, int64_t width, int64_t row, int64_t rows) {
    const Gemm<float>& gemm = *amx_bf16_gemm();
    const auto block = gemm.row_block({image, images, width, width, Dtype::bfloat16}, gemm.block_rows);
    for (int64_t part : {1, 0}) block->fill(0, images, part, 2);
    const auto products = gemm.products(*block, {text, texts, width, width, Dtype::bfloat16});
    products->columns(0, texts);
    products->logits(row, rows, logits);
    products->gradients(row, rows, g, d_image, d_text);
}

}  // extern "C"
