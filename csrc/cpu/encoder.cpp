// A transformer's forward pass on the CPU, from embedded tokens to the tokens that are read.
//
// Sequences go through all blocks a chunk at a time, so that what passes between two steps stays in the cache and the
// memory in use does not grow with the batch. Within a step the threads share tiles. The residual stream is float32;
// what products read is in the weights' dtype. A token's result depends on its own sequence alone: every sum over terms
// has one order.

#include "encoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "workspace.h"

namespace clipfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t chunk_rows = 512;       // tokens a chunk, unless one sequence has more
constexpr int64_t tensors_a_block = 12;  // see clipfast::encode
constexpr int64_t read_last = -1, read_all = -2;

// ---------------------------------------------------------------------------------------------------------------
// arguments

// the widest that this CPU has, or nullptr
const EncoderKernels* widest(std::initializer_list<const EncoderKernels*> kernels) {
    for (const EncoderKernels* k : kernels)
        if (k) return k;
    return nullptr;
}
const EncoderKernels* float32_kernels() {
    return widest({encoder_float32_avx512(), encoder_float32_avx2(), encoder_float32_neon()});
}
const EncoderKernels* bfloat16_kernels() { return widest({encoder_bfloat16_avx512(), encoder_bfloat16_neon()}); }

const EncoderKernels& kernels_for(const char* op, ScalarType dtype) {
    const EncoderKernels* kernels = dtype == ScalarType::BFloat16 ? bfloat16_kernels()
                                    : dtype == ScalarType::Float  ? float32_kernels()
                                                                  : nullptr;
    STD_TORCH_CHECK(kernels, op, ": this CPU has no kernels for the dtype of the input");
    return *kernels;
}

void check(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t elements) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == elements && t.is_contiguous(), op, "(", name,
                    "): expected ", elements, " contiguous elements of the right dtype, got ", t.numel());
}

const void* data(const Tensor& t) { return t.const_data_ptr(); }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }
const char* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }

template <class F>
void share(int64_t count, const F& f) {
    torch::stable::parallel_for(0, count, 1, f);
}

void multiply(const EncoderKernels& k, const Product& p) {
    share(k.tiles(p), [&](int64_t begin, int64_t end) { k.product(p, begin, end); });
}

// ---------------------------------------------------------------------------------------------------------------
// the encoder

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
    float* stream;  // [rows, width]
    void* normed;   // [rows, width], then attention's output
    void* wide;     // [rows, max(3 width, hidden)]: queries, keys and values, then the MLP's hidden layer
    float* read;    // [sequences, width]: the stream of the tokens that are read
    void* query;    // [sequences, width]
    char* scratch;  // attention's, one for each thread
    int64_t scratch_bytes;
};

void layer_norm(const Encoder& e, const float* x, int64_t rows, const float* weight, const float* bias, void* y) {
    share(rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            e.k.layer_norm(x + r * e.width, weight, bias, e.eps, e.width, at(y, r * e.width * e.k.element));
    });
}

// the step after attention: projection and residual, LayerNorm, MLP and residual
void finish_block(const Encoder& e, const Block& b, const void* attended, float* stream, int64_t rows, void* normed,
                  void* hidden) {
    using Then = Product::Then;
    multiply(e.k, {attended, rows, e.width, e.width, b.out, b.out_bias, stream, e.width, Then::add, e.gelu});
    layer_norm(e, stream, rows, b.ln_2_weight, b.ln_2_bias, normed);
    multiply(e.k, {normed, rows, e.width, e.hidden, b.fc, b.fc_bias, hidden, e.hidden, Then::gelu, e.gelu});
    multiply(e.k, {hidden, rows, e.hidden, e.width, b.proj, b.proj_bias, stream, e.width, Then::add, e.gelu});
}

// Attention of every head of the sequences that lie between `offsets`; `one` for the token at `read` alone
void attend(const Encoder& e, const int64_t* offsets, int64_t sequences, const Buffers& w, bool one, int64_t row) {
    const int64_t head_dim = e.width / e.heads, size = e.k.element;
    std::atomic<int64_t> threads{0};
    share(sequences * e.heads, [&](int64_t begin, int64_t end) {
        void* scratch = w.scratch + threads.fetch_add(1) * w.scratch_bytes;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t s = i / e.heads, column = i % e.heads * head_dim * size;
            const int64_t start = offsets[s] - offsets[0];
            const char* first = at(w.wide, start * row * size) + column;
            // keys and values come behind the queries, or alone
            const char* keys = one ? first : first + e.width * size;
            Head h{one ? at(w.query, s * e.width * size) + column : first, keys, keys + e.width * size, row,
                   offsets[s + 1] - offsets[s], head_dim, 1 / std::sqrt(float(head_dim)), e.causal, nullptr, e.width};
            h.out = one ? at(w.query, s * e.width * size) + column : at(w.normed, start * e.width * size) + column;
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
        layer_norm(e, w.stream, rows, b.ln_1_weight, b.ln_1_bias, w.normed);
        if (i + 1 < e.blocks.size() || read == read_all) {
            multiply(e.k, {w.normed, rows, width, 3 * width, b.qkv, b.qkv_bias, w.wide, 3 * width, Then::store, e.gelu});
            attend(e, offsets, sequences, w, false, 3 * width);
            finish_block(e, b, w.normed, w.stream, rows, w.normed, w.wide);
            continue;
        }
        // the last block of a tower that is read at one token: keys and values of all, the rest of one
        for (int64_t s = 0; s < sequences; ++s) {
            const int64_t row = (read == read_last ? offsets[s + 1] - 1 : offsets[s] + read) - offsets[0];
            std::memcpy(w.read + s * width, w.stream + row * width, width * sizeof(float));
            // what is attended to is packed behind what asks: gather first, as both lie in `normed`
            std::memcpy(at(w.query, (sequences + s) * width * size), at(w.normed, row * width * size), width * size);
        }
        const void* asking = at(w.query, sequences * width * size);
        // panels are whole, so those of keys and values start behind the queries'
        const void* kv = at(b.qkv, width * width * size);
        multiply(e.k, {w.normed, rows, width, 2 * width, kv, b.qkv_bias + width, w.wide, 2 * width, Then::store, e.gelu});
        multiply(e.k, {asking, sequences, width, width, b.qkv, b.qkv_bias, w.query, width, Then::store, e.gelu});
        attend(e, offsets, sequences, w, true, 2 * width);
        finish_block(e, b, w.query, w.read, sequences, w.normed, w.wide);
        return w.read;
    }
    return w.stream;
}

// ---------------------------------------------------------------------------------------------------------------
// operators

Tensor pack_weight(const Tensor& weight) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) % 2 == 0,
                    "pack_weight(weight): expected [columns, terms], contiguous, with an even number of terms");
    const EncoderKernels& k = kernels_for("pack_weight", weight.scalar_type());
    Tensor packed = torch::stable::new_empty(weight, {k.packed_elements(weight.size(0), weight.size(1))});
    k.pack(data(weight), weight.size(0), weight.size(1), packed.mutable_data_ptr());
    return packed;
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t columns) {
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(1) % 2 == 0,
                    "packed_linear(x): expected [rows, terms], contiguous, with an even number of terms");
    const EncoderKernels& k = kernels_for("packed_linear", x.scalar_type());
    check("packed_linear", "packed", packed, x.scalar_type(), k.packed_elements(columns, x.size(1)));
    if (bias) check("packed_linear", "bias", *bias, ScalarType::Float, columns);
    Tensor y = torch::stable::new_empty(x, {x.size(0), columns});
    multiply(k, {data(x), x.size(0), x.size(1), columns, data(packed), bias ? floats(*bias) : nullptr,
                 y.mutable_data_ptr(), columns, Product::Then::store, Gelu::none});
    return y;
}

Encoder encoder_of(const Tensor& x, const std::vector<Tensor>& weights, int64_t heads, bool causal, int64_t gelu,
                   double eps) {
    const EncoderKernels& k = kernels_for("encode", x.scalar_type());
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "encode(x): expected [tokens, width], contiguous");
    const int64_t width = x.size(1);
    STD_TORCH_CHECK(width % 32 == 0, "encode(x): got width ", width, ", expected a multiple of 32");
    STD_TORCH_CHECK(heads > 0 && width % heads == 0 && width / heads % 2 == 0, "encode(heads): got ", heads,
                    ", expected a divisor of the width that leaves heads of even width");
    STD_TORCH_CHECK(gelu >= 0 && gelu <= 2, "encode(gelu): got ", gelu, ", expected 0, 1 or 2");
    STD_TORCH_CHECK(!weights.empty() && weights.size() % tensors_a_block == 0, "encode(weights): got ", weights.size(),
                    " tensors, expected 12 a block");
    const int64_t hidden = weights[9].numel();
    STD_TORCH_CHECK(hidden % 2 == 0, "encode(weights): got hidden width ", hidden, ", expected an even one");
    Encoder e{k, width, hidden, heads, causal, Gelu(gelu), float(eps), {}};
    for (size_t i = 0; i < weights.size(); i += tensors_a_block) {
        const Tensor* w = &weights[i];
        const int64_t packed[4][3] = {{2, 3 * width, width}, {4, width, width}, {8, hidden, width}, {10, width, hidden}};
        for (const auto& p : packed) {
            check("encode", "weights", w[p[0]], x.scalar_type(), k.packed_elements(p[1], p[2]));
            check("encode", "weights", w[p[0] + 1], ScalarType::Float, p[1]);
        }
        for (int64_t j : {0, 1, 6, 7}) check("encode", "weights", w[j], ScalarType::Float, width);
        e.blocks.push_back({floats(w[0]), floats(w[1]), data(w[2]), floats(w[3]), data(w[4]), floats(w[5]),
                            floats(w[6]), floats(w[7]), data(w[8]), floats(w[9]), data(w[10]), floats(w[11])});
    }
    return e;
}

Tensor encode(const Tensor& x, const Tensor& cu_seqlens, const std::vector<Tensor>& weights, int64_t heads, bool causal,
              int64_t gelu, double eps, int64_t read) {
    const Encoder e = encoder_of(x, weights, heads, causal, gelu, eps);
    const int64_t width = e.width, sequences = cu_seqlens.numel() - 1, size = e.k.element;
    check("encode", "cu_seqlens", cu_seqlens, ScalarType::Long, sequences + 1);
    STD_TORCH_CHECK(sequences >= 0, "encode(cu_seqlens): got nothing, expected offsets [S + 1]");
    const int64_t* offsets = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
    int64_t longest = 0;
    bool fine = offsets[0] == 0 && offsets[sequences] == x.size(0);
    for (int64_t s = 0; s < sequences; ++s) {
        longest = std::max(longest, offsets[s + 1] - offsets[s]);
        fine = fine && offsets[s + 1] > offsets[s] && read < offsets[s + 1] - offsets[s];
    }
    STD_TORCH_CHECK(fine && read >= read_all, "encode(cu_seqlens): expected offsets that start at 0, end at ",
                    x.size(0), " and leave no sequence without the token that is read (", read, ")");

    Tensor out = torch::stable::new_empty(x, {read == read_all ? x.size(0) : sequences, width});
    const int64_t rows = std::min(std::max(chunk_rows, longest), x.size(0)), threads = torch::stable::get_num_threads();
    Buffers w;
    w.scratch_bytes = Workspace::rounded(e.k.attention_scratch(longest, width / heads));
    const int64_t bytes[] = {rows * width * int64_t(sizeof(float)), rows * width * size,
                             rows * std::max(3 * width, e.hidden) * size, rows * width * int64_t(sizeof(float)),
                             2 * rows * width * size, threads * w.scratch_bytes};
    size_t sum = 0;
    for (int64_t b : bytes) sum += Workspace::rounded(b);
    Workspace memory(sum);
    w.stream = static_cast<float*>(memory.piece(bytes[0]));
    w.normed = memory.piece(bytes[1]);
    w.wide = memory.piece(bytes[2]);
    w.read = static_cast<float*>(memory.piece(bytes[3]));
    w.query = memory.piece(bytes[4]);
    w.scratch = static_cast<char*>(memory.piece(bytes[5]));

    for (int64_t first = 0, last; first < sequences; first = last) {
        for (last = first + 1; last < sequences && offsets[last + 1] - offsets[first] <= rows;) ++last;
        const int64_t start = offsets[first], count = offsets[last] - start;
        share(count, [&](int64_t begin, int64_t end) {
            e.k.to_float(at(data(x), (start + begin) * width * size), (end - begin) * width, w.stream + begin * width);
        });
        const float* result = run(e, offsets + first, last - first, read, w);
        const int64_t row = read == read_all ? start : first, results = read == read_all ? count : last - first;
        share(results, [&](int64_t begin, int64_t end) {
            e.k.from_float(result + begin * width, (end - begin) * width,
                           at(out.mutable_data_ptr(), (row + begin) * width * size));
        });
    }
    return out;
}

bool can_encode(bool bfloat16) { return (bfloat16 ? bfloat16_kernels() : float32_kernels()) != nullptr; }

int64_t release_workspace() { return int64_t(workspace_pool().release()); }

}  // namespace
}  // namespace clipfast::cpu

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
    m.impl("pack_weight", TORCH_BOX(&clipfast::cpu::pack_weight));
    m.impl("packed_linear", TORCH_BOX(&clipfast::cpu::packed_linear));
    m.impl("encode", TORCH_BOX(&clipfast::cpu::encode));
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CompositeExplicitAutograd, m) {
    m.impl("can_encode", TORCH_BOX(&clipfast::cpu::can_encode));
    m.impl("release_workspace", TORCH_BOX(&clipfast::cpu::release_workspace));
}
