// The contrastive losses on the CPU: row blocks × column tiles, never a B×B matrix.
//
// For every block of image rows, threads share the column tiles of texts. A tile of logits stays in the cache between
// the product that makes it and the products that use it. Columns belong to one thread, so their sums need no lock; rows
// are summed per tile (statistics) or per thread (gradients) and merged in a fixed order: bitwise the same twice for
// the same number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "products.h"
#include "tile.h"

namespace clipfast::cpu {

// the loops of tile.h, compiled for several instruction sets each
#define CLIPFAST_INSTANCES(Real)                                                                                     \
    CLIPFAST_VECTORISED void statistics(const Tile<Real>& t, const Real* a, const Real* g, Real* positive,           \
                                        Real* row_most, Real* row_others, Real* row_rival, Real* col_most,           \
                                        Real* col_others, Real* col_rival, Real* scratch) {                          \
        statistics_(t, a, g, positive, row_most, row_others, row_rival, col_most, col_others, col_rival, scratch);   \
    }                                                                                                                \
    CLIPFAST_VECTORISED double gradient(const Tile<Real>& t, Real s, const Real* f, const Real* g, Lse<Real> row,    \
                                        Lse<Real> col, const Real* u, const Real* v, Real* logit) {                  \
        return gradient_(t, s, f, g, row, col, u, v, logit);                                                         \
    }                                                                                                                \
    CLIPFAST_VECTORISED void sigmoid_statistics(const Tile<Real>& t, Real s, Real b, const Real* f, const Real* g,   \
                                                double* row_loss) {                                                  \
        sigmoid_statistics_(t, s, b, f, g, row_loss);                                                                \
    }                                                                                                                \
    CLIPFAST_VECTORISED double sigmoid_gradient(const Tile<Real>& t, Real s, Real b, const Real* f, const Real* g,   \
                                                const Real* u, Sum* d_bias) {                                        \
        return sigmoid_gradient_(t, s, b, f, g, u, d_bias);                                                          \
    }
CLIPFAST_INSTANCES(float)
CLIPFAST_INSTANCES(double)
#undef CLIPFAST_INSTANCES

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------------------------
// arguments

Matrix matrix_of(const char* op, const char* name, const Tensor& t) {
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
                    products[part]->logits(row, count, logits[part].data());
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

// ---------------------------------------------------------------------------------------------------------------
// statistics

template <class Real>
auto contrastive_statistics_(const Tensor& image, const Problem<Real>& p) {
    const int64_t m = p.image.rows, n = p.text.rows, parts = parts_for(p);
    const Gemm<Real>& gemm = choose_gemm<Real>(p.image.dtype);
    const int64_t tiles = (n + gemm.tile_columns - 1) / gemm.tile_columns, block_rows = std::min(gemm.block_rows, m);
    Tensor row_lse = lse_like<Real>(image, m), col_lse = lse_like<Real>(image, n);
    Tensor positive = vector_like<Real>(image, m), row_rival = vector_like<Real>(image, m);
    Tensor col_rival = vector_like<Real>(image, n);
    Real* positive_of = positive.template mutable_data_ptr<Real>();
    Real* rival_of_column = col_rival.template mutable_data_ptr<Real>();
    std::fill(positive_of, positive_of + m, Real(0));
    std::fill(rival_of_column, rival_of_column + n, lowest<Real>);

    Real* col_most = col_lse.template mutable_data_ptr<Real>();
    Real* col_others = col_most + n;
    std::fill(col_most, col_others, lowest<Real>);
    std::fill(col_others, col_others + n, Real(-1));
    std::vector<Real> a(m), scratch(parts * 2 * gemm.tile_columns);
    for (int64_t i = 0; i < m; ++i) a[i] = p.scale * p.f[i];
    std::vector<Real> most(tiles * block_rows), others(tiles * block_rows), rival(tiles * block_rows);
    walk(
        p, parts,
        [&](const Place& at, const Tile<Real>& tile, Products<Real>&) {
            const int64_t rows = at.tile * block_rows + at.row, first = at.block + at.row;
            statistics(tile, a.data() + first, p.g.data() + at.column, positive_of + first, most.data() + rows,
                       others.data() + rows, rival.data() + rows, col_most + at.column, col_others + at.column,
                       rival_of_column + at.column,
                       scratch.data() + at.part * 2 * gemm.tile_columns);
        },
        [&](int64_t block, int64_t rows) {
            Real* lse = row_lse.template mutable_data_ptr<Real>() + block;
            Real* largest = row_rival.template mutable_data_ptr<Real>() + block;
            for (int64_t r = 0; r < rows; ++r) {
                Running<Real> row;
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t i = tile * block_rows + r;
                    row.merge(most[i], others[i], rival[i]);
                }
                lse[r] = row.most;
                lse[m + r] = std::log1p(row.others);
                largest[r] = row.rival;
            }
        });
    for (int64_t j = 0; j < n; ++j) col_others[j] = std::log1p(col_others[j]);
    return std::make_tuple(row_lse, col_lse, positive, row_rival, col_rival);
}

template <class Real>
Tensor siglip_statistics_(const Tensor& image, const Problem<Real>& p, Real bias) {
    const int64_t m = p.image.rows, parts = parts_for(p);
    const int64_t block_rows = std::min(choose_gemm<Real>(p.image.dtype).block_rows, m);
    Tensor row_loss = vector_like<Real>(image, m);
    std::vector<double> sums(parts * block_rows);
    walk(
        p, parts,
        [&](const Place& at, const Tile<Real>& tile, Products<Real>&) {
            sigmoid_statistics(tile, p.scale, bias, p.f.data() + at.block + at.row, p.g.data() + at.column,
                               sums.data() + at.part * block_rows + at.row);
        },
        [&](int64_t block, int64_t rows) {
            Real* out = row_loss.template mutable_data_ptr<Real>() + block;
            for (int64_t r = 0; r < rows; ++r) {
                double sum = 0;
                for (int64_t part = 0; part < parts; ++part) sum += sums[part * block_rows + r];
                out[r] = Real(sum);
            }
            std::fill(sums.begin(), sums.end(), 0.0);
        });
    return row_loss;
}

// ---------------------------------------------------------------------------------------------------------------
// gradients

template <class Real>
void store(const Real* values, int64_t count, Real scale, Dtype dtype, void* to, int64_t offset) {
    for (int64_t i = 0; i < count; ++i) {
        const Real value = values[i] * scale;
        switch (dtype) {
            case Dtype::float64: static_cast<double*>(to)[offset + i] = double(value); break;
            case Dtype::float32: static_cast<float*>(to)[offset + i] = float(value); break;
            case Dtype::bfloat16: static_cast<uint16_t*>(to)[offset + i] = to_bfloat16(float(value)); break;
            case Dtype::float16: static_cast<uint16_t*>(to)[offset + i] = to_float16(float(value)); break;
        }
    }
}

double total_of(const std::vector<Sum>& parts) {
    Sum total;
    for (const Sum& part : parts) {
        total.add(part.high);
        total.add(part.low);
    }
    return total.value();
}

// Both losses' gradients: `at_tile` turns a tile of products into G, and returns its part of d_scale.
template <class Real, class MakeG>
std::tuple<Tensor, Tensor, double> gradients_(const Tensor& image, const Problem<Real>& p, int64_t parts,
                                              const MakeG& make_g) {
    const int64_t m = p.image.rows, n = p.text.rows, width = p.image.width;
    const int64_t block_rows = std::min(choose_gemm<Real>(p.image.dtype).block_rows, m);
    Tensor d_image = torch::stable::new_empty(image, {m, width});
    // texts' gradients grow in the precision of the sums, in place where they are returned in it
    Tensor sums = torch::stable::new_zeros(image, {n, width}, std::make_optional(scalar_type<Real>));
    Real* of_text = sums.template mutable_data_ptr<Real>();
    std::vector<std::vector<Real>> of_rows(parts);
    std::vector<Sum> d_scale(parts);
    void* out = d_image.mutable_data_ptr();
    walk(
        p, parts,
        [&](const Place& at, const Tile<Real>& tile, Products<Real>& products) {
            if (of_rows[at.part].empty()) of_rows[at.part].resize(block_rows * width);
            d_scale[at.part].add(make_g(at, tile));
            products.gradients(at.row, tile.rows, tile.x, of_rows[at.part].data() + at.row * width,
                               of_text + at.column * width);
        },
        [&](int64_t block, int64_t rows) {
            on_threads(parts, [&](int64_t share) {
                const int64_t begin = rows * share / parts * width, end = rows * (share + 1) / parts * width;
                Real* total = of_rows[0].data();
                for (int64_t part = 1; part < parts; ++part) {
                    Real* more = of_rows[part].data();
                    for (int64_t i = begin; i < end; ++i) total[i] += more[i];
                    std::fill(more + begin, more + end, Real(0));
                }
                store(total + begin, end - begin, p.scale, p.image.dtype, out, block * width + begin);
                std::fill(total + begin, total + end, Real(0));
            });
        });
    const bool in_place = p.text.dtype == Dtype::float32 || p.text.dtype == Dtype::float64;
    Tensor d_text = in_place ? sums : torch::stable::new_empty(image, {n, width});
    void* to = d_text.mutable_data_ptr();
    on_threads(parts, [&](int64_t share) {
        const int64_t begin = n * share / parts * width, end = n * (share + 1) / parts * width;
        store(of_text + begin, end - begin, p.scale, p.text.dtype, to, begin);
    });
    return std::make_tuple(d_image, d_text, total_of(d_scale));
}

template <class Real>
auto contrastive_gradients_(const Tensor& image, const Problem<Real>& p, const Tensor& row_lse, const Tensor& col_lse,
                            const Tensor& row_weight, const Tensor& col_weight) {
    const int64_t m = p.image.rows, n = p.text.rows;
    const auto row = lse_of<Real>(p.op, "row_lse", row_lse, m), col = lse_of<Real>(p.op, "col_lse", col_lse, n);
    const auto u = vector_of<Real>(p.op, "row_weight", row_weight, m);
    const auto v = vector_of<Real>(p.op, "col_weight", col_weight, n);
    const int64_t parts = parts_for(p), columns = choose_gemm<Real>(p.image.dtype).tile_columns;
    std::vector<Real> logits(parts * columns);
    auto [d_image, d_text, d_scale] = gradients_(image, p, parts, [&](const Place& at, const Tile<Real>& tile) {
        const int64_t i = at.block + at.row, j = at.column;
        return gradient(tile, p.scale, p.f.data() + i, p.g.data() + j, row + i, col + j, u.data() + i, v.data() + j,
                        logits.data() + at.part * columns);
    });
    return std::make_tuple(d_image, d_text, scalar_like<Real>(image, d_scale));
}

template <class Real>
auto siglip_gradients_(const Tensor& image, const Problem<Real>& p, Real bias, const Tensor& row_weight) {
    const auto u = vector_of<Real>(p.op, "row_weight", row_weight, p.image.rows);
    const int64_t parts = parts_for(p);
    std::vector<Sum> of_bias(parts);
    auto [d_image, d_text, d_scale] = gradients_(image, p, parts, [&](const Place& at, const Tile<Real>& tile) {
        const int64_t i = at.block + at.row;
        return sigmoid_gradient(tile, p.scale, bias, p.f.data() + i, p.g.data() + at.column, u.data() + i,
                                &of_bias[at.part]);
    });
    return std::make_tuple(d_image, d_text, scalar_like<Real>(image, d_scale), scalar_like<Real>(image, total_of(of_bias)));
}

// ---------------------------------------------------------------------------------------------------------------
// the ops: sums in float64 for float64 features, in float32 for all others

bool in_double(const Tensor& image) { return image.scalar_type() == ScalarType::Double; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_statistics(const Tensor& image, const Tensor& text,
                                                                          const Tensor& logit_scale,
                                                                          std::optional<Tensor> image_factor,
                                                                          std::optional<Tensor> text_factor,
                                                                          int64_t first_label) {
    const auto run = [&](auto real) {
        using Real = decltype(real);
        return contrastive_statistics_<Real>(image, Problem<Real>("contrastive_statistics", image, text, logit_scale,
                                                                  image_factor, text_factor, first_label));
    };
    return in_double(image) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor, Tensor> contrastive_gradients(const Tensor& image, const Tensor& text,
                                                         const Tensor& logit_scale, std::optional<Tensor> image_factor,
                                                         std::optional<Tensor> text_factor, const Tensor& row_lse,
                                                         const Tensor& col_lse, const Tensor& row_weight,
                                                         const Tensor& col_weight, int64_t first_label) {
    const auto run = [&](auto real) {
        using Real = decltype(real);
        return contrastive_gradients_<Real>(image, Problem<Real>("contrastive_gradients", image, text, logit_scale,
                                                                 image_factor, text_factor, first_label),
                                            row_lse, col_lse, row_weight, col_weight);
    };
    return in_double(image) ? run(double()) : run(float());
}

Tensor siglip_statistics(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
                         std::optional<Tensor> image_factor, std::optional<Tensor> text_factor, int64_t first_label) {
    const auto run = [&](auto real) {
        using Real = decltype(real);
        const Problem<Real> p("siglip_statistics", image, text, logit_scale, image_factor, text_factor, first_label);
        return siglip_statistics_<Real>(image, p, vector_of<Real>(p.op, "logit_bias", logit_bias, 1)[0]);
    };
    return in_double(image) ? run(double()) : run(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_gradients(const Tensor& image, const Tensor& text,
                                                            const Tensor& logit_scale, const Tensor& logit_bias,
                                                            std::optional<Tensor> image_factor,
                                                            std::optional<Tensor> text_factor, const Tensor& row_weight,
                                                            int64_t first_label) {
    const auto run = [&](auto real) {
        using Real = decltype(real);
        const Problem<Real> p("siglip_gradients", image, text, logit_scale, image_factor, text_factor, first_label);
        return siglip_gradients_<Real>(image, p, vector_of<Real>(p.op, "logit_bias", logit_bias, 1)[0], row_weight);
    };
    return in_double(image) ? run(double()) : run(float());
}

}  // namespace
}  // namespace clipfast::cpu

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
    m.impl("contrastive_statistics", TORCH_BOX(&clipfast::cpu::contrastive_statistics));
    m.impl("contrastive_gradients", TORCH_BOX(&clipfast::cpu::contrastive_gradients));
    m.impl("siglip_statistics", TORCH_BOX(&clipfast::cpu::siglip_statistics));
    m.impl("siglip_gradients", TORCH_BOX(&clipfast::cpu::siglip_gradients));
}
