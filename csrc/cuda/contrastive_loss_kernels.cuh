// Statistics of CLIP's softmax loss and SigLIP's sigmoid loss over all pairs of two sets of features, a tile of logits at
// a time.
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

// What a block keeps in shared memory beside the ring of slabs, which lies behind it.
template <typename T>
struct alignas(16) StatisticsShared {
    Sum<T> rows[3 * kWarpColumns * kTileRows<T>];
    Sum<T> columns[3 * kWarpRows * kTileColumns];
    Sum<T> row_factor[kTileRows<T>];
};

template <typename T>
struct alignas(16) SumsShared {
    Sum<T> rows[kWarpColumns * kTileRows<T>];
    Sum<T> row_factor[kTileRows<T>];
};

// One number a row of the tile, or `otherwise` where there is none. The barrier is the caller's.
template <typename T>
__device__ inline void load_rows(Sum<T>* shared, const Sum<T>* values, int first_row, int rows, Sum<T> otherwise) {
    for (int i = threadIdx.x; i < kTileRows<T>; i += kThreads)
        shared[i] = values && first_row + i < rows ? values[first_row + i] : otherwise;
}

// Whether a tile has rows or columns outside the matrix.
template <typename T>
__device__ inline bool over_the_edge(const Features<T>& f, int first_row, int first_column) {
    return first_row + kTileRows<T> > f.rows || first_column + kTileColumns > f.columns;
}

// -inf marks what lies outside the matrix
template <typename T>
__device__ inline void product_to_logits(
    Product<T>& product, const Features<T>& f, const Sum<T>* row_factor, const Place<T>& place, int first_row,
    int first_column) {
    const Sum<T> scale = *f.scale;
    Sum<T> own[kThreadRows<T>];
#pragma unroll
    for (int r = 0; r < kThreadRows<T>; ++r) own[r] = row_factor[place.row_of(r)];
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
        const int column = first_column + place.column_of(c);
        const Sum<T> factor = scale * (f.text_factor && column < f.columns ? f.text_factor[column] : Sum<T>(1));
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r) product.entries[r][c] = times(product.entries[r][c], factor * own[r]);
    }
    if (over_the_edge(f, first_row, first_column)) {
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c)
#pragma unroll
            for (int r = 0; r < kThreadRows<T>; ++r)
                if (first_column + place.column_of(c) >= f.columns || first_row + place.row_of(r) >= f.rows)
                    product.entries[r][c] = minus_infinity<Sum<T>>();
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
__global__ void __launch_bounds__(kThreads, kBlocks)
    softmax_statistics_kernel(
        Features<T> f, int stages, int first_row, Sum<T>* row_partials, Sum<T>* column_partials, Sum<T>* positive) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<StatisticsShared<T>*>(shared_bytes);
    const Ring ring{shared_bytes + sizeof(shared), stages};
    const int tile_row = first_row + blockIdx.y * kTileRows<T>;
    const Share share(f.columns);

    constexpr int kRowSlots = kWarpColumns * kTileRows<T>, kColumnSlots = kWarpRows * kTileColumns;
    const Statistics<A> empty{minus_infinity<A>(), 0, minus_infinity<A>()};
    for (int slot = threadIdx.x; slot < kRowSlots; slot += kThreads)
        put_statistics(shared.rows, kRowSlots, slot, empty);
    // the barriers of the first tile come before what they are read for
    load_rows<T>(shared.row_factor, f.image_factor, tile_row, f.rows, A(1));

    for_each_tile<T>(ring, f, tile_row, share, [&](int first_column, Product<T>& logits) {
        const Place<T> place;
        product_to_logits<T>(logits, f, shared.row_factor, place, tile_row, first_column);
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
        // a warp's rows have slots of its own, so no barrier is needed; each of the four lanes that share rows keeps a
        // quarter of them
        constexpr int kKept = kThreadRows<T> / 4;
        Statistics<A> kept[kKept];
        const int quarter = place.lane() % 4;
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r) {
            const auto tile = line_statistics<kThreadColumns, 1, 4, A>(
                [&](int c) { return logits.entries[r][c]; }, [&](int c) { return is_label(r, c); }, label_near);
            if (quarter == r / kKept) kept[r % kKept] = tile;
        }
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
            const int slot = place.warp_column() * kTileRows<T> + place.row_of(quarter * kKept + k);
            put_statistics(shared.rows, kRowSlots, slot, joined(statistics_at(shared.rows, kRowSlots, slot), kept[k]));
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
            const int64_t columns = f.columns;
            put_statistics(column_partials, gridDim.y * columns, blockIdx.y * columns + column, all);
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
    const A* partials, int parts, int64_t stride, int lines, A* state, bool first, bool last, A* most, A* rest, A* rival) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lines) return;
    Statistics<A> all{minus_infinity<A>(), 0, minus_infinity<A>()};
    if (!first) all = statistics_at(state, lines, i);
    for (int part = 0; part < parts; ++part)
        all = joined(all, statistics_at(partials, parts * stride, part * stride + i));
    if (last) {
        most[i] = all.max, rest[i] = natural_log(all.sum), rival[i] = all.rival;
    } else {
        put_statistics(state, lines, i, all);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// statistics of the sigmoid loss

// Row partials [gridDim.x, gridDim.y · tile rows].
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sigmoid_statistics_kernel(Features<T> f, int stages, const Sum<T>* bias, int first_row, Sum<T>* row_partials) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<SumsShared<T>*>(shared_bytes);
    const Ring ring{shared_bytes + sizeof(shared), stages};
    const int tile_row = first_row + blockIdx.y * kTileRows<T>;
    const Share share(f.columns);
    for (int slot = threadIdx.x; slot < kWarpColumns * kTileRows<T>; slot += kThreads) shared.rows[slot] = 0;
    load_rows<T>(shared.row_factor, f.image_factor, tile_row, f.rows, A(1));

    for_each_tile<T>(ring, f, tile_row, share, [&](int first_column, Product<T>& logits) {
        const Place<T> place;
        product_to_logits<T>(logits, f, shared.row_factor, place, tile_row, first_column);
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
            // product of their (1 + e^-|w|) less 1, at most 65535, and adds up positive terms alone
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

}  // namespace clipfast
