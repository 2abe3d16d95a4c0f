// A tile of image · textᵀ at a time: the loads, the product and who holds which entry of it.
//
// A block of 128 threads walks along one row of tiles. Both operands come in slabs of 64 bytes a row through a ring of
// two or three places in shared memory that cp.async fills ahead, also across the end of a tile, so that the next tile's
// first slabs travel while the entries of this one are worked on.
//
// A warp has 64 × 64 entries: what it reads from shared memory for a slab, 8 KB, feeds 64 tensor-core steps. With 64 × 32
// it would be 6 KB for 32 of them, and shared memory would be the bound.
//
// Rows lie 80 bytes apart, so that eight of them in a row, or every second of eight, start in different groups of four
// banks: what ldmatrix and the FMA path read is free of conflicts without a swizzle. What cp.async writes is not quite:
// the 64 bytes of two neighbouring rows share four banks.
#pragma once

#include "instructions.cuh"

namespace clipfast {

constexpr int kThreads = 128;
constexpr int kWarpRows = 2, kWarpColumns = 2;  // the warps of a block, over the tile
constexpr int kThreadColumns = 16;
constexpr int kTileColumns = kWarpColumns * 4 * kThreadColumns;
constexpr int kStages = 3, kFewStages = 2;    // places of the ring: where two blocks find room with three, and elsewhere
constexpr int kBlocks = 2;                    // blocks whose registers fit a multiprocessor
constexpr int kChunk = 16;                    // bytes of one copy
constexpr int kChunks = 4;                    // copies a row and slab
constexpr int kPitch = kChunk * kChunks + 16;  // bytes between rows in shared memory

template <typename T>
constexpr int kThreadRows = Element<T>::thread_rows;
template <typename T>
constexpr int kTileRows = kWarpRows * 8 * kThreadRows<T>;
template <typename T>
constexpr int kSlab = kChunk * kChunks / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kStageBytes = (kTileRows<T> + kTileColumns) * kPitch;

// With fewer rows and columns than this, label arithmetic fits 32 bits, and an offset of as many has no label anywhere.
constexpr int kMaxRows = 1 << 30;

inline int label_offset(int64_t first_label) {
    return static_cast<int>(first_label > kMaxRows ? kMaxRows : first_label < -kMaxRows ? -kMaxRows : first_label);
}

// What every kernel reads. Rows start on 16 bytes, `stride` elements apart, and hold whole slabs: see Padding.
template <typename T>
struct Features {
    const T* image;  // [rows, width]
    const T* text;   // [columns, width]
    int rows, columns, width;
    int64_t image_stride, text_stride;
    const Sum<T>* scale;         // on the device: reading it on the host would wait for the device
    const Sum<T>* image_factor;  // [rows] or null
    const Sum<T>* text_factor;   // [columns] or null
    int first_label;             // row i's label is column i + first_label; see label_offset
};

// The entries of a tile that a thread holds: `thread_rows` rows 8 apart times pairs of columns 8 apart, which is how
// mma.m16n8k16 leaves them. The FMA path keeps to it, so that one epilogue serves both.
template <typename T>
struct Place {
    int row, column;  // the first of each, within the tile

    // the thread and warp that a place belongs to
    __device__ int lane() const { return row % 8 * 4 + column % 8 / 2; }
    __device__ int warp_row() const { return row / (8 * kThreadRows<T>); }
    __device__ int warp_column() const { return column / (4 * kThreadColumns); }

    __device__ Place() {
        const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
        row = warp / kWarpColumns * 8 * kThreadRows<T> + lane / 4;
        column = warp % kWarpColumns * 4 * kThreadColumns + lane % 4 * 2;
    }
    __device__ int row_of(int r) const { return row + 8 * r; }
    __device__ int column_of(int c) const { return column + c / 2 * 8 + c % 2; }
};

// --------------------------------------------------------------------------------------------------------------------
// loads

// What a thread copies of one operand: a chunk of every 32nd of its rows. Addresses are worked out once a tile, and move
// on by a slab. Past the matrix the last row is copied again: no entry of it is used.
template <typename T, int kRows>
struct Copies {
    static constexpr int kStep = kThreads / kChunks, kCount = kRows / kStep;
    const char* sources[kCount];

    __device__ void start(const T* matrix, int64_t stride, int first_row, int rows) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int row = first_row + static_cast<int>(threadIdx.x) / kChunks + i * kStep;
            const int64_t inside = row < rows ? row : rows - 1;
            sources[i] = reinterpret_cast<const char*>(matrix + inside * stride) + threadIdx.x % kChunks * kChunk;
        }
    }
    // `offset` in bytes from where rows start
    __device__ void copy(char* target, int offset) const {
        char* first = target + threadIdx.x / kChunks * kPitch + threadIdx.x % kChunks * kChunk;
#pragma unroll
        for (int i = 0; i < kCount; ++i) cp_async_16(first + i * kStep * kPitch, sources[i] + offset);
    }
};

// --------------------------------------------------------------------------------------------------------------------
// products

template <typename T>
struct Product {
    Sum<T> entries[kThreadRows<T>][kThreadColumns];

    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < kThreadRows<T>; ++r)
#pragma unroll
            for (int c = 0; c < kThreadColumns; ++c) entries[r][c] = 0;
    }

    __device__ void add(const char* stage) {
        if constexpr (Element<T>::tensor_cores) {
            add_by_tensor_cores(stage);
        } else {
            add_by_fma(stage);
        }
    }

private:
    __device__ void add_by_tensor_cores(const char* stage) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        // lanes 0-15 name the rows of an A fragment's left half, 16-31 those of its right half; of a pair of B
        // fragments, lanes 0-7 and 8-15 name the two halves of the first and the others those of the second
        const char* image = stage + (warp / kWarpColumns * 8 * kThreadRows<T> + lane % 16) * kPitch + lane / 16 * kChunk;
        const char* text = stage + (kTileRows<T> + warp % kWarpColumns * 4 * kThreadColumns + lane / 16 * 8 + lane % 8) * kPitch +
                           lane / 8 % 2 * kChunk;
#pragma unroll
        for (int half = 0; half < kChunks / 2; ++half) {
            uint32_t b[kThreadColumns / 4][4];
#pragma unroll
            for (int j = 0; j < kThreadColumns / 4; ++j) ldmatrix_x4(b[j], text + j * 16 * kPitch + half * 2 * kChunk);
#pragma unroll
            for (int i = 0; i < kThreadRows<T> / 2; ++i) {
                uint32_t a[4];
                ldmatrix_x4(a, image + i * 16 * kPitch + half * 2 * kChunk);
#pragma unroll
                for (int j = 0; j < kThreadColumns / 2; ++j)
                    mma_m16n8k16<T>(&entries[2 * i][2 * j], &entries[2 * i + 1][2 * j], a, &b[j / 2][j % 2 * 2]);
            }
        }
    }

    __device__ void add_by_fma(const char* stage) {
        const Place<T> place;
        // two elements at a time: four would not leave registers enough for two blocks on a processor
        constexpr int kPairs = kSlab<T> / 2;
        const char* image = stage + place.row * kPitch;
        const char* text = stage + (kTileRows<T> + place.column) * kPitch;
#pragma unroll 1
        for (int k = 0; k < kPairs; ++k) {
            Pair<T> a[kThreadRows<T>];
#pragma unroll
            for (int r = 0; r < kThreadRows<T>; ++r)
                a[r] = reinterpret_cast<const Pair<T>*>(image + 8 * r * kPitch)[k];
#pragma unroll
            for (int c = 0; c < kThreadColumns; ++c) {
                const Pair<T> b = reinterpret_cast<const Pair<T>*>(text + (c / 2 * 8 + c % 2) * kPitch)[k];
#pragma unroll
                for (int r = 0; r < kThreadRows<T>; ++r) {
                    entries[r][c] += a[r].at[0] * b.at[0];
                    entries[r][c] += a[r].at[1] * b.at[1];
                }
            }
        }
    }
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

// Slabs that are on their way, being read, or done with, kStageBytes apart.
struct Ring {
    char* slabs;
    int stages;
};

// Calls visit(first column, product) for the tiles of a share, in the row of tiles from `first_row` on.
//
// There is one barrier a slab. It says that the slab has arrived for every thread, and that all have done with the
// stage that is filled next. It also separates what two visits leave in shared memory.
template <typename T, typename Visit>
__device__ inline void for_each_tile(Ring ring, const Features<T>& f, int first_row, Share share, Visit visit) {
    constexpr int kSlabBytes = kChunk * kChunks;
    const int row_bytes = f.width * static_cast<int>(sizeof(T)), ring_bytes = ring.stages * kStageBytes<T>;
    Product<T> product;
    product.clear();
    Copies<T, kTileRows<T>> of_image;
    Copies<T, kTileColumns> of_text;
    of_image.start(f.image, f.image_stride, first_row, f.rows);
    of_text.start(f.text, f.text_stride, share.first_column, f.columns);
    int load_column = share.first_column, load_offset = 0;
    const auto load_next = [&](int stage) {
        if (load_column < share.last_column) {
            of_image.copy(ring.slabs + stage, load_offset);
            of_text.copy(ring.slabs + stage + kTileRows<T> * kPitch, load_offset);
            load_offset += kSlabBytes;
            if (load_offset == row_bytes) {
                load_offset = 0, load_column += kTileColumns;
                of_text.start(f.text, f.text_stride, load_column, f.columns);
            }
        }
        // an empty group still counts, so that the wait below can count groups instead of slabs
        cp_async_commit();
    };
    load_next(0);
    if (ring.stages > kFewStages) load_next(kStageBytes<T>);
    int stage = 0;  // in bytes from where the ring starts
    for (int column = share.first_column; column < share.last_column; column += kTileColumns) {
        for (int offset = 0; offset < row_bytes; offset += kSlabBytes) {
            // for all groups but those of the slabs behind this one, of which there are two fewer than places
            if (ring.stages == kFewStages) {
                cp_async_wait<kFewStages - 2>();
            } else {
                cp_async_wait<kStages - 2>();
            }
            __syncthreads();
            load_next((stage == 0 ? ring_bytes : stage) - kStageBytes<T>);
            product.add(ring.slabs + stage);
            stage += kStageBytes<T>;
            if (stage == ring_bytes) stage = 0;
        }
        visit(column, product);
        product.clear();
    }
}

}  // namespace clipfast
