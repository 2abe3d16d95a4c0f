// A transformer's forward pass on the CPU, from embedded tokens to the tokens that are read.
//
// Sequences go through all blocks a chunk at a time, so that what passes between two steps stays in the cache and the
// memory in use does not grow with the batch. Threads share the tiles of a step, or take sequences of their own. The
// residual stream is float32; what products read is in the weights' dtype. A token's result depends on its own sequence
// alone: every sum over terms has one order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "encoder_blocks.h"

namespace clipfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t rows_apart = 256;      // fewer tokens are not worth a thread that reads all weights for them
constexpr int64_t tensors_a_block = 12;  // see clipfast::encode

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
const EncoderKernels* bfloat16_kernels() {
    return widest({encoder_bfloat16_amx(), encoder_bfloat16_avx512(), encoder_bfloat16_neon()});
}

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

// ---------------------------------------------------------------------------------------------------------------
// threads with sequences of their own

// The first sequence of each of `parts` shares of about as many tokens, and the end
std::vector<int64_t> shares_of(const int64_t* offsets, int64_t sequences, int64_t parts) {
    std::vector<int64_t> first{0};
    for (int64_t part = 1; part < parts; ++part) {
        const int64_t* nearest =
            std::lower_bound(offsets + first.back(), offsets + sequences, offsets[sequences] * part / parts);
        const int64_t wanted = offsets[sequences] * part / parts;
        if (nearest > offsets + first.back() && wanted - nearest[-1] < nearest[0] - wanted) --nearest;
        first.push_back(nearest - offsets);
    }
    first.push_back(sequences);
    return first;
}

// Whether every thread gets enough sequences of its own, and none waits long for another
bool worth_apart(const int64_t* offsets, const std::vector<int64_t>& first) {
    int64_t least = offsets[first[1]] - offsets[first[0]], most = least;
    for (size_t i = 1; i + 1 < first.size(); ++i) {
        const int64_t rows = offsets[first[i + 1]] - offsets[first[i]];
        least = std::min(least, rows);
        most = std::max(most, rows);
    }
    return first.size() == 2 || (least >= rows_apart && most * 8 <= least * 9);
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
    const int64_t rows = x.size(0), terms = x.size(1);
    Product p{data(x),  rows,    terms, columns, data(packed), bias ? floats(*bias) : nullptr, y.mutable_data_ptr(),
              columns, Product::Then::store, Gelu::none};
    if (!k.arrange) {
        multiply(Team::all, k, p);
        return y;
    }
    // activations a chunk at a time: all of them might not stay in the cache
    const int64_t most = std::min(k.chunk_rows(terms), rows);
    Workspace memory(Workspace::rounded(k.activation_elements(most, terms) * k.element));
    void* arranged = memory.piece(k.activation_elements(most, terms) * k.element);
    for (int64_t first = 0; first < rows; first += most) {
        p.rows = std::min(most, rows - first);
        p.a = arranged;
        p.c = at(y.mutable_data_ptr(), first * columns * k.element);
        const void* from = at(data(x), first * terms * k.element);
        share(Team::all, p.rows,
              [&](int64_t begin, int64_t end) { k.arrange(from, begin, end, terms, arranged); });
        multiply(Team::all, k, p);
    }
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
    if (sequences == 0) return out;
    void* const to = out.mutable_data_ptr();

    // sequences begin..end-1, a chunk of at most `rows` tokens at a time
    const auto run_chunks = [&](int64_t begin, int64_t end, int64_t rows, const Buffers& w) {
        for (int64_t first = begin, last; first < end; first = last) {
            for (last = first + 1; last < end && offsets[last + 1] - offsets[first] <= rows;) ++last;
            const int64_t start = offsets[first], count = offsets[last] - start;
            share(w.team, count, [&](int64_t from, int64_t until) {
                e.k.to_float(at(data(x), (start + from) * width * size), (until - from) * width,
                             w.stream + from * width);
            });
            const float* result = run(e, offsets + first, last - first, read, w);
            const int64_t row = read == read_all ? start : first, results = read == read_all ? count : last - first;
            share(w.team, results, [&](int64_t from, int64_t until) {
                e.k.from_float(result + from * width, (until - from) * width, at(to, (row + from) * width * size));
            });
        }
    };
    const int64_t threads = torch::stable::get_num_threads(), limit = std::max(e.k.chunk_rows(width), longest);
    const int64_t scratch = Workspace::rounded(e.k.attention_scratch(longest, width / heads));
    const std::vector<int64_t> first = shares_of(offsets, sequences, e.k.apart ? threads : 1);
    const bool apart = e.k.apart && worth_apart(offsets, first);
    const int64_t teams = apart ? threads : 1, rows = std::min(limit, x.size(0));
    const std::vector<int64_t> bytes = buffer_bytes(e, rows, apart ? 1 : threads, scratch);
    size_t sum = 0;
    for (int64_t b : bytes) sum += teams * Workspace::rounded(b);
    Workspace memory(sum);
    std::vector<Buffers> w;
    for (int64_t team = 0; team < teams; ++team)
        w.push_back(buffers_in(memory, apart ? Team::alone : Team::all, bytes, scratch));
    if (!apart) {
        run_chunks(0, sequences, limit, w[0]);
        return out;
    }
    torch::stable::parallel_for(0, teams, 1, [&](int64_t begin, int64_t end) {
        for (int64_t team = begin; team < end; ++team) {
            // chunks of about one size: a small last one would read all weights for little
            const int64_t mine = offsets[first[team + 1]] - offsets[first[team]], chunks = (mine + limit - 1) / limit;
            run_chunks(first[team], first[team + 1], std::min(limit, mine / chunks + longest / 2), w[team]);
        }
    });
    return out;
}

bool can_encode(bool bfloat16) { return (bfloat16 ? bfloat16_kernels() : float32_kernels()) != nullptr; }

std::string why_no_amx() {
    const char* reason = amx_unavailable();
    return reason ? reason : encoder_bfloat16_amx() ? "" : "AVX512-BF16, which goes with it, is not there or not to be used";
}

int64_t release_workspace() { return int64_t(workspace_pool().release()); }

}  // namespace
}  // namespace clipfast::cpu

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
    m.impl("pack_weight", TORCH_BOX(&clipfast::cpu::pack_weight));
    m.impl("packed_linear", TORCH_BOX(&clipfast::cpu::packed_linear));
    m.impl("encode", TORCH_BOX(&clipfast::cpu::encode));
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CompositeExplicitAutograd, m) {
    m.impl("why_no_amx", TORCH_BOX(&clipfast::cpu::why_no_amx));
    m.impl("can_encode", TORCH_BOX(&clipfast::cpu::can_encode));
    m.impl("release_workspace", TORCH_BOX(&clipfast::cpu::release_workspace));
}
