// Runs CUDA kernels on the CPU, for tests: every thread of a block is a fibre, and barriers, shuffles and the
// instructions of a warp are where fibres take turns. A warp runs on as far as it can before the next one starts, so
// what a missing barrier would let it read too early is not there yet, and what it would write too early overwrites
// what others still need. Hardware may copy (cp.async) at any time until it is waited for, and run warps in any order:
// a test chooses between the latest with the first warp first, and at once with the last warp first. Shared memory
// starts as NaN.
//
// What a card would leave undefined is an error here: a lane of a warp that is missing at an instruction of the whole
// warp, or stands at another one; an address that is not aligned, or not in shared memory.
//
// One block runs at a time. Races between blocks, memory order and speed are out of sight.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
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
};

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 << 10);
    bool done;
    Waiting waiting;
    int line;                              // of the source, where it waits
    const char* what;                      // it waits at
    unsigned turn;                         // instructions of the warp so far
    char published[2][64];                 // what the other lanes may read, in even and odd turns
    std::deque<std::vector<Copy>> copies;  // groups of cp.async; the last is open
};

// The operands of an mma, put together from all lanes; in even and odd turns, so that no lane fills them anew before
// all have read them.
struct Operands {
    float a[16][16], b[16][8];
};
struct Warp {
    Operands of_turn[2];
};

inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline unsigned current, threads;
inline std::function<void()> body;
inline std::vector<char> shared;
inline std::exception_ptr failure;  // of a fibre: what it throws cannot leave its stack
inline bool hasty = false;          // whether cp.async copies at once, and the last warp comes first
inline int mistake = -1;            // which of the mistakes that a test has put in is made

inline std::runtime_error error(const std::string& what) {
    return std::runtime_error(what + " (thread " + std::to_string(current) + ")");
}

inline void pause(Waiting why, const char* what, int line) {
    Fibre& own = fibres[current];
    own.waiting = why, own.what = what, own.line = line;
    swapcontext(&own.context, &scheduler);
}

inline void enter() {
    try {
        body();
    } catch (...) {
        failure = std::current_exception();
    }
    fibres[current].done = true;
    swapcontext(&fibres[current].context, &scheduler);
}

// Lets go the threads [first, last) if all of them wait for the same. Threads that are done take no part in a barrier;
// an instruction of a warp needs all 32.
inline bool release(unsigned first, unsigned last, Waiting why) {
    const Fibre* one = nullptr;
    bool all = true;
    for (unsigned i = first; i < last; ++i) {
        const Fibre& fibre = fibres[i];
        if (fibre.done) {
            all = false;
            continue;
        }
        if (fibre.waiting != why) return false;
        if (one && (fibre.what != one->what || fibre.line != one->line))
            throw std::runtime_error(
                std::string("threads diverge: one is at ") + one->what + " in line " + std::to_string(one->line) +
                ", another at " + fibre.what + " in line " + std::to_string(fibre.line));
        one = &fibre;
    }
    if (!one) return false;
    if (why == Waiting::for_warp && (!all || last - first < 32))
        throw std::runtime_error(
            std::string("lanes are missing at ") + one->what + " in line " + std::to_string(one->line));
    for (unsigned i = first; i < last; ++i) fibres[i].waiting = Waiting::no;
    return true;
}

inline void run_block() {
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& fibre = fibres[i];
        fibre.done = false, fibre.waiting = Waiting::no, fibre.turn = 0, fibre.copies.assign(1, {});
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data(), fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
    }
    failure = nullptr;
    const unsigned count = (threads + 31) / 32;
    for (unsigned left = threads; left > 0;) {
        bool moves = false;
        for (unsigned i = 0; i < count; ++i) {
            const unsigned first = 32 * (hasty ? count - 1 - i : i), last = first + 32 < threads ? first + 32 : threads;
            do {
                for (current = first; current < last; ++current) {
                    if (fibres[current].done || fibres[current].waiting != Waiting::no) continue;
                    threadIdx = dim3(current), moves = true;
                    swapcontext(&scheduler, &fibres[current].context);
                    if (failure) std::rethrow_exception(failure);
                    left -= fibres[current].done;
                }
            } while (release(first, last, Waiting::for_warp));
        }
        moves |= release(0, threads, Waiting::for_block);
        if (!moves) throw std::runtime_error("threads wait for each other at different places");
    }
}

template <typename Body>
void launch(dim3 grid, int block, size_t bytes, Body run) {
    gridDim = grid, blockDim = dim3(block), threads = block, body = run;
    if (fibres.size() < threads) fibres.resize(threads), warps.resize((threads + 31) / 32);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            shared.assign(bytes, static_cast<char>(0xff));
            blockIdx = dim3(x, y);
            run_block();
        }
}

// Shows `value` to the warp; returns lane → the value that it showed, until the next but one instruction of the warp.
template <typename Value>
auto exchange(const Value& value, const char* what, int line) {
    static_assert(sizeof(Value) <= sizeof(Fibre::published[0]));
    const unsigned turn = fibres[current].turn++ % 2;
    std::memcpy(fibres[current].published[turn], &value, sizeof(Value));
    pause(Waiting::for_warp, what, line);
    return [warp = current & ~31u, turn](int lane) {
        Value other;
        std::memcpy(&other, fibres[warp + lane].published[turn], sizeof(Value));
        return other;
    };
}

// throws unless [pointer, pointer + 16) starts on 16 bytes and lies in shared memory
inline void check_shared_16(const void* pointer, const char* what) {
    const char* p = static_cast<const char*>(pointer);
    if (reinterpret_cast<uintptr_t>(p) % 16) throw error(std::string(what) + ": the address is no multiple of 16");
    if (p < shared.data() || p + 16 > shared.data() + shared.size())
        throw error(std::string(what) + ": the address is outside shared memory");
}

}  // namespace shim

inline void __syncthreads(int line = __builtin_LINE()) { shim::pause(shim::Waiting::for_block, "a barrier", line); }

template <typename T>
T __shfl_xor_sync(unsigned members, T value, int mask, int line = __builtin_LINE()) {
    if (members != ~0u) throw shim::error("a shuffle of fewer than 32 lanes");
    return shim::exchange(value, "a shuffle", line)((shim::current % 32) ^ mask);
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
// the fragments of a warp, in the words of the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point type",
// "ldmatrix"): `i` counts the 16-bit elements in the registers of A and B, each register's lower half first, and the
// registers of C and D

namespace ptx {

inline int group_id(int lane) { return lane >> 2; }        // groupID
inline int thread_in_group(int lane) { return lane % 4; }  // threadID_in_group

// A [16, 16], a0 … a7
inline int a_row(int lane, int i) {
    return (0 <= i && i < 2) || (4 <= i && i < 6) ? group_id(lane) : group_id(lane) + 8;
}
inline int a_column(int lane, int i) {
    return i < 4 ? thread_in_group(lane) * 2 + (i & 1) : thread_in_group(lane) * 2 + (i & 1) + 8;
}

// B [16, 8], b0 … b3
inline int b_row(int lane, int i) {
    return i < 2 ? thread_in_group(lane) * 2 + (i & 1) : thread_in_group(lane) * 2 + (i & 1) + 8;
}
inline int b_column(int lane, int) { return group_id(lane); }

// C and D [16, 8], c0 … c3
inline int c_row(int lane, int i) { return i < 2 ? group_id(lane) : group_id(lane) + 8; }
inline int c_column(int lane, int i) { return thread_in_group(lane) * 2 + (i & 1); }

// ldmatrix.x4: which thread gives the address of a row of a matrix, and which row and bytes of it a thread receives
inline int address_thread(int matrix, int row) { return 8 * matrix + row; }
inline int loaded_row(int lane) { return lane / 4; }
inline int loaded_byte(int lane) { return 2 * (2 * (lane % 4)); }

}  // namespace ptx

namespace clipfast {

inline int thread_index() { return threadIdx.x; }

// cp.async.cg.shared.global [shared], [global], 16: both addresses on 16 bytes
inline void copy_16(const shim::Copy& copy) { std::memcpy(copy.target, copy.source, 16); }

inline void cp_async_16(void* shared, const void* global) {
    const shim::Copy copy{shared, global};
    shim::check_shared_16(shared, "cp.async");
    if (reinterpret_cast<uintptr_t>(global) % 16) throw shim::error("cp.async: the source is no multiple of 16");
    if (shim::hasty) return copy_16(copy);
    shim::fibres[shim::current].copies.back().push_back(copy);
}

inline void cp_async_commit() { shim::fibres[shim::current].copies.emplace_back(); }

// cp.async.wait_group N: waits until at most the N groups that this thread committed last are under way
template <size_t kPending>
void cp_async_wait() {
    auto& groups = shim::fibres[shim::current].copies;
    for (; groups.size() > kPending + 1; groups.pop_front())  // the open group is none yet
        for (const shim::Copy& copy : groups.front()) copy_16(copy);
}

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, int line = __builtin_LINE()) {
    shim::check_shared_16(row, "ldmatrix");
    const auto of_lane = shim::exchange(row, "ldmatrix", line);
    const int lane = shim::current % 32;
    for (int m = 0; m < 4; ++m) {
        const void* address = of_lane(ptx::address_thread(m, ptx::loaded_row(lane)));
        std::memcpy(&fragment[m], static_cast<const char*>(address) + ptx::loaded_byte(lane), 4);
    }
}

// D = A · B + C, with c0, c1 in `upper` and c2, c3 in `lower`
template <typename T>
void mma_m16n8k16(float* upper, float* lower, const uint32_t* a, const uint32_t* b, int line = __builtin_LINE()) {
    T of_a[8], of_b[4];
    std::memcpy(of_a, a, sizeof(of_a)), std::memcpy(of_b, b, sizeof(of_b));
    const int lane = shim::current % 32;
    shim::Operands& all = shim::warps[shim::current / 32].of_turn[shim::fibres[shim::current].turn++ % 2];
    for (int i = 0; i < 8; ++i) all.a[ptx::a_row(lane, i)][ptx::a_column(lane, i)] = static_cast<float>(of_a[i]);
    for (int i = 0; i < 4; ++i) all.b[ptx::b_row(lane, i)][ptx::b_column(lane, i)] = static_cast<float>(of_b[i]);
    shim::pause(shim::Waiting::for_warp, "mma", line);
    for (int i = 0; i < 4; ++i) {
        float& c = i < 2 ? upper[i] : lower[i - 2];
        for (int k = 0; k < 16; ++k) c += all.a[ptx::c_row(lane, i)][k] * all.b[k][ptx::c_column(lane, i)];
    }
}

template <typename Kernel>
void allow_shared(Kernel, const char*, int) {}

}  // namespace clipfast
