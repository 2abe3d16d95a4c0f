// Runs CUDA kernels on the CPU, for tests: every thread of a block is a fibre, and barriers, shuffles and the
// instructions of a warp are where fibres take turns. A thread runs on as far as it can before the next one starts, so
// what a missing barrier would let it read too early is not there yet. cp.async copies when it is waited for, not
// before, and shared memory starts as NaN.
//
// One block runs at a time. Races between blocks, memory order and speed are out of sight.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define CLIPFAST_DYNAMIC_SHARED(name) char* name = shim::shared.data()
#define CLIPFAST_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
    shim::launch(grid, threads, bytes, [=] { kernel(__VA_ARGS__); })

struct dim3 {
    unsigned x, y, z;
    dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = int;

namespace shim {

enum class Waiting { no, for_warp, for_block };

struct Copy {
    void* target;
    const void* source;
    int bytes;
};

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
    bool done;
    Waiting waiting;
    char published[64];                    // what the other lanes of the warp may read
    std::deque<std::vector<Copy>> copies;  // groups of cp.async; the last is open
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline unsigned current, threads;
inline std::function<void()> body;
inline std::vector<char> shared;

inline void pause(Waiting why) {
    Fibre& own = fibres[current];
    own.waiting = why;
    swapcontext(&own.context, &scheduler);
}

inline void enter() {
    body();
    fibres[current].done = true;
    swapcontext(&fibres[current].context, &scheduler);
}

// lets go those of [first, last) that are left, if all of them wait for the same
inline bool release(unsigned first, unsigned last, Waiting why) {
    bool any = false;
    for (unsigned i = first; i < last; ++i) {
        if (fibres[i].done) continue;
        if (fibres[i].waiting != why) return false;
        any = true;
    }
    for (unsigned i = first; i < last; ++i) fibres[i].waiting = Waiting::no;
    return any;
}

inline void run_block() {
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& fibre = fibres[i];
        fibre.done = false, fibre.waiting = Waiting::no, fibre.copies.assign(1, {});
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data(), fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
        for (current = 0; current < threads; ++current) {
            if (fibres[current].done || fibres[current].waiting != Waiting::no) continue;
            threadIdx = dim3(current);
            swapcontext(&scheduler, &fibres[current].context);
            left -= fibres[current].done;
        }
        bool moves = release(0, threads, Waiting::for_block);
        for (unsigned warp = 0; warp < threads; warp += 32)
            moves |= release(warp, warp + 32 < threads ? warp + 32 : threads, Waiting::for_warp);
        if (!moves && left > 0) throw std::runtime_error("threads wait for each other at different places");
    }
}

template <typename Body>
void launch(dim3 grid, int block, size_t bytes, Body run) {
    gridDim = grid, blockDim = dim3(block), threads = block, body = run;
    if (fibres.size() < threads) fibres.resize(threads);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            shared.assign(bytes, static_cast<char>(0xff));
            blockIdx = dim3(x, y);
            run_block();
        }
}

// Shows `value` to the warp, then reads `use(lane → the value that it showed)`.
template <typename Value, typename Use>
auto exchange(const Value& value, Use use) {
    static_assert(sizeof(Value) <= sizeof(Fibre::published));
    std::memcpy(fibres[current].published, &value, sizeof(Value));
    pause(Waiting::for_warp);
    const auto of_lane = [warp = current & ~31u](int lane) {
        Value other;
        std::memcpy(&other, fibres[warp + lane].published, sizeof(Value));
        return other;
    };
    const auto result = use(of_lane);
    pause(Waiting::for_warp);
    return result;
}

}  // namespace shim

inline void __syncthreads() { shim::pause(shim::Waiting::for_block); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, [&](auto of_lane) { return of_lane((shim::current % 32) ^ mask); });
}

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit numbers

struct __nv_bfloat16 {
    uint16_t bits;
    explicit operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};
struct __half {
    _Float16 value;
    explicit operator float() const { return static_cast<float>(value); }
};
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

// ---------------------------------------------------------------------------------------------------------------------
// instructions, after the PTX manual's pictures of which lane holds what

namespace clipfast {

inline int thread_index() { return threadIdx.x; }

inline void cp_async_16(void* shared, const void* global, int bytes) {
    shim::fibres[shim::current].copies.back().push_back({shared, global, bytes});
}

inline void cp_async_commit() { shim::fibres[shim::current].copies.emplace_back(); }

template <size_t kPending>
void cp_async_wait() {
    auto& groups = shim::fibres[shim::current].copies;
    for (; groups.size() > kPending + 1; groups.pop_front())
        for (const shim::Copy& copy : groups.front()) {
            if (reinterpret_cast<uintptr_t>(copy.source) % 16 || reinterpret_cast<uintptr_t>(copy.target) % 16)
                throw std::runtime_error("cp.async of 16 bytes that are not aligned");
            std::memset(copy.target, 0, 16);
            std::memcpy(copy.target, copy.source, copy.bytes);
        }
}

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
    const int lane = shim::current % 32;
    shim::exchange(row, [&](auto of_lane) {
        for (int m = 0; m < 4; ++m)
            std::memcpy(&fragment[m], static_cast<const char*>(of_lane(8 * m + lane / 4)) + lane % 4 * 4, 4);
        return 0;
    });
}

template <typename T>
void mma_m16n8k16(float* upper, float* lower, const uint32_t* a, const uint32_t* b) {
    struct Fragments {
        T a[4][2], b[2][2];
    } own;
    std::memcpy(own.a, a, sizeof(own.a)), std::memcpy(own.b, b, sizeof(own.b));
    const int lane = shim::current % 32;
    shim::exchange(own, [&](auto of_lane) {
        for (int k = 0; k < 16; ++k) {
            const int holder = k % 8 / 2, right = k / 8;  // of column k of A and of row k of B
            const Fragments of_a = of_lane(lane / 4 * 4 + holder);
            for (int c = 0; c < 2; ++c) {
                const float y = static_cast<float>(of_lane((lane % 4 * 2 + c) * 4 + holder).b[right][k % 2]);
                upper[c] += static_cast<float>(of_a.a[2 * right][k % 2]) * y;
                lower[c] += static_cast<float>(of_a.a[2 * right + 1][k % 2]) * y;
            }
        }
        return 0;
    });
}

template <typename Kernel>
void allow_shared(Kernel, const char*, int) {}

}  // namespace clipfast
