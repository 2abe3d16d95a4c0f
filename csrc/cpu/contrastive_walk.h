// The arguments of the losses' ops on the CPU, and the walk over tiles of logits that all of them are made of.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "products.h"
#include "tile.h"

namespace clipfast::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------------
// arguments

inline Matrix matrix_of(const char* op, const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1) &&
                        (t.stride(0) >= t.size(1) || t.size(0) <= 1),
                    op, "(", name, "): expected two dimensions, the last contiguous, and rows that do not overlap");
    Dtype dtype;
    switch (t.scalar_type()) {
        case ScalarType::Double: dtype = Dtype::float64; break;
        case ScalarType::Float: dtype = Dtype::float32; break;
        case ScalarType::BFloat16: dtype = Dtype::bfloat16; break;
        case ScalarType::Half: dtype = Dtype::float16; break;
        default:
            STD_TORCH_CHECK(false, op, "(", name, "): expected float64, float32, bfloat16 or float16");
            __builtin_unreachable();
    }
    // a single row may have any stride; BLAS wants one that is at least the width
    return {t.const_data_ptr(), t.size(0), t.size(1), std::max(t.stride(0), t.size(1)), dtype};
}

template <class Real>
constexpr ScalarType scalar_type = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;

// `size` numbers of a vector argument; ones where it is absent
template <class Real>
std::vector<Real> vector_of(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size) {
    if (!t) return std::vector<Real>(size, Real(1));
    STD_TORCH_CHECK(t->scalar_type() == scalar_type<Real> && t->numel() == size && t->dim() <= 1, op, "(", name,
                    "): expected ", size, " numbers in the precision of the sums");
    const Real* data = t->const_data_ptr<Real>();
    const int64_t stride = t->dim() == 1 ? t->stride(0) : 1;
    std::vector<Real> values(size);
    for (int64_t i = 0; i < size; ++i) values[i] = data[i * stride];
    return values;
}

template <class Real>
struct Problem {
    const char* op;
    Matrix image, text;
    Real scale;
    std::vector<Real> f, g;
    int64_t first_label;
    // products [image rows, text rows] that a walk leaves, or that one before has left; nullptr where none are kept
    Real* kept = nullptr;
    bool left = false;

    Problem(const char* op, const Tensor& images, const Tensor& texts, const Tensor& logit_scale,
            const std::optional<Tensor>& image_factor, const std::optional<Tensor>& text_factor, int64_t first_label)
        : op(op),
          image(matrix_of(op, "image", images)),
          text(matrix_of(op, "text", texts)),
          scale(vector_of<Real>(op, "logit_scale", logit_scale, 1)[0]),
          f(vector_of<Real>(op, "image_factor", image_factor, image.rows)),
          g(vector_of<Real>(op, "text_factor", text_factor, text.rows)),
          first_label(first_label) {
        STD_TORCH_CHECK(image.width == text.width && image.dtype == text.dtype, op,
                        "(text): expected the width and dtype of image");
    }
};

template <class Real>
Tensor vector_like(const Tensor& t, int64_t size) {
    return torch::stable::new_empty(t, {size}, std::make_optional(scalar_type<Real>));
}

template <class Real>
Tensor lse_like(const Tensor& t, int64_t size) {
    return torch::stable::new_empty(t, {2, size}, std::make_optional(scalar_type<Real>));
}

template <class Real>
Lse<Real> lse_of(const char* op, const char* name, const Tensor& t, int64_t size) {
    STD_TORCH_CHECK(t.scalar_type() == scalar_type<Real> && t.dim() == 2 && t.size(0) == 2 && t.size(1) == size &&
                        t.is_contiguous(),
                    op, "(", name, "): expected contiguous [2, ", size, "] in the precision of the sums");
    const Real* data = t.const_data_ptr<Real>();
    return {data, data + size};
}

template <class Real>
Tensor scalar_like(const Tensor& t, double value) {
    Tensor out = torch::stable::new_empty(t, {}, std::make_optional(scalar_type<Real>));
    *out.mutable_data_ptr<Real>() = Real(value);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------
// the walk over tiles

// An exception must not leave a thread of the pool: the first one's message is kept, and thrown by the caller.
template <class F>
void on_threads(int64_t parts, const F& f) {
    std::string message;
    std::mutex mutex;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        try {
            for (int64_t i = begin; i < end; ++i) f(i);
        } catch (const std::exception& error) {
            std::lock_guard<std::mutex> lock(mutex);
            if (message.empty()) message = error.what();
        }
    });
    STD_TORCH_CHECK(message.empty(), message);
}

struct Place {
    int64_t part;             // the thread's number
    int64_t block, row;       // the block's first row; this tile's first row within the block
    int64_t tile, column;     // the column tile's number and first column
};

template <class Real>
void copy_rows(const Real* from, int64_t from_row, Real* to, int64_t to_row, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * from_row, columns, to + r * to_row);
}

// Calls at_tile(place, tile, products) for every tile of raw products, and after_block(first row, rows) once a block.
template <class Real, class AtTile, class AfterBlock>
void walk(const Problem<Real>& p, int64_t parts, const AtTile& at_tile, const AfterBlock& after_block) {
    const Gemm<Real>& gemm = choose_gemm<Real>(p.image.dtype);
    const int64_t tiles = (p.text.rows + gemm.tile_columns - 1) / gemm.tile_columns;
    const auto rows = gemm.row_block(p.image, gemm.block_rows);
    std::vector<std::unique_ptr<Products<Real>>> products(parts);
    std::vector<std::vector<Real>> logits(parts);
    for (int64_t block = 0; block < p.image.rows; block += gemm.block_rows) {
        const int64_t in_block = std::min(gemm.block_rows, p.image.rows - block);
        on_threads(parts, [&](int64_t part) { rows->fill(block, in_block, part, parts); });
        on_threads(parts, [&](int64_t part) {
            if (!products[part]) {
                products[part] = gemm.products(*rows, p.text);
                logits[part].resize(sub_rows * gemm.tile_columns);
            }
            for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
                const int64_t column = tile * gemm.tile_columns;
                const int64_t columns = std::min(gemm.tile_columns, p.text.rows - column);
                products[part]->columns(column, columns);
                for (int64_t row = 0; row < in_block; row += sub_rows) {
                    const int64_t count = std::min(sub_rows, in_block - row);
                    Real* kept = p.kept ? p.kept + (block + row) * p.text.rows + column : nullptr;
                    if (p.left)
                        copy_rows(kept, p.text.rows, logits[part].data(), gemm.tile_columns, count, columns);
                    else
                        products[part]->logits(row, count, logits[part].data());
                    if (kept && !p.left)
                        copy_rows(logits[part].data(), gemm.tile_columns, kept, p.text.rows, count, columns);
                    at_tile(Place{part, block, row, tile, column},
                            Tile<Real>{logits[part].data(), count, columns, gemm.tile_columns,
                                       p.first_label + block + row - column},
                            *products[part]);
                }
            }
        });
        after_block(block, in_block);
    }
}

template <class Real>
int64_t parts_for(const Problem<Real>& p) {
    const int64_t columns = choose_gemm<Real>(p.image.dtype).tile_columns;
    const int64_t tiles = (p.text.rows + columns - 1) / columns;
    return std::max<int64_t>(1, std::min<int64_t>(tiles, torch::stable::get_num_threads()));
}

}  // namespace clipfast::cpu
