// The contrastive losses' ops on CUDA: checks, memory, and the library's matrix products between the kernels.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>

#include "contrastive_loss_launchers.cuh"
#include "entry_points.h"

namespace clipfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --------------------------------------------------------------------------------------------------------------------
// checks

template <typename T>
constexpr ScalarType dtype_of() {
    if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
    if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
    if constexpr (std::is_same_v<T, __half>) return ScalarType::Half;
    return ScalarType::BFloat16;
}

const char* name_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Double: return "float64";
        case ScalarType::Float: return "float32";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        default: return "another dtype";
    }
}

void check_features(const char* op, const Tensor& image, const Tensor& text) {
    for (const auto& [name, features] : {std::pair{"image", &image}, std::pair{"text", &text}}) {
        STD_TORCH_CHECK(
            features->dim() == 2, op, "(", name, "): got ", features->dim(), " dimensions, expected [rows, width]");
        STD_TORCH_CHECK(
            features->size(0) > 0 && features->size(1) > 0 && features->size(0) < kMaxRows &&
                features->size(1) < kMaxRows,
            op, "(", name, "): got shape [", features->size(0), ", ", features->size(1),
            "], expected at least one row and one column, and fewer than 2^30 of each");
        STD_TORCH_CHECK(
            features->size(1) == 1 || features->stride(1) == 1, op, "(", name, "): got stride ", features->stride(1),
            " in the last dimension, expected 1");
    }
    STD_TORCH_CHECK(
        image.size(1) == text.size(1), op, "(text): got width ", text.size(1), ", expected ", image.size(1),
        ", that of image");
    STD_TORCH_CHECK(
        image.scalar_type() == text.scalar_type(), op, "(text): got ", name_of(text.scalar_type()), ", expected ",
        name_of(image.scalar_type()), ", as image");
    STD_TORCH_CHECK(
        text.is_cuda() && text.get_device() == image.get_device(), op, "(text): expected it on image's device");
}

// a vector of `size` numbers, or one number where size is 0, in the dtype of sums on the features' device
template <typename T>
const Sum<T>* numbers(const char* op, const char* name, const Tensor& image, const Tensor& x, int64_t size) {
    constexpr ScalarType expected = dtype_of<Sum<T>>();
    STD_TORCH_CHECK(
        x.scalar_type() == expected, op, "(", name, "): got ", name_of(x.scalar_type()), ", expected ",
        name_of(expected), " for features of ", name_of(dtype_of<T>()));
    STD_TORCH_CHECK(
        x.is_cuda() && x.get_device() == image.get_device(), op, "(", name, "): expected it on image's device");
    if (size == 0) {
        STD_TORCH_CHECK(x.numel() == 1, op, "(", name, "): got ", x.numel(), " elements, expected a scalar");
    } else {
        STD_TORCH_CHECK(
            x.dim() == 1 && x.size(0) == size && x.is_contiguous(), op, "(", name, "): got ", x.dim(),
            " dimensions and ", x.numel(), " elements, expected a contiguous [", size, "]");
    }
    return static_cast<const Sum<T>*>(x.const_data_ptr());
}

// Log-sum-exps [2, size].
template <typename T>
Lse<Sum<T>> two_parts(const char* op, const char* name, const Tensor& image, const Tensor& x, int64_t size) {
    STD_TORCH_CHECK(
        x.scalar_type() == dtype_of<Sum<T>>() && x.is_cuda() && x.get_device() == image.get_device() && x.dim() == 2 &&
            x.size(0) == 2 && x.size(1) == size && x.is_contiguous(),
        op, "(", name, "): expected a contiguous [2, ", size, "] of ", name_of(dtype_of<Sum<T>>()), " on image's device");
    const auto* data = static_cast<const Sum<T>*>(x.const_data_ptr());
    return {data, data + size};
}

template <typename T>
Features<T> features_of(
    const char* op, const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    const OptionalTensor& image_factor, const OptionalTensor& text_factor, int64_t first_label) {
    Features<T> f;
    f.image = static_cast<const T*>(image.const_data_ptr());
    f.text = static_cast<const T*>(text.const_data_ptr());
    f.rows = static_cast<int>(image.size(0)), f.columns = static_cast<int>(text.size(0));
    f.width = static_cast<int>(image.size(1));
    f.image_stride = image.stride(0), f.text_stride = text.stride(0);
    f.scale = numbers<T>(op, "logit_scale", image, logit_scale, 0);
    f.image_factor = image_factor ? numbers<T>(op, "image_factor", image, *image_factor, f.rows) : nullptr;
    f.text_factor = text_factor ? numbers<T>(op, "text_factor", image, *text_factor, f.columns) : nullptr;
    f.first_label = label_offset(first_label);
    return f;
}

// --------------------------------------------------------------------------------------------------------------------
// PyTorch's side: stream, memory, matrix products

struct Device {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;
    int multiprocessors;
    SharedMemory shared;

    Device(const char* op, const Tensor& image) : guard(image.get_device()) {
        const CudaEntryPoints& entry_points = cuda_entry_points();
        STD_TORCH_CHECK(entry_points.current_stream != nullptr, op, ": ", entry_points.missing);
        void* current = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(entry_points.current_stream(image.get_device(), &current));
        stream = static_cast<cudaStream_t>(current);
        const auto ask = [&](int& value, cudaDeviceAttr attribute) {
            check_launch(op, cudaDeviceGetAttribute(&value, attribute, image.get_device()));
        };
        ask(multiprocessors, cudaDevAttrMultiProcessorCount);
        ask(shared.multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
        ask(shared.block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        ask(shared.reserved, cudaDevAttrReservedSharedMemoryPerBlock);
    }
};

template <typename T>
Tensor empty(const Tensor& like, std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(like, size, dtype_of<T>());
}

template <typename T>
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> size) {
    return torch::stable::new_zeros(like, size, dtype_of<T>());
}

template <typename T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.mutable_data_ptr());
}

Tensor rows_of(Tensor x, int64_t first, int64_t count) {
    return torch::stable::narrow(x, 0, first, count);
}

// The features as the kernels read them, and the memory of what had to be copied for that.
template <typename T>
struct Padded {
    Features<T> features;
    std::optional<Tensor> image, text;

    Padded(const Features<T>& f, const Tensor& like, cudaStream_t stream) : features(f) {
        const int width = Padding<T>::width(f.width);
        const auto pad = [&](const T*& matrix, int64_t& stride, int rows, std::optional<Tensor>& memory) {
            memory = empty<T>(like, {rows, width});
            launch_pad_rows<T>(data<T>(*memory), width, matrix, stride, f.width, rows, stream);
            matrix = data<T>(*memory), stride = width;
        };
        if (Padding<T>::is_needed(f.image, f.rows, f.width, f.image_stride))
            pad(features.image, features.image_stride, f.rows, image);
        if (Padding<T>::is_needed(f.text, f.columns, f.width, f.text_stride))
            pad(features.text, features.text_stride, f.columns, text);
        features.width = width;
    }
};

// out = a · b. 16-bit features take the overload with a float32 result. Only out= overloads are called: autocast leaves
// them alone.
template <typename T>
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
    using torch::stable::detail::from;
    if constexpr (sizeof(T) == 2) {
        std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
        STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
        torch::stable::detail::to<Tensor>(stack[0]);
    } else {
        std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
        STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
        torch::stable::detail::to<Tensor>(stack[0]);
    }
}

// calls run(T()) with the features' element type
template <typename Run>
auto by_dtype(const char* op, const Tensor& image, Run run) {
    switch (image.scalar_type()) {
        case ScalarType::Double: return run(double());
        case ScalarType::Float: return run(float());
        case ScalarType::Half: return run(__half());
        case ScalarType::BFloat16: return run(__nv_bfloat16());
        default:
            STD_TORCH_CHECK(false, op, "(image): expected float64, float32, float16 or bfloat16, got another dtype");
            return run(float());
    }
}

// --------------------------------------------------------------------------------------------------------------------
// ops

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
