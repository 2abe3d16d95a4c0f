// How the kernels are launched: grids, scratch memory and the order in which partial results are joined.
//
// Nothing here waits for the device or reads from it, so CUDA graphs can capture all of it.
#pragma once

#include "contrastive_loss_gradient_kernels.cuh"

namespace clipfast {

constexpr int kMaxShares = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks that share the columns of one row of tiles: the number with which a launch is over soonest, when all blocks of a
// wave run as long as the longest, and the fewest of those. Four blocks for each multiprocessor, rounded up, were 576
// where 264 find room: three waves, the last almost empty.
inline int shares_of(int64_t row_tiles, int64_t columns, int multiprocessors) {
    const int64_t room = static_cast<int64_t>(kBlocks) * multiprocessors, tiles = ceil_div(columns, kTileColumns);
    const int64_t most = smaller(tiles, kMaxShares);
    int64_t best = 1, least = INT64_MAX;
    for (int64_t shares = 1; shares <= most; ++shares) {
        const int64_t time = ceil_div(row_tiles * shares, room) * ceil_div(tiles, shares);
        if (time < least) best = shares, least = time;
    }
    return static_cast<int>(best);
}

// Rows go to the kernels as they are where each starts on 16 bytes and holds whole slabs. Others are copied once, with
// zeros behind them: so no load asks where a row ends.
template <typename T>
struct Padding {
    static int width(int64_t width) { return static_cast<int>(ceil_div(width, kSlab<T>) * kSlab<T>); }
    static bool is_needed(const T* matrix, int64_t rows, int64_t width, int64_t stride) {
        return width % kSlab<T> != 0 || reinterpret_cast<uintptr_t>(matrix) % kChunk != 0 ||
               (rows > 1 && stride * static_cast<int64_t>(sizeof(T)) % kChunk != 0);
    }
};

// A device's shared memory in bytes: a multiprocessor's, the most that a block may ask for, and what the system takes of
// each block's.
struct SharedMemory {
    int multiprocessor, block, reserved;
};

// Slabs in a kernel's ring: three where the blocks that its registers leave room for fit beside each other, else two.
// Compute capabilities 8.6, 8.9 and 12.x have 100 KB a multiprocessor, where two blocks of two slabs fit and of three
// do not; a second block should hide more of the waiting than a third slab would (not measured).
template <typename T>
int ring_stages(int64_t kept, SharedMemory shared) {
    const int64_t bytes = kept + kStages * kStageBytes<T>;
    const bool fits = bytes <= shared.block && kBlocks * (bytes + shared.reserved) <= shared.multiprocessor;
    return fits ? kStages : kFewStages;
}

// Statistics go by groups of rows: a column has one partial result for each row of tiles in a group, which would be
// O(B²) in all, so a group holds no more of them than 32 MB.
struct StatisticsPlan {
    int group;  // rows of tiles in a launch
    int shares;
    int stages = kStages;

    template <typename T>
    static StatisticsPlan make(const Features<T>& f, int multiprocessors, SharedMemory shared) {
        const int64_t tiles = ceil_div(f.rows, kTileRows<T>);
        const int64_t fit = (32 << 20) / (3 * static_cast<int64_t>(sizeof(Sum<T>)) * f.columns);
        const int64_t most = fit < 8 ? 8 : fit > 64 ? 64 : fit;
        const int group = static_cast<int>(ceil_div(tiles, ceil_div(tiles, most)));
        // the sigmoid loss's kernel keeps less and runs with the same ring
        const int stages = ring_stages<T>(sizeof(StatisticsShared<T>), shared);
        return {group, shares_of(group, f.columns, multiprocessors), stages};
    }

    // scratch, in numbers: row partials and state, column partials and state
    template <typename T>
    int64_t row_numbers() const {
        return 3 * static_cast<int64_t>(shares) * group * kTileRows<T>;
    }
    template <typename T>
    int64_t softmax_numbers(const Features<T>& f) const {
        return row_numbers<T>() + 3 * static_cast<int64_t>(group + 1) * f.columns;
    }
};

template <typename A>
struct SoftmaxStatistics {
    A *row_lse, *column_lse, *positive, *row_rival, *column_rival;
};

template <typename T>
void launch_softmax_statistics(
    const Features<T>& f, StatisticsPlan plan, Sum<T>* scratch, SoftmaxStatistics<Sum<T>> out, cudaStream_t stream) {
    using A = Sum<T>;
    A* row_partials = scratch;
    A* column_partials = row_partials + plan.row_numbers<T>();
    A* column_state = column_partials + 3 * static_cast<int64_t>(plan.group) * f.columns;
    auto kernel = softmax_statistics_kernel<T>;
    const int shared = sizeof(StatisticsShared<T>) + plan.stages * kStageBytes<T>;
    allow_shared(kernel, "softmax_statistics_kernel", shared);
    for (int64_t row = 0; row < f.rows; row += static_cast<int64_t>(plan.group) * kTileRows<T>) {
        const int64_t left = ceil_div(f.rows - row, kTileRows<T>);
        const int tiles = static_cast<int>(left < plan.group ? left : plan.group);
        const int64_t lines = static_cast<int64_t>(tiles) * kTileRows<T>;
        const int rows = static_cast<int>(f.rows - row < lines ? f.rows - row : lines);
        CLIPFAST_LAUNCH(
            kernel, dim3(plan.shares, tiles), kThreads, shared, stream, f, plan.stages, static_cast<int>(row),
            row_partials, column_partials, out.positive);
        CLIPFAST_LAUNCH(
            join_statistics_kernel<A>, dim3(ceil_div(rows, kThreads)), kThreads, 0, stream, row_partials, plan.shares,
            lines, rows, static_cast<A*>(nullptr), true, true, out.row_lse + row, out.row_lse + f.rows + row,
            out.row_rival + row);
        CLIPFAST_LAUNCH(
            join_statistics_kernel<A>, dim3(ceil_div(f.columns, kThreads)), kThreads, 0, stream, column_partials, tiles,
            static_cast<int64_t>(f.columns), f.columns, column_state, row == 0, row + rows == f.rows, out.column_lse,
            out.column_lse + f.columns, out.column_rival);
    }
}

// twice: the same groups of tiles as above, of another kernel with other partial sums to join
template <typename T>
void launch_sigmoid_statistics(
    const Features<T>& f, const Sum<T>* bias, StatisticsPlan plan, Sum<T>* scratch, Sum<T>* row_loss,
    cudaStream_t stream) {
    using A = Sum<T>;
    auto kernel = sigmoid_statistics_kernel<T>;
    const int shared = sizeof(SumsShared<T>) + plan.stages * kStageBytes<T>;
    allow_shared(kernel, "sigmoid_statistics_kernel", shared);
    for (int64_t row = 0; row < f.rows; row += static_cast<int64_t>(plan.group) * kTileRows<T>) {
        const int64_t left = ceil_div(f.rows - row, kTileRows<T>);
        const int tiles = static_cast<int>(left < plan.group ? left : plan.group);
        const int64_t lines = static_cast<int64_t>(tiles) * kTileRows<T>;
        const int rows = static_cast<int>(f.rows - row < lines ? f.rows - row : lines);
        CLIPFAST_LAUNCH(
            kernel, dim3(plan.shares, tiles), kThreads, shared, stream, f, plan.stages, bias, static_cast<int>(row),
            scratch);
        CLIPFAST_LAUNCH(
            join_sums_kernel<A>, dim3(ceil_div(rows, kThreads)), kThreads, 0, stream, scratch, plan.shares, lines, rows,
            row_loss + row);
    }
}

// Gradients go by chunks of rows, whose logits' gradients [chunk, columns] are handed to matrix products. A chunk has as
// many bytes as a float32 gradient of the text or 32 MB, and at least 4,096 rows in 16 bits: every further chunk reads
// and writes the sums of d_text once more, 12 · columns · width bytes, and shorter products run at a lower rate.
struct GradientPlan {
    int64_t chunk;  // rows, a multiple of the tile's
    int64_t pitch;  // elements between rows: products run best where rows start on 16 bytes
    int shares;
    int64_t text_block;  // rows of the text whose float32 product of one chunk is held at a time
    int stages = kStages;

    template <typename T>
    static GradientPlan make(const Features<T>& f, int multiprocessors, SharedMemory shared) {
        constexpr int64_t size = sizeof(T);
        const int64_t pitch = ceil_div(f.columns, kChunk / size) * (kChunk / size);
        const int64_t floor = 32 << 20, wide = 4 * static_cast<int64_t>(f.columns) * f.width;
        const int64_t fit = (wide > floor ? wide : floor) / (pitch * size), least = 4096 * 2 / size;
        const int64_t tiles = ceil_div(f.rows, kTileRows<T>), most = (fit > least ? fit : least) / kTileRows<T>;
        // chunks of one length
        const int64_t chunk_tiles = ceil_div(tiles, ceil_div(tiles, most));
        // 16 MB, which stay in a cache of 40 and more
        const int64_t fit_text = (16 << 20) / (static_cast<int64_t>(sizeof(Sum<T>)) * f.width);
        return {
            chunk_tiles * kTileRows<T>, pitch, shares_of(chunk_tiles, f.columns, multiprocessors),
            smaller(f.columns, fit_text > 4096 ? fit_text : 4096), ring_stages<T>(sizeof(GradientShared<T>), shared)};
    }

    template <typename T>
    int64_t sums(const Features<T>& f) const {
        return ceil_div(f.rows, kTileRows<T>) * shares;
    }
    // scratch of the sigmoid loss's rows, in numbers
    int64_t row_numbers() const { return chunk * shares; }
};

template <typename T>
void launch_unit(
    const Features<T>& f, const Sum<T>* row_weight, const Sum<T>* column_weight, Sum<T>* unit, cudaStream_t stream) {
    using A = Sum<T>;
    const Bounds<A> bounds{
        {row_weight, column_weight, f.image_factor, f.text_factor},
        {f.rows, column_weight ? f.columns : 0, f.image_factor ? f.rows : 0, f.text_factor ? f.columns : 0}};
    CLIPFAST_LAUNCH(unit_kernel<A>, dim3(1), 1024, 4 * 1024 * sizeof(A), stream, bounds, unit);
}

// The rows [row, row + rows) of the logits' gradient; sums are [rows of tiles in all, shares]. The sigmoid loss of these
// rows goes to row_loss; the partials' has room for plan.row_numbers().
template <typename T, bool kSigmoid>
void launch_logit_gradient(
    const Features<T>& f, const LogitGradient<Sum<T>>& g, const GradientPlan& plan, int64_t row, int64_t rows, T* out,
    GradientPartials<Sum<T>> partials, Sum<T>* row_loss, cudaStream_t stream) {
    auto kernel = logit_gradient_kernel<T, kSigmoid>;
    const int shared = sizeof(GradientShared<T>) + plan.stages * kStageBytes<T>;
    allow_shared(kernel, "logit_gradient_kernel", shared);
    const int64_t tiles = ceil_div(rows, kTileRows<T>);
    CLIPFAST_LAUNCH(
        kernel, dim3(plan.shares, tiles), kThreads, shared, stream, f, plan.stages, g, static_cast<int>(row), out,
        plan.pitch, partials);
    if constexpr (kSigmoid) {
        CLIPFAST_LAUNCH(
            join_sums_kernel<Sum<T>>, dim3(ceil_div(rows, kThreads)), kThreads, 0, stream, partials.row_loss, plan.shares,
            tiles * kTileRows<T>, static_cast<int>(rows), row_loss + row);
    }
}

template <typename A>
void launch_add_up(const A* numbers, int64_t count, A* sum, cudaStream_t stream) {
    CLIPFAST_LAUNCH(add_up_kernel<A>, dim3(1), 512, 512 * sizeof(double), stream, numbers, count, sum);
}

inline dim3 grid_for(int64_t count) {
    return dim3(static_cast<unsigned>(smaller(ceil_div(count, kThreads), 8192)));
}

template <typename A>
void launch_accumulate(A* sum, const A* part, int64_t count, cudaStream_t stream) {
    CLIPFAST_LAUNCH(accumulate_kernel<A>, grid_for(count), kThreads, 0, stream, sum, part, count);
}

template <typename Out, typename A>
void launch_finish_gradient(Out* out, const A* sum, int64_t count, const A* scale, const A* unit, cudaStream_t stream) {
    auto kernel = finish_gradient_kernel<Out, A>;
    CLIPFAST_LAUNCH(kernel, grid_for(count), kThreads, 0, stream, out, sum, count, scale, unit);
}

template <typename T>
void launch_pad_rows(
    T* out, int width, const T* in, int64_t stride, int in_width, int64_t rows, cudaStream_t stream) {
    CLIPFAST_LAUNCH(
        pad_rows_kernel<T>, grid_for(rows * width), kThreads, 0, stream, out, width, in, stride, in_width, rows);
}

}  // namespace clipfast
