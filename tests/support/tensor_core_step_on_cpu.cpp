// The tile engine's products, and single instructions of a warp, for the CPU under the fibre shim.
//
// Arrays come as addresses. Each function returns null, or what went wrong.
#define CLIPFAST_FIBRE_SHIM
#include "cuda/tile_engine.cuh"

#include <string>

using namespace clipfast;

namespace {

constexpr int kLanes = 32;

// [rows, columns] = image · textᵀ, in whole tiles
template <typename T>
__global__ void product_kernel(Features<T> f, float* out, int64_t pitch, int stages) {
    CLIPFAST_DYNAMIC_SHARED(slabs);
    const int first_row = blockIdx.y * kTileRows<T>;
    for_each_tile<T>(Ring{slabs, stages}, f, first_row, Share(f.columns), [&](int first_column, Product<T>& product) {
        const Place<T> place;
        for (int r = 0; r < kThreadRows<T>; ++r)
            for (int c = 0; c < kThreadColumns; ++c)
                out[(first_row + place.row_of(r)) * pitch + first_column + place.column_of(c)] = product.entries[r][c];
    });
}

template <typename Run>
const char* guarded(Run run) {
    static std::string message;
    try {
        run();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

template <typename T>
const char* product(const void* image, const void* text, float* out, int64_t rows, int64_t columns, int64_t width,
                    int64_t stride, int64_t pitch, int64_t shares, int64_t stages, int64_t hasty) {
    return guarded([&] {
        Features<T> f{};
        f.image = static_cast<const T*>(image), f.text = static_cast<const T*>(text);
        f.rows = rows, f.columns = columns, f.width = width;
        f.image_stride = f.text_stride = stride;
        shim::hasty = hasty;
        const dim3 grid(shares, (rows + kTileRows<T> - 1) / kTileRows<T>);
        CLIPFAST_LAUNCH(product_kernel<T>, grid, kThreads, stages * kStageBytes<T>, 0, f, out, pitch, stages);
    });
}

template <typename T>
const char* mma(const uint32_t* a, const uint32_t* b, float* c) {
    return guarded([&] {
        shim::launch(dim3(1), kLanes, 0, [=] {
            const int lane = threadIdx.x;
            mma_m16n8k16<T>(c + 4 * lane, c + 4 * lane + 2, a + 4 * lane, b + 2 * lane);
        });
    });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT product_bfloat16(const void* image, const void* text, float* out, int64_t rows, int64_t columns, int64_t width,
                        int64_t stride, int64_t pitch, int64_t shares, int64_t stages, int64_t hasty) {
    return product<__nv_bfloat16>(image, text, out, rows, columns, width, stride, pitch, shares, stages, hasty);
}

EXPORT product_float16(const void* image, const void* text, float* out, int64_t rows, int64_t columns, int64_t width,
                       int64_t stride, int64_t pitch, int64_t shares, int64_t stages, int64_t hasty) {
    return product<__half>(image, text, out, rows, columns, width, stride, pitch, shares, stages, hasty);
}

EXPORT tile(int32_t* rows_and_columns) {
    rows_and_columns[0] = kTileRows<__nv_bfloat16>, rows_and_columns[1] = kTileColumns;
    return nullptr;
}

EXPORT mma_bfloat16(const uint32_t* a, const uint32_t* b, float* c) { return mma<__nv_bfloat16>(a, b, c); }
EXPORT mma_float16(const uint32_t* a, const uint32_t* b, float* c) { return mma<__half>(a, b, c); }

// registers [32, 4] of what lies in shared memory, each lane giving the address at its offset
EXPORT ldmatrix(const char* memory, int64_t bytes, const int32_t* offsets, uint32_t* registers) {
    return guarded([&] {
        shim::launch(dim3(1), kLanes, bytes, [=] {
            CLIPFAST_DYNAMIC_SHARED(shared);
            const int lane = threadIdx.x;
            if (lane == 0) std::memcpy(shared, memory, bytes);
            __syncthreads();
            uint32_t fragment[4];
            ldmatrix_x4(fragment, shared + offsets[lane]);
            std::memcpy(registers + 4 * lane, fragment, sizeof(fragment));
        });
    });
}

// Four copies, a group each, from 0, 16, 32 and 48 on; `seen` is shared memory [5, 64] after waits for
// at most 4, 3, 2, 1 and 0 groups. `source_shift` and `target_shift` move the addresses.
EXPORT copies(const char* source, char* seen, int64_t source_shift, int64_t target_shift, int64_t hasty) {
    return guarded([&] {
        shim::hasty = hasty;
        shim::launch(dim3(1), 1, 64, [=] {
            CLIPFAST_DYNAMIC_SHARED(shared);
            for (int i = 0; i < 4; ++i) {
                cp_async_16(shared + 16 * i + target_shift, source + 16 * i + source_shift);
                cp_async_commit();
            }
            const auto look = [&](int i) { std::memcpy(seen + 64 * i, shared, 64); };
            cp_async_wait<4>(), look(0);
            cp_async_wait<3>(), look(1);
            cp_async_wait<2>(), look(2);
            cp_async_wait<1>(), look(3);
            cp_async_wait<0>(), look(4);
        });
    });
}

// What lanes may not do. 0: nothing wrong; 1: one lane has left before ldmatrix; 2: one skips it and meets the others
// at a barrier; 3: half are at an ldmatrix, half at another; 4: half at ldmatrix, half at mma; 5: one leaves before
// mma; 6: a warp of 31 lanes; 7: a lane leaves a loop of ldmatrix one turn earlier
EXPORT diverge(int64_t how) {
    return guarded([&] {
        shim::launch(dim3(1), how == 6 ? kLanes - 1 : kLanes, 32 * 16, [=] {
            CLIPFAST_DYNAMIC_SHARED(shared);
            const int lane = threadIdx.x;
            uint32_t fragment[4] = {};
            float sums[4] = {};
            const char* row = shared + 16 * lane;
            if (how == 1 && lane == 7) return;
            if (how == 3 && lane < 16) {
                ldmatrix_x4(fragment, row);
            } else if (how == 4 && lane < 16) {
                mma_m16n8k16<__half>(sums, sums + 2, fragment, fragment);
            } else if (how != 2 || lane != 7) {
                for (int turn = 0; turn < (how == 7 && lane == 7 ? 2 : 3); ++turn) ldmatrix_x4(fragment, row);
            }
            __syncthreads();
            if (how == 5 && lane == 31) return;
            mma_m16n8k16<__half>(sums, sums + 2, fragment, fragment);
        });
    });
}
