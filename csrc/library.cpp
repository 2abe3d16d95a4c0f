// The op library: schemas that every backend implements, and what this build holds.
//
// Only PyTorch's stable ABI is used, so one file serves every PyTorch from 2.10 on.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/entry_points.h"

namespace clipfast {

#define CLIPFAST_STRING_(...) #__VA_ARGS__
#define CLIPFAST_STRING(...) CLIPFAST_STRING_(__VA_ARGS__)

// "key=value" fields between semicolons, so that one glance at a bug report says what was built, and how.
std::string build_info() {
    std::string info = "compiler=" __VERSION__;
    info += ";torch_target=" CLIPFAST_STRING(TORCH_TARGET_VERSION);
#if defined(__x86_64__)
    info += ";cpu=x86_64";
#elif defined(__aarch64__)
    info += ";cpu=aarch64";
#else
    info += ";cpu=other";
#endif
    // the toolkit's version and the architectures, or none
    info += ";cuda=" CLIPFAST_STRING(CLIPFAST_CUDA);
    return info;
}

// What keeps the CUDA kernels from PyTorch's streams in this process; empty where nothing does.
std::string missing_cuda_entry_points() {
    const bool built = std::string(CLIPFAST_STRING(CLIPFAST_CUDA)) != "none";
    return built ? cuda_entry_points().missing : "the op library was built without CUDA";
}

}  // namespace clipfast

STABLE_TORCH_LIBRARY(clipfast, m) {
    m.def("build_info() -> str");
    // why the CUDA kernels cannot reach PyTorch's streams, or an empty string
    m.def("missing_cuda_entry_points() -> str");

    // image [M, D], text [N, D]: float64, float32, bfloat16 or float16, with a contiguous last dimension. Logits are
    // x_ij = s · f_i · g_j · (image_i · text_j), where logit_scale s is a scalar on the features' device and the
    // factors f [M], g [N] (1 where absent) stand for the inverse norms of features that are not normalised. Row i's
    // label is column i + first_label; a label outside 0..N-1 is a row without one. Everything but the features and
    // their gradients is float32 (float64 for float64 features).
    //
    // All from one pass over the tiles: the log-sum-exp of every row and column of logits in two parts, [2, M] and
    // [2, N] (the largest logit, and the logarithm of the sum of exponentials beside it: their sum would lose digits
    // where it is large); the label's logit (0 without one), and the largest logit beside the labels' (-inf where
    // there is none).
    m.def(
        "contrastive_statistics(Tensor image, Tensor text, Tensor logit_scale, Tensor? image_factor, "
        "Tensor? text_factor, int first_label) -> "
        "(Tensor row_lse, Tensor col_lse, Tensor positive, Tensor row_rival, Tensor col_rival)");
    // With G_ij = u_i · (exp(x_ij - row_lse_i) - [j is i's label]) + v_j · (exp(x_ij - col_lse_j) - [j is i's label])
    // (the log-sum-exps in two parts, as above; x_ij must come out in the very bits of the statistics' pass)
    // for the weights u [M], v [N]: d_image_i = Σ_j G_ij s f_i g_j text_j, d_text_j = Σ_i G_ij s f_i g_j image_i,
    // d_scale = Σ_ij G_ij f_i g_j (image_i · text_j). The factors count as constants. Features' gradients are in the
    // features' dtype, or `wide`: in the precision of the sums.
    m.def(
        "contrastive_gradients(Tensor image, Tensor text, Tensor logit_scale, Tensor? image_factor, "
        "Tensor? text_factor, Tensor row_lse, Tensor col_lse, Tensor row_weight, Tensor col_weight, int first_label, "
        "bool wide=False) -> (Tensor d_image, Tensor d_text, Tensor d_scale)");
    // The same pair on the CPU for few logits: the first also returns the products image_i · text_j [M, N], in the
    // precision of the sums, and the second reads them in place of forming them again.
    m.def(
        "contrastive_statistics_and_products(Tensor image, Tensor text, Tensor logit_scale, Tensor? image_factor, "
        "Tensor? text_factor, int first_label) -> "
        "(Tensor row_lse, Tensor col_lse, Tensor positive, Tensor row_rival, Tensor col_rival, Tensor products)");
    m.def(
        "contrastive_gradients_of_products(Tensor products, Tensor image, Tensor text, Tensor logit_scale, "
        "Tensor? image_factor, Tensor? text_factor, Tensor row_lse, Tensor col_lse, Tensor row_weight, "
        "Tensor col_weight, int first_label, bool wide=False) -> (Tensor d_image, Tensor d_text, Tensor d_scale)");
    // SigLIP: with z_ij = 1 at the label and -1 beside it, row_loss_i = Σ_j log(1 + exp(-z_ij · (x_ij + b))).
    m.def(
        "siglip_statistics(Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, Tensor? image_factor, "
        "Tensor? text_factor, int first_label) -> Tensor");
    // As contrastive_gradients with G_ij = -u_i · z_ij · σ(-z_ij · (x_ij + b)), and d_bias = Σ_ij G_ij; with the row_loss
    // of siglip_statistics from the same pass.
    m.def(
        "siglip_gradients(Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, Tensor? image_factor, "
        "Tensor? text_factor, Tensor row_weight, int first_label, bool wide=False) "
        "-> (Tensor row_loss, Tensor d_image, Tensor d_text, Tensor d_scale, Tensor d_bias)");

    // Elementwise work on the CPU (csrc/cpu/rows.cpp): rows in float32, bfloat16 or float16, contiguous or not; weights
    // and biases in any of these. Which instructions serve on this CPU: avx512,
    // avx2, or nothing where neither is there
    m.def("row_vectors() -> str");
    // y as x; statistics: the rows' means and reciprocal deviations, float32 [2, rows]
    m.def("native_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor statistics)");
    m.def(
        "native_layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor statistics) "
        "-> (Tensor dx, Tensor d_weight, Tensor d_bias)");
    // stream = x + residual, in their common dtype, and its LayerNorm
    m.def(
        "native_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor y, Tensor stream, Tensor statistics)");
    // d_residual is empty where it is dx, as it is for equal dtypes; sum, of dx over rows, where no dtype is given
    m.def(
        "native_add_layer_norm_backward(Tensor dy, Tensor d_stream, Tensor stream, Tensor weight, Tensor statistics, "
        "ScalarType x_dtype, ScalarType residual_dtype, ScalarType? sum_dtype) "
        "-> (Tensor dx, Tensor d_residual, Tensor d_weight, Tensor d_bias, Tensor sum)");
    // form: 0 erf, 1 tanh, 2 quick
    m.def("native_bias_gelu(Tensor x, Tensor? bias, int form) -> Tensor");
    // d_bias is empty without a bias
    m.def(
        "native_bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, int form) -> (Tensor dx, Tensor d_bias)");

    // Inference on the CPU (csrc/cpu/encoder.cpp), for bfloat16 and float32. Whether this CPU has what it takes:
    m.def("can_encode(bool bfloat16) -> bool");
    // why bfloat16 is not multiplied by AMX in this process, or an empty string where it is
    m.def("why_no_amx() -> str");
    // weight [columns, terms] in the form that products read it in
    m.def("pack_weight(Tensor weight) -> Tensor");
    // x [rows, terms] times such a weight, plus bias (float32) -> [rows, columns]
    m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int columns) -> Tensor");
    // A pre-norm transformer: x [tokens, width], sequences between cu_seqlens [S + 1] (int64, none empty). Twelve tensors
    // a block: LayerNorm weight and bias; packed QKV weight [3 width, width] and bias; packed output projection and
    // bias; LayerNorm weight and bias; the MLP's two packed weights, each with its bias; all but the packed ones
    // float32. gelu: 0 erf, 1 tanh, 2 quick. read: the position of the token that is read of every sequence, -1 the
    // last, -2 all of them -> [S, width] or [tokens, width].
    m.def(
        "encode(Tensor x, Tensor cu_seqlens, Tensor[] weights, int heads, bool causal, int gelu, float eps, int read) "
        "-> Tensor");
    // Give the memory that encode keeps for its next call back; returns how many bytes that were.
    m.def("release_workspace() -> int");
    // What weights, each [rows, columns] with rows in one piece, are now (csrc/cpu/fingerprint.cpp): the hashes of every
    // turn of the first, then those of the second and so on
    m.def("fingerprint(Tensor[] weights) -> Tensor");
    // The first of these weights that shows at some turn (0, 1, ...) to have been written to since, or -1. A turn looks
    // at a share of the weights: at every row, every column and every block of 1/64 of a matrix; 256 turns at all.
    m.def("changed_weight(Tensor[] weights, Tensor fingerprint, int turn) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CompositeExplicitAutograd, m) {
    m.impl("build_info", TORCH_BOX(&clipfast::build_info));
    m.impl("missing_cuda_entry_points", TORCH_BOX(&clipfast::missing_cuda_entry_points));
}
