// The contrastive losses' ops on CUDA: the kernels, and the library's matrix products between them.

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "contrastive_loss_tensors.cuh"

namespace clipfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_statistics(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const OptionalTensor& image_factor,
    const OptionalTensor& text_factor, int64_t first_label) {
    const char* op = "contrastive_statistics";
    check_features(op, image, text);
    return by_dtype(op, image, [&](auto element) {
        using T = decltype(element);
        using A = Sum<T>;
        const Features<T> given = features_of<T>(op, image, text, logit_scale, image_factor, text_factor, first_label);
        const Device device(op, image);
        const Padded<T> padded(given, image, device.stream);
        const Features<T>& f = padded.features;
        const auto plan = StatisticsPlan::make(f, device.multiprocessors, device.shared);
        Tensor scratch = empty<A>(image, {plan.softmax_numbers(f)});
        Tensor row_lse = empty<A>(image, {2, f.rows}), row_rival = empty<A>(image, {f.rows});
        Tensor column_lse = empty<A>(image, {2, f.columns}), column_rival = empty<A>(image, {f.columns});
        // zero is the answer for rows without a label, which no tile writes
        Tensor positive = zeros<A>(image, {f.rows});
        launch_softmax_statistics<T>(
            f, plan, data<A>(scratch),
            {data<A>(row_lse), data<A>(column_lse), data<A>(positive), data<A>(row_rival), data<A>(column_rival)},
            device.stream);
        check_launch(op, cudaGetLastError());
        return std::make_tuple(row_lse, column_lse, positive, row_rival, column_rival);
    });
}

Tensor siglip_statistics(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
    const OptionalTensor& image_factor, const OptionalTensor& text_factor, int64_t first_label) {
    const char* op = "siglip_statistics";
    check_features(op, image, text);
    return by_dtype(op, image, [&](auto element) {
        using T = decltype(element);
        using A = Sum<T>;
        const Features<T> given = features_of<T>(op, image, text, logit_scale, image_factor, text_factor, first_label);
        const A* bias = numbers<T>(op, "logit_bias", image, logit_bias, 0);
        const Device device(op, image);
        const Padded<T> padded(given, image, device.stream);
        const Features<T>& f = padded.features;
        const auto plan = StatisticsPlan::make(f, device.multiprocessors, device.shared);
        Tensor scratch = empty<A>(image, {plan.template row_numbers<T>()});
        Tensor row_loss = empty<A>(image, {f.rows});
        launch_sigmoid_statistics<T>(f, bias, plan, data<A>(scratch), data<A>(row_loss), device.stream);
        check_launch(op, cudaGetLastError());
        return row_loss;
    });
}

struct Gradients {
    Tensor row_loss, d_image, d_text, d_scale, d_bias;
};

// The gradients of either loss, and the rows' losses of the sigmoid one: a chunk of rows of the logits' gradient at a
// time, which two matrix products use up before the next takes its place. Features' gradients are in the dtype Out.
template <typename T, typename Out, bool kSigmoid>
Gradients gradients(
    const char* op, const Tensor& image, const Tensor& text, const Features<T>& given, LogitGradient<Sum<T>> g) {
    using A = Sum<T>;
    const Device device(op, image);
    const Padded<T> padded(given, image, device.stream);
    const Features<T>& f = padded.features;
    const auto plan = GradientPlan::make(f, device.multiprocessors, device.shared);
    const int64_t width = given.width;
    Tensor d_image = empty<Out>(image, {f.rows, width}), d_text = empty<Out>(image, {f.columns, width});
    Tensor d_scale = empty<A>(image, {}), d_bias = empty<A>(image, {}), unit = empty<A>(image, {});
    Tensor scale_sums = empty<A>(image, {plan.sums(f)}), row_loss = empty<A>(image, {kSigmoid ? f.rows : 0});
    Tensor bias_sums = empty<A>(image, {kSigmoid ? plan.sums(f) : 0});
    Tensor row_scratch = empty<A>(image, {kSigmoid ? plan.row_numbers() : 0});
    const GradientPartials<A> partials{
        data<A>(scale_sums), kSigmoid ? data<A>(bias_sums) : nullptr, data<A>(row_scratch)};
    // sums of 16-bit features' gradients are float32 until the end; others add up where they are returned
    constexpr bool kSame = std::is_same_v<Out, A>;
    Tensor text_sum = kSame ? d_text : empty<A>(image, {f.columns, width});

    launch_unit<T>(f, g.row_weight, g.column_weight, data<A>(unit), device.stream);
    g.unit = data<A>(unit);
    const bool several = plan.chunk < f.rows;
    const Tensor chunk = empty<T>(image, {several ? plan.chunk : f.rows, plan.pitch});
    const Tensor image_sum = empty<A>(image, {kSame ? 0 : chunk.size(0), width});
    const Tensor text_part = empty<A>(image, {several ? plan.text_block : 0, width});
    for (int64_t row = 0; row < f.rows; row += plan.chunk) {
        const int64_t rows = f.rows - row < plan.chunk ? f.rows - row : plan.chunk;
        launch_logit_gradient<T, kSigmoid>(
            f, g, plan, row, rows, data<T>(chunk), partials, data<A>(row_loss), device.stream);
        check_launch(op, cudaGetLastError());
        Tensor chunk_rows = rows_of(chunk, 0, rows);
        const Tensor gradient = torch::stable::narrow(chunk_rows, 1, 0, f.columns);

        const Tensor d_rows = rows_of(d_image, row, rows), sum = kSame ? d_rows : rows_of(image_sum, 0, rows);
        multiply<T>(gradient, text, sum);
        launch_finish_gradient(data<Out>(d_rows), data<const A>(sum), rows * width, f.scale, g.unit, device.stream);

        const Tensor own = rows_of(image, row, rows);
        if (row == 0) {
            multiply<T>(torch::stable::transpose(gradient, 0, 1), own, text_sum);
            continue;
        }
        // in blocks that may stay in the cache; a product as large as d_text would also need as much memory again
        for (int64_t first = 0; first < f.columns; first += plan.text_block) {
            const int64_t count = f.columns - first < plan.text_block ? f.columns - first : plan.text_block;
            const Tensor part = rows_of(text_part, 0, count);
            const Tensor block = torch::stable::narrow(chunk_rows, 1, first, count);
            multiply<T>(torch::stable::transpose(block, 0, 1), own, part);
            launch_accumulate<A>(data<A>(text_sum) + first * width, data<A>(part), count * width, device.stream);
        }
    }
    launch_finish_gradient(
        data<Out>(d_text), data<const A>(text_sum), static_cast<int64_t>(f.columns) * width, f.scale, g.unit,
        device.stream);
    launch_add_up<A>(data<A>(scale_sums), plan.sums(f), data<A>(d_scale), device.stream);
    if (kSigmoid) launch_add_up<A>(data<A>(bias_sums), plan.sums(f), data<A>(d_bias), device.stream);
    check_launch(op, cudaGetLastError());
    return {row_loss, d_image, d_text, d_scale, d_bias};
}

template <typename T, bool kSigmoid>
Gradients gradients(
    const char* op, const Tensor& image, const Tensor& text, const Features<T>& f, const LogitGradient<Sum<T>>& g,
    bool wide) {
    if constexpr (!std::is_same_v<T, Sum<T>>) {
        if (!wide) return gradients<T, T, kSigmoid>(op, image, text, f, g);
    }
    return gradients<T, Sum<T>, kSigmoid>(op, image, text, f, g);
}

std::tuple<Tensor, Tensor, Tensor> contrastive_gradients(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const OptionalTensor& image_factor,
    const OptionalTensor& text_factor, const Tensor& row_lse, const Tensor& col_lse, const Tensor& row_weight,
    const Tensor& col_weight, int64_t first_label, bool wide) {
    const char* op = "contrastive_gradients";
    check_features(op, image, text);
    return by_dtype(op, image, [&](auto element) {
        using T = decltype(element);
        const Features<T> f = features_of<T>(op, image, text, logit_scale, image_factor, text_factor, first_label);
        LogitGradient<Sum<T>> g{};
        g.row_weight = numbers<T>(op, "row_weight", image, row_weight, f.rows);
        g.column_weight = numbers<T>(op, "col_weight", image, col_weight, f.columns);
        g.row_lse = two_parts<T>(op, "row_lse", image, row_lse, f.rows);
        g.column_lse = two_parts<T>(op, "col_lse", image, col_lse, f.columns);
        const Gradients found = gradients<T, false>(op, image, text, f, g, wide);
        return std::make_tuple(found.d_image, found.d_text, found.d_scale);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_gradients(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
    const OptionalTensor& image_factor, const OptionalTensor& text_factor, const Tensor& row_weight,
    int64_t first_label, bool wide) {
    const char* op = "siglip_gradients";
    check_features(op, image, text);
    return by_dtype(op, image, [&](auto element) {
        using T = decltype(element);
        const Features<T> f = features_of<T>(op, image, text, logit_scale, image_factor, text_factor, first_label);
        LogitGradient<Sum<T>> g{};
        g.row_weight = numbers<T>(op, "row_weight", image, row_weight, f.rows);
        g.bias = numbers<T>(op, "logit_bias", image, logit_bias, 0);
        const Gradients found = gradients<T, true>(op, image, text, f, g, wide);
        return std::make_tuple(found.row_loss, found.d_image, found.d_text, found.d_scale, found.d_bias);
    });
}

}  // namespace
}  // namespace clipfast

STABLE_TORCH_LIBRARY_IMPL(clipfast, CUDA, m) {
    m.impl("contrastive_statistics", TORCH_BOX(&clipfast::contrastive_statistics));
    m.impl("contrastive_gradients", TORCH_BOX(&clipfast::contrastive_gradients));
    m.impl("siglip_statistics", TORCH_BOX(&clipfast::siglip_statistics));
    m.impl("siglip_gradients", TORCH_BOX(&clipfast::siglip_gradients));
}
