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

// Writes unit · G_ij f_i g_j for the rows from `first_row`, row by row `pitch` apart, and leaves the block's sum of
// G_ij f_i g_j (image_i · text_j), and for the sigmoid loss of G_ij, at sums[row of tiles, blockIdx.x].
template <typename T, bool kSigmoid>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) logit_gradient_kernel(
    Features<T> f, int stages, LogitGradient<Sum<T>> g, int first_row, T* out, int64_t pitch, Sum<T>* scale_sums,
    Sum<T>* bias_sums) {
    using A = Sum<T>;
    CLIPFAST_DYNAMIC_SHARED(shared_bytes);
    auto& shared = *reinterpret_cast<SumsShared<T>*>(shared_bytes);
    const Ring ring{shared_bytes + sizeof(shared), stages};
    const int local_row = blockIdx.y * kTileRows<T>, tile_row = first_row + local_row;
    const Share share(f.columns);
    const A scale = *f.scale, unit = *g.unit;
    A scale_sum = 0, bias_sum = 0;

    for_each_tile<T>(ring, f, tile_row, share, [&](int first_column, Product<T>& dots) {
        const Place<T> place;
        const int ahead = f.first_label + tile_row + place.row - (first_column + place.column);
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) {
            const int column = first_column + place.column_of(c);
            if (column >= f.columns) continue;
            const A text_factor = f.text_factor ? f.text_factor[column] : A(1);
            const A column_weight = kSigmoid ? A(0) : g.column_weight[column];
            const A column_most = kSigmoid ? A(0) : g.column_lse.most[column];
            const A column_rest = kSigmoid ? A(0) : g.column_lse.rest[column];
#pragma unroll
            for (int r = 0; r < kThreadRows<T>; ++r) {
                const int row = tile_row + place.row_of(r);
                if (row >= f.rows) continue;
                const bool is_label = ahead + 8 * r == c / 2 * 8 + c % 2;
                const A own = f.image_factor ? f.image_factor[row] : A(1), factor = text_factor * own;
                const A product = dots.entries[r][c], cosine = product * factor;
                // in the very bits of the statistics, or a learned pair's difference from its maximum is lost
                const A logit = times(product, scale * text_factor * own);
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
                    const A of_row = exponential(logit - g.row_lse.most[row] - g.row_lse.rest[row]);
                    const A of_column = exponential(logit - column_most - column_rest);
                    gradient = g.row_weight[row] * (of_row - label) + column_weight * (of_column - label);
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
