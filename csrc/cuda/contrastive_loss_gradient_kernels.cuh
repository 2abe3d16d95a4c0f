// Gradients of both losses: of the logits a chunk of rows at a time, for matrix products to use, and of the scalars.
#pragma once

#include "contrastive_loss_kernels.cuh"

namespace clipfast {

// Log-sum-exps in two parts: the largest logit, and the logarithm of the sum of exponentials beside it.
template <typename A>
struct Lse {
    const A *most, *rest;
};

// What the gradient of a logit is made of; the sigmoid loss has a bias and no column terms.
template <typename A>
struct LogitGradient {
    const A *row_weight, *column_weight, *bias;
    Lse<A> row_lse, column_lse;
    const A* unit;  // a power of two that brings the largest possible entry near the top of float16's range
};

// What a block keeps in shared memory beside the ring of slabs: the numbers that belong to the rows of its tiles, read
// once, and to the columns of this tile.
template <typename T>
struct alignas(16) GradientShared {
    Sum<T> row_most[kTileRows<T>], row_rest[kTileRows<T>], row_weight[kTileRows<T>], row_factor[kTileRows<T>];
    Sum<T> column_most[kTileColumns], column_rest[kTileColumns], column_weight[kTileColumns], column_factor[kTileColumns];
    Sum<T> row_loss[kWarpColumns * kTileRows<T>];  // the sigmoid loss's
    Sum<T> sums[2 * kThreads / 32];
};

// What a thread adds up over its tiles.
template <typename A>
struct GradientSums {
    A scale = 0, bias = 0;
};

// One tile: products become unit · G_ij f_i g_j at `out`, where the thread's first entry lies. `kCareful` tiles have a
// label in them, or rows or columns outside the matrix; the others are spared the questions.
template <typename T, bool kSigmoid, bool kCareful>
__device__ inline void put_gradients(
    const Product<T>& dots, const Features<T>& f, const LogitGradient<Sum<T>>& g, GradientShared<T>& shared,
    const Place<T>& place, int tile_row, int first_column, T* out, int64_t pitch, GradientSums<Sum<T>>& sums) {
    using A = Sum<T>;
    constexpr int kRows = kThreadRows<T>;
    const A scale = *f.scale, unit = *g.unit, bias = kSigmoid ? *g.bias : A(0);
    const int ahead = f.first_label + tile_row + place.row - (first_column + place.column);
    A most[kRows], rest[kRows], weight[kRows], factor[kRows], loss[kRows], excess[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int row = place.row_of(r);
        weight[r] = shared.row_weight[row], factor[r] = shared.row_factor[row];
        if constexpr (kSigmoid) {
            loss[r] = 0, excess[r] = 0;
        } else {
            most[r] = shared.row_most[row], rest[r] = shared.row_rest[row];
        }
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; c += 2) {
        const int column = place.column_of(c);
        // entries of neighbouring columns, which are stored together
        Pair<A> column_most{}, column_rest{}, column_weight{};
        const Pair<A> column_factor = pair_at(shared.column_factor + column);
        if constexpr (!kSigmoid) {
            column_most = pair_at(shared.column_most + column), column_rest = pair_at(shared.column_rest + column);
            column_weight = pair_at(shared.column_weight + column);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            A entries[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                entries[i] = 0;
                const bool is_label = kCareful && ahead + 8 * r == (c + i) / 2 * 8 + (c + i) % 2;
                if (kCareful && (tile_row + place.row_of(r) >= f.rows || first_column + column + i >= f.columns)) continue;
                const A product = dots.entries[r][c + i], of_column = column_factor.at[i];
                // in the very bits of the statistics, or a learned pair's difference from its maximum is lost
                const A logit = times(product, (scale * of_column) * factor[r]);
                A gradient;
                if constexpr (kSigmoid) {
                    // σ of the wrong sign by the exponential of a number ≤ 0, which cannot overflow; and
                    // log(1 + e^w) = max(w, 0) + log(1 + e^-|w|), with one logarithm for a thread's columns, as in the
                    // statistics
                    const A wrong = is_label ? -(logit + bias) : logit + bias;
                    const A small = exponential(-larger(wrong, -wrong));
                    const A probability = quotient(wrong > 0 ? A(1) : small, A(1) + small);
                    loss[r] += larger(wrong, A(0));
                    excess[r] += small + excess[r] * small;
                    gradient = weight[r] * (is_label ? -probability : probability);
                    sums.bias += gradient;
                } else {
                    const A of_row = exponential(logit - most[r] - rest[r]);
                    const A of_both = exponential(logit - column_most.at[i] - column_rest.at[i]);
                    const A label = is_label ? A(1) : A(0);
                    gradient = weight[r] * (of_row - label) + column_weight.at[i] * (of_both - label);
                }
                entries[i] = gradient * (of_column * factor[r]);
                sums.scale += entries[i] * product;
            }
            T* to = out + 8 * r * pitch + c / 2 * 8;
            if (!kCareful || (tile_row + place.row_of(r) < f.rows && first_column + column + 1 < f.columns)) {
                put_pair(to, entries[0] * unit, entries[1] * unit);
            } else if (tile_row + place.row_of(r) < f.rows && first_column + column < f.columns) {
                *to = rounded<T>(entries[0] * unit);
            }
        }
    }
    if constexpr (kSigmoid) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            A sum = loss[r] + log_one_plus(excess[r]);
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (place.lane() % 4 == 0) shared.row_loss[place.warp_column() * kTileRows<T> + place.row_of(r)] += sum;
        }
    }
}

// What a gradient's kernel leaves beside the logits' gradients: a block's sums at [row of tiles, blockIdx.x], and the
// sigmoid loss's rows [gridDim.x, gridDim.y · tile rows].
template <typename A>
struct GradientPartials {
    A *scale_sums, *bias_sums, *row_loss;
};

// Writes unit · G_ij f_i g_j for the rows from `first_row`, row by row `pitch` apart, and adds up
// G_ij f_i g_j (image_i · text_j), and for the sigmoid loss G_ij and the rows' losses.
template <typename T, bool kSigmoid>
__global__ void __launch_bounds__(kThreads, kBlocks) logit_gradient_kernel(
    Features<T> f, int stages, LogitGradient<Sum<T>> g, int first_row, T* out, int64_t pitch,
    GradientPartials<Sum<T>> partials) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<GradientShared<T>*>(shared_bytes);
    const Ring ring{shared_bytes + sizeof(shared), stages};
    const int local_row = blockIdx.y * kTileRows<T>, tile_row = first_row + local_row;
    const Share share(f.columns);
    GradientSums<A> sums;
    // the barriers of the first tile come before what they are read for
    load_rows<T>(shared.row_weight, g.row_weight, tile_row, f.rows, A(0));
    load_rows<T>(shared.row_factor, f.image_factor, tile_row, f.rows, A(1));
    if constexpr (kSigmoid) {
        for (int i = threadIdx.x; i < kWarpColumns * kTileRows<T>; i += kThreads) shared.row_loss[i] = 0;
    } else {
        load_rows<T>(shared.row_most, g.row_lse.most, tile_row, f.rows, A(0));
        load_rows<T>(shared.row_rest, g.row_lse.rest, tile_row, f.rows, A(0));
    }

    for_each_tile<T>(ring, f, tile_row, share, [&](int first_column, Product<T>& dots) {
        for (int i = threadIdx.x; i < kTileColumns; i += kThreads) {
            const int column = first_column + i < f.columns ? first_column + i : f.columns - 1;
            shared.column_factor[i] = f.text_factor ? f.text_factor[column] : A(1);
            if constexpr (!kSigmoid) {
                shared.column_most[i] = g.column_lse.most[column], shared.column_rest[i] = g.column_lse.rest[column];
                shared.column_weight[i] = g.column_weight[column];
            }
        }
        __syncthreads();
        const Place<T> place;
        const int tile_ahead = f.first_label + tile_row - first_column;
        const bool label_near = tile_ahead > -kTileRows<T> && tile_ahead < kTileColumns;
        T* to = out + (local_row + place.row) * pitch + first_column + place.column;
        // products by FMA take so long that questions do not count, and with both loops registers run out
        if (!Element<T>::tensor_cores || label_near || over_the_edge(f, tile_row, first_column)) {
            put_gradients<T, kSigmoid, true>(dots, f, g, shared, place, tile_row, first_column, to, pitch, sums);
        } else {
            put_gradients<T, kSigmoid, false>(dots, f, g, shared, place, tile_row, first_column, to, pitch, sums);
        }
    });
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
        sums.scale += __shfl_xor_sync(~0u, sums.scale, bit);
        sums.bias += __shfl_xor_sync(~0u, sums.bias, bit);
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) shared.sums[warp] = sums.scale, shared.sums[kThreads / 32 + warp] = sums.bias;
    __syncthreads();
    if (threadIdx.x < 2) {
        A sum = 0;
        for (int w = 0; w < kThreads / 32; ++w) sum += shared.sums[threadIdx.x * (kThreads / 32) + w];
        A* all = threadIdx.x == 0 ? partials.scale_sums : partials.bias_sums;
        if (all) all[static_cast<int64_t>(tile_row / kTileRows<T>) * gridDim.x + blockIdx.x] = sum;
    }
    if constexpr (kSigmoid) {
        for (int row = threadIdx.x; row < kTileRows<T>; row += kThreads) {
            A sum = 0;
            for (int w = 0; w < kWarpColumns; ++w) sum += shared.row_loss[w * kTileRows<T> + row];
            const int64_t line = (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kTileRows<T> + row;
            partials.row_loss[line] = sum;
        }
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

// out = scale / unit · sum, in the features' dtype or that of sums; both may be the same memory
template <typename Out, typename A>
__global__ void finish_gradient_kernel(Out* out, const A* sum, int64_t count, const A* scale, const A* unit) {
    const A factor = *scale / *unit;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        out[i] = rounded<Out>(sum[i] * factor);
}

// out [rows, width] = in [rows, in_width], `stride` elements apart, and zeros behind
template <typename T>
__global__ void pad_rows_kernel(T* out, int width, const T* in, int64_t stride, int in_width, int64_t rows) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, count = rows * width;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const int64_t row = i / width;
        const int k = static_cast<int>(i - row * width);
        out[i] = k < in_width ? in[row * stride + k] : rounded<T>(0);
    }
}

}  // namespace clipfast
