// LayerNorm, residual + LayerNorm and bias + GELU on the CPU, forward and backward: each one pass over memory.
//
// Threads share rows. Sums over rows, which the gradients of weights and biases are, are taken by blocks of rows that
// depend on their number alone and then over the blocks in order, so that they are bitwise the same for any number of
// threads.

#include "rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "workspace.h"

namespace clipfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t grain = 16384;  // elements that are worth a thread
constexpr int64_t most_blocks = 256, least_block = 32;  // of rows, for sums over them

// ---------------------------------------------------------------------------------------------------------------
// arguments

const RowKernels* kernels_or_none() {
    const RowKernels* widest = row_kernels_avx512();
    return widest ? widest : row_kernels_avx2();
}

const RowKernels& kernels() {
    const RowKernels* k = kernels_or_none();
    STD_TORCH_CHECK(k, "this CPU has no kernels for rows: they need AVX2 and FMA");
    return *k;
}

std::string row_vectors() { return kernels_or_none() ? kernels_or_none()->name : ""; }

Dtype dtype_of(const char* op, ScalarType t) {
    STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half, op,
                    ": expected float32, bfloat16 or float16");
    return t == ScalarType::Float ? Dtype::float32 : t == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}
Dtype dtype_of(const char* op, const Tensor& t) { return dtype_of(op, t.scalar_type()); }

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
const void* data(const Tensor& t) { return t.const_data_ptr(); }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

int64_t width_of(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, op, "(x): expected rows that are not empty");
    return x.size(x.dim() - 1);
}

// `count` elements of a parameter in float32: its own, or a copy
class Floats {
public:
    Floats(const char* op, const Tensor& t, int64_t count) : tensor_(packed(t)) {
        STD_TORCH_CHECK(t.numel() == count, op, ": expected a parameter of ", count, " elements, got ", t.numel());
        const Dtype dtype = dtype_of(op, t);
        if (dtype == Dtype::float32) return;
        copy_.resize(count);
        kernels().to_float(data(tensor_), dtype, count, copy_.data());
    }
    const float* get() const { return copy_.empty() ? floats(tensor_) : copy_.data(); }

private:
    Tensor tensor_;
    std::vector<float> copy_;
};

Tensor like(const Tensor& x, ScalarType dtype) {
    return torch::stable::new_empty(x, x.sizes(), std::make_optional(dtype));
}

ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// ---------------------------------------------------------------------------------------------------------------
// sums over rows

// Calls f(begin, end, sums) for blocks of rows, with `width` zeros that it adds to, and returns the sums of all. Blocks of
// whole fours leave no kernel that takes several rows at once with fewer.
template <class F>
std::vector<float> sums_over_rows(int64_t rows, int64_t width, const F& f) {
    const int64_t blocks = std::min(most_blocks, (rows + least_block - 1) / least_block);
    const int64_t block = blocks ? ((rows + blocks - 1) / blocks + 3) / 4 * 4 : 0;
    Workspace memory(Workspace::rounded(std::max<int64_t>(1, blocks * width) * sizeof(float)));
    float* parts = static_cast<float*>(memory.piece(blocks * width * sizeof(float)));
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, grain / std::max<int64_t>(1, block * width)),
                                [&](int64_t begin, int64_t end) {
                                    for (int64_t b = begin; b < end; ++b) {
                                        float* sums = parts + b * width;
                                        std::fill(sums, sums + width, 0.f);
                                        const int64_t last = std::min((b + 1) * block, rows);
                                        if (b * block < last) f(b * block, last, sums);
                                    }
                                });
    std::vector<float> total(width);
    torch::stable::parallel_for(0, width, std::max<int64_t>(64, grain / std::max<int64_t>(1, blocks)),
                                [&](int64_t begin, int64_t end) {
                                    kernels().sum_parts(parts, blocks, width, begin, end, total.data());
                                });
    return total;
}

Tensor from_floats(const float* from, Tensor to) {
    kernels().from_float(from, to.numel(), to.mutable_data_ptr(), dtype_of("gradient", to));
    return to;
}

// ---------------------------------------------------------------------------------------------------------------
// LayerNorm

using NormResult = std::tuple<Tensor, Tensor, Tensor>;

// y, the sum, and the statistics of rows: the means, then the reciprocal deviations
NormResult run_norm(const char* op, const Tensor& x_, const Tensor* residual_, const Tensor& weight,
                    const Tensor& bias, double eps) {
    const int64_t width = width_of(op, x_), rows = x_.numel() / width;
    const Tensor x = packed(x_), residual = residual_ ? packed(*residual_) : x;
    STD_TORCH_CHECK(residual.numel() == x.numel(), op, "(residual): expected as many elements as x has");
    const ScalarType dtype = promoted(x.scalar_type(), residual.scalar_type());
    const Floats w(op, weight, width), b(op, bias, width);
    Tensor y = like(x, dtype), stream = residual_ ? like(x, dtype) : y;
    Tensor statistics = torch::stable::new_empty(x, {2, rows}, std::make_optional(ScalarType::Float));
    float* means = static_cast<float*>(statistics.mutable_data_ptr());
    const Norm p{data(x),
                 residual_ ? data(residual) : nullptr,
                 dtype_of(op, x),
                 dtype_of(op, residual),
                 dtype_of(op, dtype),
                 w.get(),
                 b.get(),
                 float(eps),
                 width,
                 y.mutable_data_ptr(),
                 stream.mutable_data_ptr(),
                 means,
                 means + rows};
    const bool mixed = residual_ && p.x_dtype != p.residual_dtype;
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, grain / width), [&](int64_t begin, int64_t end) {
        if (begin == end) return;
        std::vector<float> scratch(mixed ? 4 * width : 0);
        kernels().norm(p, begin, end, scratch.data());
    });
    return {y, stream, statistics};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
    auto [y, stream, statistics] = run_norm("native_layer_norm", x, nullptr, weight, bias, eps);
    return {y, statistics};
}

NormResult add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                          double eps) {
    return run_norm("native_add_layer_norm", x, &residual, weight, bias, eps);
}

using NormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

NormGradients run_norm_gradient(const char* op, const Tensor& dy_, const Tensor* d_stream_, const Tensor& x_,
                                const Tensor& weight, const Tensor& statistics, ScalarType dx_dtype,
                                ScalarType d_residual_dtype, std::optional<ScalarType> sum_dtype) {
    const int64_t width = width_of(op, x_), rows = x_.numel() / width;
    const Tensor x = packed(x_), dy = packed(dy_), d_stream = d_stream_ ? packed(*d_stream_) : dy;
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dy.scalar_type() == dtype && d_stream.scalar_type() == dtype && dy.numel() == x.numel() &&
                        d_stream.numel() == x.numel(),
                    op, ": expected gradients in the shape and dtype of what was normalised");
    STD_TORCH_CHECK(statistics.numel() == 2 * rows && statistics.scalar_type() == ScalarType::Float &&
                        statistics.is_contiguous(),
                    op, "(statistics): expected float32 [2, ", rows, "], contiguous");
    const Floats w(op, weight, width);
    const bool two = d_stream_ && dx_dtype != d_residual_dtype;
    Tensor dx = like(x, dx_dtype);
    Tensor d_residual = two ? like(x, d_residual_dtype)
                            : torch::stable::new_empty(x, {0}, std::make_optional(d_residual_dtype));
    const NormGradient p{data(dy),
                         d_stream_ ? data(d_stream) : nullptr,
                         data(x),
                         dtype_of(op, dtype),
                         w.get(),
                         floats(statistics),
                         floats(statistics) + rows,
                         width,
                         dx.mutable_data_ptr(),
                         two ? d_residual.mutable_data_ptr() : nullptr,
                         dtype_of(op, dx_dtype),
                         dtype_of(op, d_residual_dtype)};
    const bool neither = dx_dtype != dtype && !(two && d_residual_dtype == dtype);
    const int64_t wanted = sum_dtype ? 3 : 2;
    const std::vector<float> sums = sums_over_rows(rows, wanted * width, [&](int64_t begin, int64_t end, float* s) {
        std::vector<float> scratch(neither ? width : 0);
        const NormSums of{s, s + width, sum_dtype ? s + 2 * width : nullptr};
        kernels().norm_gradient(p, begin, end, of, scratch.data());
    });
    const float* found = sums.data();
    Tensor sum = torch::stable::new_empty(weight, {0});
    if (sum_dtype) sum = from_floats(found + 2 * width, like(weight, *sum_dtype));
    return {dx, d_residual, from_floats(found, like(weight, weight.scalar_type())),
            from_floats(found + width, like(weight, weight.scalar_type())), sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                       const Tensor& statistics) {
    const ScalarType dtype = x.scalar_type();
    auto [dx, other, d_weight, d_bias, sum] = run_norm_gradient("native_layer_norm_backward", dy, nullptr, x, weight,
                                                                statistics, dtype, dtype, std::nullopt);
    return {dx, d_weight, d_bias};
}

NormGradients add_layer_norm_backward(const Tensor& dy, const Tensor& d_stream, const Tensor& stream,
                                      const Tensor& weight, const Tensor& statistics, ScalarType x_dtype,
                                      ScalarType residual_dtype, std::optional<ScalarType> sum_dtype) {
    return run_norm_gradient("native_add_layer_norm_backward", dy, &d_stream, stream, weight, statistics, x_dtype,
                             residual_dtype, sum_dtype);
}

// ---------------------------------------------------------------------------------------------------------------
// bias and GELU

Form form_of(const char* op, int64_t form) {
    STD_TORCH_CHECK(form >= 0 && form <= 2, op, "(form): got ", form, ", expected 0, 1 or 2");
    return Form(form);
}

Tensor bias_gelu(const Tensor& x_, const std::optional<Tensor>& bias, int64_t form) {
    const char* op = "native_bias_gelu";
    const Tensor x = packed(x_);
    const int64_t width = bias ? width_of(op, x) : 1;
    const std::optional<Floats> b = bias ? std::make_optional<Floats>(op, *bias, width) : std::nullopt;
    Tensor y = like(x, x.scalar_type());
    const Activation p{data(x),          nullptr, b ? b->get() : nullptr, dtype_of(op, x), form_of(op, form), width,
                       y.mutable_data_ptr()};
    torch::stable::parallel_for(0, x.numel(), grain,
                                [&](int64_t begin, int64_t end) { kernels().gelu(p, begin, end); });
    return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dy_, const Tensor& x_, const std::optional<Tensor>& bias,
                                              int64_t form) {
    const char* op = "native_bias_gelu_backward";
    const Tensor x = packed(x_), dy = packed(dy_);
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel(), op,
                    "(dy): expected the shape and dtype of x");
    const int64_t width = width_of(op, x), rows = x.numel() / width;
    const std::optional<Floats> b = bias ? std::make_optional<Floats>(op, *bias, width) : std::nullopt;
    Tensor dx = like(x, x.scalar_type());
    const Activation p{data(x),          data(dy), b ? b->get() : nullptr, dtype_of(op, x), form_of(op, form), width,
                       dx.mutable_data_ptr()};
    if (!bias) {
        torch::stable::parallel_for(0, rows, std::max<int64_t>(1, grain / width), [&](int64_t begin, int64_t end) {
            kernels().gelu_gradient(p, begin, end, nullptr);
        });
        return {dx, torch::stable::new_empty(x, {0})};
    }
    const std::vector<float> sums = sums_over_rows(rows, width, [&](int64_t begin, int64_t end, float* s) {
        kernels().gelu_gradient(p, begin, end, s);
    });
    return {dx, from_floats(sums.data(), like(*bias, bias->scalar_type()))};
}

}  // namespace
}  // namespace clipfast::cpu

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
    m.impl("native_layer_norm", TORCH_BOX(&clipfast::cpu::layer_norm));
    m.impl("native_layer_norm_backward", TORCH_BOX(&clipfast::cpu::layer_norm_backward));
    m.impl("native_add_layer_norm", TORCH_BOX(&clipfast::cpu::add_layer_norm));
    m.impl("native_add_layer_norm_backward", TORCH_BOX(&clipfast::cpu::add_layer_norm_backward));
    m.impl("native_bias_gelu", TORCH_BOX(&clipfast::cpu::bias_gelu));
    m.impl("native_bias_gelu_backward", TORCH_BOX(&clipfast::cpu::bias_gelu_backward));
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CompositeExplicitAutograd, m) {
    m.impl("row_vectors", TORCH_BOX(&clipfast::cpu::row_vectors));
}
