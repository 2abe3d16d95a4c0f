// Runs AMX's instructions on a CPU without them: a handler of SIGILL decodes the one that was met, and software tiles do it.
//
// So the machine code of the kernels is what runs. A CPU with AMX never comes here.

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#define CLIPFAST_SOFTWARE_TILES 1
#include "cpu/amx.h"

namespace clipfast::cpu {

const char* amx_unavailable() { return nullptr; }

namespace {

struct sigaction before;
int64_t executed;

// registers by their numbers in instructions
constexpr int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// Intel's manual, volume 2, chapter 2: VEX's three bytes, opcode, ModRM, SIB, displacement. False for all other
// instructions.
bool execute(greg_t* state) {
    const auto* at = reinterpret_cast<const uint8_t*>(state[REG_RIP]);
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) return false;  // map 0F38, W0, 128 bits
    const int prefix = at[2] & 3, third = ~at[2] >> 3 & 15, opcode = at[3];
    const int mode = at[4] >> 6, reg = at[4] >> 3 & 7, low = at[4] & 7;
    const int more_index = at[1] & 0x40 ? 0 : 8, more_base = at[1] & 0x20 ? 0 : 8;
    int length = 5;
    char* address = nullptr;
    int64_t stride = 0;
    if (mode != 3) {
        int base = low;
        if (low == 4) {
            const int sib = at[length++], index = (sib >> 3 & 7) + more_index;
            base = sib & 7;
            if (index != 4) stride = int64_t(state[registers[index]]) << (sib >> 6);
        }
        const bool nothing = mode == 0 && base == 5;  // a displacement from the next instruction, or from zero
        int64_t place = nothing ? 0 : state[registers[base + more_base]];
        if (mode == 1) place += int8_t(at[length++]);
        if (mode == 2 || nothing) {
            int32_t displacement;
            std::memcpy(&displacement, at + length, sizeof displacement);
            place += displacement;
            length += 4;
        }
        if (nothing && low == 5) place += state[REG_RIP] + length;
        address = reinterpret_cast<char*>(place);
    }
    enum { none, p66, f3, f2 };
    if (opcode == 0x49 && prefix == none && mode != 3 && reg == 0) {  // LDTILECFG
        TileConfig config;
        std::memcpy(&config, address, sizeof config);
        configure_tiles(config);
    } else if (opcode == 0x49 && prefix == none && at[4] == 0xc0) {  // TILERELEASE
        tile_state.configured = false;
    } else if (opcode == 0x49 && prefix == f2 && mode == 3) {  // TILEZERO
        zero_any(reg);
    } else if (opcode == 0x4b && prefix == f2 && mode != 3 && low == 4) {  // TILELOADD
        load_any(reg, address, stride);
    } else if (opcode == 0x4b && prefix == f3 && mode != 3 && low == 4) {  // TILESTORED
        store_any(reg, address, stride);
    } else if (opcode == 0x5c && prefix == f3 && mode == 3) {  // TDPBF16PS
        dot_any(reg, low, third);
    } else {
        return false;
    }
    state[REG_RIP] += length;
    ++executed;
    return true;
}

void on_illegal(int, siginfo_t*, void* context) {
    // what is none of AMX's meets whoever was there before, again
    if (!execute(static_cast<ucontext_t*>(context)->uc_mcontext.gregs)) sigaction(SIGILL, &before, nullptr);
}

}  // namespace
}  // namespace clipfast::cpu

extern "C" {

void begin_emulation() {
    using namespace clipfast::cpu;
    struct sigaction ours = {};
    ours.sa_sigaction = on_illegal;
    ours.sa_flags = SA_SIGINFO;
    executed = 0;
    sigaction(SIGILL, &ours, &before);
}

// the instructions that were met since
int64_t end_emulation() {
    using namespace clipfast::cpu;
    sigaction(SIGILL, &before, nullptr);
    return executed;
}

}  // extern "C"
