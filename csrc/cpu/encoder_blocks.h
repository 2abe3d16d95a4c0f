// One chunk of sequences through all blocks of a transformer, by the kernels of one dtype.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "encoder.h"
#include "workspace.h"

namespace clipfast::cpu {
namespace {

constexpr int64_t read_last = -1, read_all = -2;

char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }
const char* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }

// Who computes a step: all threads together, or this one
enum class Team { all, alone };

template <class F>
void share(Team team, int64_t count, const F& f) {
    if (team == Team::all)
        torch::stable::parallel_for(0, count, 1, f);
    else if (count > 0)
        f(0, count);
}

void multiply(Team team, const EncoderKernels& k, const Product& p) {
    share(team, k.tiles(p), [&](int64_t begin, int64_t end) { k.product(p, begin, end); });
}

struct Block {
    const float *ln_1_weight, *ln_1_bias;
    const void* qkv;
    const float* qkv_bias;
    const void* out;
    const float* out_bias;
    const float *ln_2_weight, *ln_2_bias;
    const void* fc;
    const float* fc_bias;
    const void* proj;
    const float* proj_bias;
};

struct Encoder {
    const EncoderKernels& k;
    int64_t width, hidden, heads;
    bool causal;
    Gelu gelu;
    float eps;
    std::vector<Block> blocks;
};

// What one chunk's steps hand to each other
struct Buffers {
    Team team;
    float* stream;  // [rows, width]
    void* normed;   // activations [rows, width], then attention's output
    void* wide;     // [rows, 3 width]: queries, keys and values; then activations [rows, hidden]: the MLP's hidden layer
    float* read;    // [sequences, width]: the stream of the tokens that are read
    void* query;    // [sequences, width]
    void* asking;   // activations [sequences, width]: what queries are made of, then attention's output
    char* scratch;  // attention's, one for each thread of the team
    int64_t scratch_bytes;
};

// The bytes of the buffers above, in their order, for chunks of up to `rows` tokens
std::vector<int64_t> buffer_bytes(const Encoder& e, int64_t rows, int64_t threads, int64_t scratch_bytes) {
    const int64_t floats = (rows + spare_rows) * e.width * int64_t(sizeof(float)), size = e.k.element;
    const int64_t activations = e.k.activation_elements(rows, e.width) * size;
    const int64_t plain = (rows + spare_rows) * e.width * size;
    return {floats, activations, std::max(3 * plain, e.k.activation_elements(rows, e.hidden) * size),
            floats, plain,       activations, threads * scratch_bytes};
}

Buffers buffers_in(Workspace& memory, Team team, const std::vector<int64_t>& bytes, int64_t scratch_bytes) {
    Buffers w{team};
    w.stream = static_cast<float*>(memory.piece(bytes[0]));
    w.normed = memory.piece(bytes[1]);
    w.wide = memory.piece(bytes[2]);
    w.read = static_cast<float*>(memory.piece(bytes[3]));
    w.query = memory.piece(bytes[4]);
    w.asking = memory.piece(bytes[5]);
    w.scratch = static_cast<char*>(memory.piece(bytes[6]));
    w.scratch_bytes = scratch_bytes;
    return w;
}

void layer_norm(Team team, const Encoder& e, const float* x, int64_t rows, const float* weight, const float* bias,
                void* y) {
    share(team, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            e.k.layer_norm(x + r * e.width, weight, bias, e.eps, e.width, y, r);
    });
}

// the step after attention: projection and residual, LayerNorm, MLP and residual
void finish_block(const Encoder& e, const Block& b, const void* attended, float* stream, int64_t rows,
                  const Buffers& w) {
    using Then = Product::Then;
    multiply(w.team, e.k, {attended, rows, e.width, e.width, b.out, b.out_bias, stream, e.width, Then::add, e.gelu});
    layer_norm(w.team, e, stream, rows, b.ln_2_weight, b.ln_2_bias, w.normed);
    multiply(w.team, e.k, {w.normed, rows, e.width, e.hidden, b.fc, b.fc_bias, w.wide, e.hidden, Then::gelu, e.gelu});
    multiply(w.team, e.k, {w.wide, rows, e.hidden, e.width, b.proj, b.proj_bias, stream, e.width, Then::add, e.gelu});
}

// Attention of every head of the sequences that lie between `offsets`; `one` for the token that is read alone
void attend(const Encoder& e, const int64_t* offsets, int64_t sequences, const Buffers& w, bool one, int64_t row) {
    const int64_t head_dim = e.width / e.heads, size = e.k.element;
    std::atomic<int64_t> threads{0};
    share(w.team, sequences * e.heads, [&](int64_t begin, int64_t end) {
        void* scratch = w.scratch + threads.fetch_add(1) * w.scratch_bytes;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t s = i / e.heads, column = i % e.heads * head_dim;
            const int64_t start = offsets[s] - offsets[0];
            const char* first = at(w.wide, (start * row + column) * size);
            // keys and values come behind the queries, or alone
            const char* keys = one ? first : first + e.width * size;
            const Head h{one ? at(w.query, (s * e.width + column) * size) : first,
                         keys,
                         keys + e.width * size,
                         row,
                         offsets[s + 1] - offsets[s],
                         head_dim,
                         1 / std::sqrt(float(head_dim)),
                         e.causal,
                         one ? w.asking : w.normed,
                         e.width,
                         one ? s : start,
                         column};
            (one ? e.k.attention_of_one : e.k.attention)(h, scratch);
        }
    });
}

// One chunk through all blocks; returns where its result lies: the stream, or the tokens that are read
const float* run(const Encoder& e, const int64_t* offsets, int64_t sequences, int64_t read, const Buffers& w) {
    using Then = Product::Then;
    const int64_t rows = offsets[sequences] - offsets[0], width = e.width, size = e.k.element;
    for (size_t i = 0; i < e.blocks.size(); ++i) {
        const Block& b = e.blocks[i];
        layer_norm(w.team, e, w.stream, rows, b.ln_1_weight, b.ln_1_bias, w.normed);
        if (i + 1 < e.blocks.size() || read == read_all) {
            multiply(w.team, e.k,
                     {w.normed, rows, width, 3 * width, b.qkv, b.qkv_bias, w.wide, 3 * width, Then::store, e.gelu});
            attend(e, offsets, sequences, w, false, 3 * width);
            finish_block(e, b, w.normed, w.stream, rows, w);
            continue;
        }
        // the last block of a tower that is read at one token: keys and values of all, the rest of one
        for (int64_t s = 0; s < sequences; ++s) {
            const int64_t row = (read == read_last ? offsets[s + 1] - 1 : offsets[s] + read) - offsets[0];
            std::memcpy(w.read + s * width, w.stream + row * width, width * sizeof(float));
            e.k.copy_row(w.normed, row, width, w.asking, s);
        }
        // panels are whole, so those of keys and values start behind the queries'
        const void* kv = at(b.qkv, width * width * size);
        multiply(w.team, e.k,
                 {w.normed, rows, width, 2 * width, kv, b.qkv_bias + width, w.wide, 2 * width, Then::store, e.gelu});
        multiply(w.team, e.k,
                 {w.asking, sequences, width, width, b.qkv, b.qkv_bias, w.query, width, Then::store, e.gelu});
        attend(e, offsets, sequences, w, true, 2 * width);
        finish_block(e, b, w.asking, w.read, sequences, w);
        return w.read;
    }
    return w.stream;
}

}  // namespace
}  // namespace clipfast::cpu
