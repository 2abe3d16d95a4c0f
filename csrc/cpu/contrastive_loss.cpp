// The contrastive losses on the CPU: row blocks × column tiles, never a B×B matrix.
//
// For every block of image rows, threads share the column tiles of texts. A tile of logits stays in the cache between
// the product that makes it and the products that use it. Columns belong to one thread, so their sums need no lock; rows
// are summed per tile (statistics) or per thread (gradients) and merged in a fixed order: bitwise the same twice for
// the same number of threads.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "contrastive_walk.h"

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
                                                const Real* u, double* row_loss, Sum* d_bias) {                      \
        return sigmoid_gradient_(t, s, b, f, g, u, row_loss, d_bias);                                                \
    }
CLIPFAST_INSTANCES(float)
CLIPFAST_INSTANCES(double)
#undef CLIPFAST_INSTANCES

namespace {

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

// Every row's loss, from what each thread added up over its tiles of a block.
template <class Real>
struct RowLosses {
    int64_t parts, block_rows;
    std::vector<double> sums;
    Tensor losses;

    RowLosses(const Tensor& image, const Problem<Real>& p, int64_t parts)
        : parts(parts),
          block_rows(std::min(choose_gemm<Real>(p.image.dtype).block_rows, p.image.rows)),
          sums(parts * block_rows),
          losses(vector_like<Real>(image, p.image.rows)) {}

    double* at(const Place& place) { return sums.data() + place.part * block_rows + place.row; }

    void put(int64_t block, int64_t rows) {
        Real* out = losses.template mutable_data_ptr<Real>() + block;
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (int64_t part = 0; part < parts; ++part) sum += sums[part * block_rows + r];
            out[r] = Real(sum);
        }
        std::fill(sums.begin(), sums.end(), 0.0);
    }
};

template <class Real>
Tensor siglip_statistics_(const Tensor& image, const Problem<Real>& p, Real bias) {
    const int64_t parts = parts_for(p);
    RowLosses<Real> rows(image, p, parts);
    walk(
        p, parts,
        [&](const Place& at, const Tile<Real>& tile, Products<Real>&) {
            sigmoid_statistics(tile, p.scale, bias, p.f.data() + at.block + at.row, p.g.data() + at.column, rows.at(at));
        },
        [&](int64_t block, int64_t count) { rows.put(block, count); });
    return rows.losses;
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

// Both losses' gradients: `make_g` turns a tile of products into G, and returns its part of d_scale; after_block(first
// row, rows) comes once a block. `wide` ones are in the precision of the sums, others in the features' dtype.
template <class Real, class MakeG, class AfterBlock>
std::tuple<Tensor, Tensor, double> gradients_(const Tensor& image, const Problem<Real>& p, int64_t parts, bool wide,
                                              const MakeG& make_g, const AfterBlock& after_block) {
    const int64_t m = p.image.rows, n = p.text.rows, width = p.image.width;
    const int64_t block_rows = std::min(choose_gemm<Real>(p.image.dtype).block_rows, m);
    const Dtype of_sums = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32, dtype = wide ? of_sums : p.image.dtype;
    const ScalarType of_results = wide ? scalar_type<Real> : image.scalar_type();
    Tensor d_image = torch::stable::new_empty(image, {m, width}, std::make_optional(of_results));
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
            after_block(block, rows);
            on_threads(parts, [&](int64_t share) {
                const int64_t begin = rows * share / parts * width, end = rows * (share + 1) / parts * width;
                Real* total = of_rows[0].data();
                for (int64_t part = 1; part < parts; ++part) {
                    Real* more = of_rows[part].data();
                    for (int64_t i = begin; i < end; ++i) total[i] += more[i];
                    std::fill(more + begin, more + end, Real(0));
                }
                store(total + begin, end - begin, p.scale, dtype, out, block * width + begin);
                std::fill(total + begin, total + end, Real(0));
            });
        });
    Tensor d_text = dtype == of_sums ? sums : torch::stable::new_empty(image, {n, width});
    void* to = d_text.mutable_data_ptr();
    on_threads(parts, [&](int64_t share) {
        const int64_t begin = n * share / parts * width, end = n * (share + 1) / parts * width;
        store(of_text + begin, end - begin, p.scale, dtype, to, begin);
    });
    return std::make_tuple(d_image, d_text, total_of(d_scale));
}

template <class Real>
auto contrastive_gradients_(const Tensor& image, const Problem<Real>& p, const Tensor& row_lse, const Tensor& col_lse,
                            const Tensor& row_weight, const Tensor& col_weight, bool wide) {
    const int64_t m = p.image.rows, n = p.text.rows;
    const auto row = lse_of<Real>(p.op, "row_lse", row_lse, m), col = lse_of<Real>(p.op, "col_lse", col_lse, n);
    const auto u = vector_of<Real>(p.op, "row_weight", row_weight, m);
    const auto v = vector_of<Real>(p.op, "col_weight", col_weight, n);
    const int64_t parts = parts_for(p), columns = choose_gemm<Real>(p.image.dtype).tile_columns;
    std::vector<Real> logits(parts * columns);
    const auto make_g = [&](const Place& at, const Tile<Real>& tile) {
        const int64_t i = at.block + at.row, j = at.column;
        return gradient(tile, p.scale, p.f.data() + i, p.g.data() + j, row + i, col + j, u.data() + i, v.data() + j,
                        logits.data() + at.part * columns);
    };
    auto [d_image, d_text, d_scale] = gradients_(image, p, parts, wide, make_g, [](int64_t, int64_t) {});
    return std::make_tuple(d_image, d_text, scalar_like<Real>(image, d_scale));
}

template <class Real>
auto siglip_gradients_(const Tensor& image, const Problem<Real>& p, Real bias, const Tensor& row_weight, bool wide) {
    const auto u = vector_of<Real>(p.op, "row_weight", row_weight, p.image.rows);
    const int64_t parts = parts_for(p);
    std::vector<Sum> of_bias(parts);
    RowLosses<Real> rows(image, p, parts);
    const auto make_g = [&](const Place& at, const Tile<Real>& tile) {
        const int64_t i = at.block + at.row;
        return sigmoid_gradient(tile, p.scale, bias, p.f.data() + i, p.g.data() + at.column, u.data() + i, rows.at(at),
                                &of_bias[at.part]);
    };
    auto [d_image, d_text, d_scale] = gradients_(
        image, p, parts, wide, make_g, [&](int64_t block, int64_t count) { rows.put(block, count); });
    return std::make_tuple(rows.losses, d_image, d_text, scalar_like<Real>(image, d_scale),
                           scalar_like<Real>(image, total_of(of_bias)));
}

// ---------------------------------------------------------------------------------------------------------------
// the ops: sums in float64 for float64 features, in float32 for all others

// Returns what `f` makes of the checked arguments, which all of the ops share.
template <class F>
auto with_problem(const char* op, const Tensor& image, const Tensor& text, const Tensor& logit_scale,
                  const std::optional<Tensor>& image_factor, const std::optional<Tensor>& text_factor,
                  int64_t first_label, const F& f) {
    const auto run = [&](auto real) {
        return f(Problem<decltype(real)>(op, image, text, logit_scale, image_factor, text_factor, first_label));
    };
    return image.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

template <class Real>
Real bias_of(const Problem<Real>& p, const Tensor& logit_bias) {
    return vector_of<Real>(p.op, "logit_bias", logit_bias, 1)[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_statistics(const Tensor& image, const Tensor& text,
                                                                          const Tensor& logit_scale,
                                                                          std::optional<Tensor> image_factor,
                                                                          std::optional<Tensor> text_factor,
                                                                          int64_t first_label) {
    return with_problem("contrastive_statistics", image, text, logit_scale, image_factor, text_factor, first_label,
                        [&](const auto& p) { return contrastive_statistics_(image, p); });
}

std::tuple<Tensor, Tensor, Tensor> contrastive_gradients(const Tensor& image, const Tensor& text,
                                                         const Tensor& logit_scale, std::optional<Tensor> image_factor,
                                                         std::optional<Tensor> text_factor, const Tensor& row_lse,
                                                         const Tensor& col_lse, const Tensor& row_weight,
                                                         const Tensor& col_weight, int64_t first_label, bool wide) {
    return with_problem("contrastive_gradients", image, text, logit_scale, image_factor, text_factor, first_label,
                        [&](const auto& p) {
                            return contrastive_gradients_(image, p, row_lse, col_lse, row_weight, col_weight, wide);
                        });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_statistics_and_products(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, std::optional<Tensor> image_factor,
    std::optional<Tensor> text_factor, int64_t first_label) {
    const auto run = [&](auto p) {
        using Real = decltype(p.scale);
        Tensor products = torch::stable::new_empty(image, {p.image.rows, p.text.rows},
                                                   std::make_optional(scalar_type<Real>));
        p.kept = products.template mutable_data_ptr<Real>();
        return std::tuple_cat(contrastive_statistics_<Real>(image, p), std::make_tuple(products));
    };
    return with_problem("contrastive_statistics_and_products", image, text, logit_scale, image_factor, text_factor,
                        first_label, run);
}

std::tuple<Tensor, Tensor, Tensor> contrastive_gradients_of_products(
    const Tensor& products, const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    std::optional<Tensor> image_factor, std::optional<Tensor> text_factor, const Tensor& row_lse, const Tensor& col_lse,
    const Tensor& row_weight, const Tensor& col_weight, int64_t first_label, bool wide) {
    const auto run = [&](auto p) {
        using Real = decltype(p.scale);
        STD_TORCH_CHECK(products.scalar_type() == scalar_type<Real> && products.dim() == 2 &&
                            products.size(0) == p.image.rows && products.size(1) == p.text.rows &&
                            products.is_contiguous(),
                        p.op, "(products): expected contiguous [", p.image.rows, ", ", p.text.rows,
                        "] in the precision of the sums");
        // read alone, since `left` is set
        p.kept = const_cast<Real*>(products.template const_data_ptr<Real>());
        p.left = true;
        return contrastive_gradients_<Real>(image, p, row_lse, col_lse, row_weight, col_weight, wide);
    };
    return with_problem("contrastive_gradients_of_products", image, text, logit_scale, image_factor, text_factor,
                        first_label, run);
}

Tensor siglip_statistics(const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
                         std::optional<Tensor> image_factor, std::optional<Tensor> text_factor, int64_t first_label) {
    return with_problem("siglip_statistics", image, text, logit_scale, image_factor, text_factor, first_label,
                        [&](const auto& p) { return siglip_statistics_(image, p, bias_of(p, logit_bias)); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_gradients(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const Tensor& logit_bias,
    std::optional<Tensor> image_factor, std::optional<Tensor> text_factor, const Tensor& row_weight, int64_t first_label,
    bool wide) {
    return with_problem(
        "siglip_gradients", image, text, logit_scale, image_factor, text_factor, first_label,
        [&](const auto& p) { return siglip_gradients_(image, p, bias_of(p, logit_bias), row_weight, wide); });
}

}  // namespace
}  // namespace clipfast::cpu

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
    m.impl("contrastive_statistics", TORCH_BOX(&clipfast::cpu::contrastive_statistics));
    m.impl("contrastive_gradients", TORCH_BOX(&clipfast::cpu::contrastive_gradients));
    m.impl("contrastive_statistics_and_products", TORCH_BOX(&clipfast::cpu::contrastive_statistics_and_products));
    m.impl("contrastive_gradients_of_products", TORCH_BOX(&clipfast::cpu::contrastive_gradients_of_products));
    m.impl("siglip_statistics", TORCH_BOX(&clipfast::cpu::siglip_statistics));
    m.impl("siglip_gradients", TORCH_BOX(&clipfast::cpu::siglip_gradients));
}
