// CLIP's softmax loss and SigLIP's sigmoid loss over all pairs of two sets of features, a tile of logits at a time.
//
// No B x B matrix exists. What a block knows after its tiles it leaves as a partial result in a place of its own, and a
// second kernel joins the partial results in a fixed order: no atomics, the same bits every time.
#pragma once

#include "tile_engine.cuh"

namespace clipfast {

// A log-sum-exp under way, and the largest logit beside the label's. Every exponential is taken of a difference to a
// maximum, so that any finite logits are right: a fixed shift underflows at a scale of 100.
template <typename A>
struct Statistics {
    A max, sum, rival;
};

template <typename A>
__device__ inline Statistics<A> joined(const Statistics<A>& a, const Statistics<A>& b) {
    const A max = larger(a.max, b.max);
    // where both are empty, -inf - -inf would be NaN
    const A base = max == minus_infinity<A>() ? A(0) : max;
    return {max, a.sum * exponential(a.max - base) + b.sum * exponential(b.max - base), larger(a.rival, b.rival)};
}

// Fields lie in planes of `size`, so that threads with neighbouring indices touch neighbouring addresses.
template <typename A>
__device__ inline Statistics<A> statistics_at(const A* planes, int64_t size, int64_t i) {
    return {planes[i], planes[size + i], planes[2 * size + i]};
}

template <typename A>
__device__ inline void put_statistics(A* planes, int64_t size, int64_t i, const Statistics<A>& s) {
    planes[i] = s.max, planes[size + i] = s.sum, planes[2 * size + i] = s.rival;
}

template <typename T>
struct StatisticsShared {
    alignas(16) char stages[kStages * kStageBytes<T>];
    Sum<T> rows[3 * kWarpColumns * kTileRows<T>];
    Sum<T> columns[3 * kWarpRows * kTileColumns];
};

template <typename T>
struct SumsShared {
    alignas(16) char stages[kStages * kStageBytes<T>];
    Sum<T> rows[kWarpColumns * kTileRows<T>];  // or one sum a warp, twice
};

// The tiles of one block: blockIdx.y counts rows of tiles from `first_row`, blockIdx.x shares their columns out.
struct Share {
    int first_column, last_column;

    __device__ explicit Share(int columns) {
        // at most 2^23 tiles for 64 blocks: 32 bits hold the products
        const int tiles = (columns + kTileColumns - 1) / kTileColumns, blocks = gridDim.x, block = blockIdx.x;
        first_column = tiles * block / blocks * kTileColumns;
        last_column = tiles * (block + 1) / blocks * kTileColumns;
    }
};

// -inf marks what lies outside the matrix
template <typename T>
__device__ inline void product_to_logits(
    Product<T>& product, const Features<T>& f, const Place<T>& place, int first_row, int first_column) {
    const Sum<T> scale = *f.scale;
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
        const int column = first_column + place.column_of(c);
        const bool inside = column < f.columns;
        const Sum<T> factor = scale * (f.text_factor && inside ? f.text_factor[column] : Sum<T>(1));
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r) {
            const int row = first_row + place.row_of(r);
            const bool present = inside && row < f.rows;
            const Sum<T> own = f.image_factor && present ? f.image_factor[row] : Sum<T>(1);
            product.entries[r][c] = present ? product.entries[r][c] * (factor * own) : minus_infinity<Sum<T>>();
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// statistics of the softmax loss

// One line of a thread's entries (a row or a column of them) with those of the lanes that share it, which differ in the
// bits [kFirst, kLast) of the lane.
template <int kCount, int kFirst, int kLast, typename A, typename Entry, typename IsLabel>
__device__ inline Statistics<A> line_statistics(Entry entry, IsLabel is_label, bool label_near) {
    A max = minus_infinity<A>();
#pragma unroll
    for (int i = 0; i < kCount; ++i) max = larger(max, entry(i));
#pragma unroll
    for (int bit = kFirst; bit < kLast; bit *= 2) max = larger(max, __shfl_xor_sync(~0u, max, bit));
    A rival = max;
    // few tiles hold labels: the others are spared the second maximum
    if (label_near) {
        rival = minus_infinity<A>();
#pragma unroll
        for (int i = 0; i < kCount; ++i) rival = is_label(i) ? rival : larger(rival, entry(i));
#pragma unroll
        for (int bit = kFirst; bit < kLast; bit *= 2) rival = larger(rival, __shfl_xor_sync(~0u, rival, bit));
    }
    const A base = max == minus_infinity<A>() ? A(0) : max;
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exponential(entry(i) - base);
#pragma unroll
    for (int bit = kFirst; bit < kLast; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    return {max, sum, rival};
}

// Row partials [3, gridDim.x, gridDim.y · tile rows], column partials [3, gridDim.y, columns], and positives.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    softmax_statistics_kernel(Features<T> f, int first_row, Sum<T>* row_partials, Sum<T>* column_partials, Sum<T>* positive) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<StatisticsShared<T>*>(shared_bytes);
    const int tile_row = first_row + blockIdx.y * kTileRows<T>;
    const Share share(f.columns);

    constexpr int kRowSlots = kWarpColumns * kTileRows<T>, kColumnSlots = kWarpRows * kTileColumns;
    const Statistics<A> empty{minus_infinity<A>(), 0, minus_infinity<A>()};
    for (int slot = threadIdx.x; slot < kRowSlots; slot += kThreads) put_statistics(shared.rows, kRowSlots, slot, empty);

    for_each_tile<T>(shared.stages, f, tile_row, share.first_column, share.last_column, [&](int first_column, Product<T>& logits) {
        const Place<T> place;
        product_to_logits<T>(logits, f, place, tile_row, first_column);
        // entry (r, c) holds a label where its place beside the thread's first entry makes up that one's distance
        const int ahead = f.first_label + tile_row + place.row - (first_column + place.column);
        const int tile_ahead = f.first_label + tile_row - first_column;
        const bool label_near = tile_ahead > -kTileRows<T> && tile_ahead < kTileColumns;
        const auto is_label = [&](int r, int c) { return ahead + 8 * r == c / 2 * 8 + c % 2; };

        if (label_near) {
#pragma unroll
            for (int r = 0; r < kThreadRows<T>; ++r)
#pragma unroll
                for (int c = 0; c < kThreadColumns; ++c)
                    if (is_label(r, c) && logits.entries[r][c] > minus_infinity<A>())
                        positive[tile_row + place.row_of(r)] = logits.entries[r][c];
        }
        // a warp's rows have slots of its own, kept by the lane that comes first: no barrier is needed
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r) {
            const auto tile = line_statistics<kThreadColumns, 1, 4, A>(
                [&](int c) { return logits.entries[r][c]; }, [&](int c) { return is_label(r, c); }, label_near);
            if (place.lane() % 4 == 0) {
                const int slot = place.warp_column() * kTileRows<T> + place.row_of(r);
                put_statistics(shared.rows, kRowSlots, slot, joined(statistics_at(shared.rows, kRowSlots, slot), tile));
            }
        }
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) {
            const auto tile = line_statistics<kThreadRows<T>, 4, 32, A>(
                [&](int r) { return logits.entries[r][c]; }, [&](int r) { return is_label(r, c); }, label_near);
            if (place.lane() < 4)
                put_statistics(
                    shared.columns, kColumnSlots, place.warp_row() * kTileColumns + place.column_of(c), tile);
        }
        __syncthreads();
        const int column = first_column + threadIdx.x;
        if (threadIdx.x < kTileColumns && column < f.columns) {
            Statistics<A> all = statistics_at(shared.columns, kColumnSlots, threadIdx.x);
            for (int w = 1; w < kWarpRows; ++w)
                all = joined(all, statistics_at(shared.columns, kColumnSlots, w * kTileColumns + threadIdx.x));
            put_statistics(
                column_partials, static_cast<int64_t>(gridDim.y) * f.columns, static_cast<int64_t>(blockIdx.y) * f.columns + column, all);
        }
    });
    // a share holds one tile at least, and the barrier of its last visit came after the rows' slots were written
    for (int row = threadIdx.x; row < kTileRows<T>; row += kThreads) {
        Statistics<A> all = statistics_at(shared.rows, kRowSlots, row);
        for (int w = 1; w < kWarpColumns; ++w)
            all = joined(all, statistics_at(shared.rows, kRowSlots, w * kTileRows<T> + row));
        const int64_t lines = static_cast<int64_t>(gridDim.y) * kTileRows<T>;
        put_statistics(row_partials, gridDim.x * lines, blockIdx.x * lines + blockIdx.y * kTileRows<T> + row, all);
    }
}

// Joins `parts` partial results of every line, [3, parts, stride], with those of the launches before, [3, lines], and
// leaves them there, or in the outputs when `last`.
template <typename A>
__global__ void join_statistics_kernel(
    const A* partials, int parts, int64_t stride, int lines, A* state, bool first, bool last, A* lse, A* rival) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lines) return;
    Statistics<A> all{minus_infinity<A>(), 0, minus_infinity<A>()};
    if (!first) all = statistics_at(state, lines, i);
    for (int part = 0; part < parts; ++part)
        all = joined(all, statistics_at(partials, parts * stride, part * stride + i));
    if (last) {
        lse[i] = all.max + natural_log(all.sum), rival[i] = all.rival;
    } else {
        put_statistics(state, lines, i, all);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// statistics of the sigmoid loss

// Row partials [gridDim.x, gridDim.y · tile rows].
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    sigmoid_statistics_kernel(Features<T> f, const Sum<T>* bias, int first_row, Sum<T>* row_partials) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<SumsShared<T>*>(shared_bytes);
    const int tile_row = first_row + blockIdx.y * kTileRows<T>;
    const Share share(f.columns);
    for (int slot = threadIdx.x; slot < kWarpColumns * kTileRows<T>; slot += kThreads) shared.rows[slot] = 0;

    for_each_tile<T>(shared.stages, f, tile_row, share.first_column, share.last_column, [&](int first_column, Product<T>& logits) {
        const Place<T> place;
        product_to_logits<T>(logits, f, place, tile_row, first_column);
        const int ahead = f.first_label + tile_row + place.row - (first_column + place.column);
        const A offset = *bias;
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r)
#pragma unroll
            for (int c = 0; c < kThreadColumns; ++c) {
                const A logit = logits.entries[r][c] + offset;
                const bool is_label = ahead + 8 * r == c / 2 * 8 + c % 2 && logit > minus_infinity<A>();
                logits.entries[r][c] = is_label ? -logit : logit;
            }
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r) {
            // log(1 + e^w) = max(w, 0) + log(1 + e^-|w|), with one logarithm for a thread's columns: excess is the
            // product of their (1 + e^-|w|) less 1, at most 255, and adds up positive terms alone
            A sum = 0, excess = 0;
#pragma unroll
            for (int c = 0; c < kThreadColumns; ++c) {
                // -inf, outside the matrix, adds nothing to either
                const A wrong = logits.entries[r][c];
                const A small = exponential(-larger(wrong, -wrong));
                sum += larger(wrong, A(0));
                excess += small + excess * small;
            }
            sum += log_one_plus(excess);
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (place.lane() % 4 == 0) shared.rows[place.warp_column() * kTileRows<T> + place.row_of(r)] += sum;
        }
    });
    __syncthreads();
    for (int row = threadIdx.x; row < kTileRows<T>; row += kThreads) {
        A sum = 0;
        for (int w = 0; w < kWarpColumns; ++w) sum += shared.rows[w * kTileRows<T> + row];
        row_partials[(static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kTileRows<T> + row] = sum;
    }
}

template <typename A>
__global__ void join_sums_kernel(const A* partials, int parts, int64_t stride, int lines, A* sums) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lines) return;
    A sum = 0;
    for (int part = 0; part < parts; ++part) sum += partials[part * stride + i];
    sums[i] = sum;
}

// --------------------------------------------------------------------------------------------------------------------
// gradients

// What the gradient of a logit is made of; the sigmoid loss has a bias and no column terms.
template <typename A>
struct LogitGradient {
    const A *row_weight, *column_weight, *row_lse, *column_lse, *bias;
    const A* unit;  // a power of two that brings the largest possible entry near the top of float16's range
};

// Writes unit · G_ij f_i g_j for the rows from `first_row`, row by row `pitch` apart, and leaves the block's sum of
// G_ij f_i g_j (image_i · text_j), and for the sigmoid loss of G_ij, at sums[row of tiles, blockIdx.x].
template <typename T, bool kSigmoid>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) logit_gradient_kernel(
    Features<T> f, LogitGradient<Sum<T>> g, int first_row, T* out, int64_t pitch, Sum<T>* scale_sums, Sum<T>* bias_sums) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<SumsShared<T>*>(shared_bytes);
    const int local_row = blockIdx.y * kTileRows<T>, tile_row = first_row + local_row;
    const Share share(f.columns);
    const A scale = *f.scale, unit = *g.unit;
    A scale_sum = 0, bias_sum = 0;

    for_each_tile<T>(shared.stages, f, tile_row, share.first_column, share.last_column, [&](int first_column, Product<T>& dots) {
        const Place<T> place;
        const int ahead = f.first_label + tile_row + place.row - (first_column + place.column);
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) {
            const int column = first_column + place.column_of(c);
            if (column >= f.columns) continue;
            const A text_factor = f.text_factor ? f.text_factor[column] : A(1);
            const A column_weight = kSigmoid ? A(0) : g.column_weight[column];
            const A column_lse = kSigmoid ? A(0) : g.column_lse[column];
#pragma unroll
            for (int r = 0; r < kThreadRows<T>; ++r) {
                const int row = tile_row + place.row_of(r);
                if (row >= f.rows) continue;
                const bool is_label = ahead + 8 * r == c / 2 * 8 + c % 2;
                const A factor = text_factor * (f.image_factor ? f.image_factor[row] : A(1));
                const A cosine = dots.entries[r][c] * factor, logit = scale * cosine;
                A gradient;
                if constexpr (kSigmoid) {
                    // σ of the wrong sign by the exponential of a number ≤ 0, which cannot overflow
                    const A wrong = is_label ? -(logit + *g.bias) : logit + *g.bias;
                    const A small = exponential(-larger(wrong, -wrong));
                    const A probability = (wrong > 0 ? A(1) : small) / (A(1) + small);
                    gradient = g.row_weight[row] * (is_label ? -probability : probability);
                    bias_sum += gradient;
                } else {
                    const A label = is_label ? A(1) : A(0);
                    gradient = g.row_weight[row] * (exponential(logit - g.row_lse[row]) - label) +
                               column_weight * (exponential(logit - column_lse) - label);
                }
                scale_sum += gradient * cosine;
                out[(local_row + place.row_of(r)) * pitch + column] = rounded<T>(gradient * factor * unit);
            }
        }
    });
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
        scale_sum += __shfl_xor_sync(~0u, scale_sum, bit);
        bias_sum += __shfl_xor_sync(~0u, bias_sum, bit);
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) shared.rows[warp] = scale_sum, shared.rows[kThreads / 32 + warp] = bias_sum;
    __syncthreads();
    if (threadIdx.x < 2) {
        A sum = 0;
        for (int w = 0; w < kThreads / 32; ++w) sum += shared.rows[threadIdx.x * (kThreads / 32) + w];
        A* sums = threadIdx.x == 0 ? scale_sums : bias_sums;
        if (sums) sums[static_cast<int64_t>(tile_row / kTileRows<T>) * gridDim.x + blockIdx.x] = sum;
    }
}

// One block: adds `count` numbers in float64, in a fixed order.
template <typename A>
__global__ void add_up_kernel(const A* numbers, int64_t count, A* sum) {
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    double* sums = reinterpret_cast<double*>(shared_bytes);
    double own = 0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) own += numbers[i];
    sums[threadIdx.x] = own;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *sum = static_cast<A>(sums[0]);
}

// The largest magnitudes of four arrays (null: a constant 1), for the unit of the gradients' entries: weights of 1/(2B)
// would lie among float16's subnormal numbers.
template <typename A>
struct Bounds {
    const A* arrays[4];  // row weights, column weights, image factors, text factors
    int sizes[4];        // 0: absent
};

// One block. |G_ij f_i g_j| is at most (max|u| + max|v|) · max|f| · max|g|; the unit brings that to [2^11, 2^12).
template <typename A>
__global__ void unit_kernel(Bounds<A> bounds, A* unit) {
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    A* shared = reinterpret_cast<A*>(shared_bytes);  // [4, threads]
    for (int which = 0; which < 4; ++which) {
        A own = 0;
        for (int i = threadIdx.x; i < bounds.sizes[which]; i += blockDim.x) {
            const A x = bounds.arrays[which][i];
            own = larger(own, larger(x, -x));
        }
        shared[which * blockDim.x + threadIdx.x] = own;
    }
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int which = 0; which < 4 && static_cast<int>(threadIdx.x) < half; ++which) {
            A* all = shared + which * blockDim.x;
            all[threadIdx.x] = larger(all[threadIdx.x], all[threadIdx.x + half]);
        }
    }
    if (threadIdx.x > 0) return;
    const A factors = (bounds.sizes[2] ? shared[2 * blockDim.x] : A(1)) * (bounds.sizes[3] ? shared[3 * blockDim.x] : A(1));
    const A bound = (shared[0] + shared[blockDim.x]) * factors;
    // its inverse must be a number too
    const bool usable = bound > A(1e-30) && bound < A(1e30);
    *unit = usable ? static_cast<A>(ldexp(1.0, 11 - ilogb(static_cast<double>(bound)))) : A(1);
}

// sum += part
template <typename A>
__global__ void accumulate_kernel(A* sum, const A* part, int64_t count) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) sum[i] += part[i];
}

// out = scale / unit · sum; both may be the same memory
template <typename T>
__global__ void finish_gradient_kernel(T* out, const Sum<T>* sum, int64_t count, const Sum<T>* scale, const Sum<T>* unit) {
    const Sum<T> factor = *scale / *unit;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        out[i] = rounded<T>(sum[i] * factor);
}

}  // namespace clipfast
