// The tiles of amx.h in plain loops, for tests: what Intel's manual says that the instructions do, to the bit.
//
// TDPBF16PS: for every row m, two sums a column start at zero, of the even and of the odd terms. Products are added to
// them in the order of k by fused multiply-adds. Their sum is then added to C. Numbers below the normal range count as
// zero, before and after each step; rounding is to nearest even. A tile that was not configured is an invalid opcode.

#include <cstdint>
#include <cstring>

namespace clipfast::cpu {
namespace {

struct TileState {
    TileConfig config;
    bool configured = false;
    uint32_t data[8][16][16];
};
thread_local TileState tile_state;

inline TileState& configured_tiles() {
    if (!tile_state.configured) __builtin_trap();
    return tile_state;
}

inline void configure_tiles(const TileConfig& config) {
    tile_state.config = config;
    tile_state.configured = config.palette == 1;
    std::memset(tile_state.data, 0, sizeof tile_state.data);
}

class Tiles {
public:
    explicit Tiles(const TileConfig& config = {}) { configure_tiles(config); }
    ~Tiles() { tile_state.configured = false; }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

inline float without_denormals(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
// the lower or upper half of a pair
inline float half_of(uint32_t pair, bool upper) {
    const uint32_t bits = upper ? pair & 0xffff0000 : pair << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return without_denormals(x);
}

inline void load_any(int t, const void* p, int64_t stride) {
    TileState& s = configured_tiles();
    std::memset(s.data[t], 0, sizeof s.data[t]);
    for (int r = 0; r < s.config.rows[t]; ++r)
        std::memcpy(s.data[t][r], static_cast<const char*>(p) + r * stride, s.config.bytes[t]);
}

inline void store_any(int t, void* p, int64_t stride) {
    const TileState& s = configured_tiles();
    for (int r = 0; r < s.config.rows[t]; ++r)
        std::memcpy(static_cast<char*>(p) + r * stride, s.data[t][r], s.config.bytes[t]);
}

inline void zero_any(int t) {
    TileState& s = configured_tiles();
    std::memset(s.data[t], 0, sizeof s.data[t]);
}

inline void dot_any(int c, int a, int b) {
    TileState& s = configured_tiles();
    const int rows = s.config.rows[c], columns = s.config.bytes[c] / 4, pairs = s.config.bytes[a] / 4;
    // where the instruction would fault
    if (c == a || c == b || a == b || s.config.rows[a] != rows || s.config.bytes[b] != s.config.bytes[c] ||
        s.config.rows[b] != pairs)
        __builtin_trap();
    for (int m = 0; m < 16; ++m) {
        float sums[16];
        std::memcpy(sums, s.data[c][m], sizeof sums);
        std::memset(s.data[c][m], 0, sizeof s.data[c][m]);
        if (m >= rows) continue;
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < pairs; ++k) {
            const float left = half_of(s.data[a][m][k], false), right = half_of(s.data[a][m][k], true);
            for (int n = 0; n < 16; ++n) {
                even[n] = without_denormals(__builtin_fmaf(left, half_of(s.data[b][k][n], false), even[n]));
                odd[n] = without_denormals(__builtin_fmaf(right, half_of(s.data[b][k][n], true), odd[n]));
            }
        }
        for (int n = 0; n < 16; ++n)
            sums[n] = without_denormals(without_denormals(sums[n]) + without_denormals(even[n] + odd[n]));
        std::memcpy(s.data[c][m], sums, columns * sizeof(float));
    }
}

template <int t>
void load_tile(const void* p, int64_t stride) {
    load_any(t, p, stride);
}
template <int t>
void store_tile(void* p, int64_t stride) {
    store_any(t, p, stride);
}
template <int t>
void zero_tile() {
    zero_any(t);
}
template <int c, int a, int b>
void dot() {
    dot_any(c, a, b);
}

}  // namespace
}  // namespace clipfast::cpu
