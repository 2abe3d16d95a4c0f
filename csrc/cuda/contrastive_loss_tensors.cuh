// What the contrastive losses' ops on CUDA need of PyTorch: checked tensors, a stream, memory, matrix products.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <utility>

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

}  // namespace
}  // namespace clipfast
