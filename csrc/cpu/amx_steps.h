// A block of 32 × 32 sums on AMX: two tiles of the left factor and two of the right one make four of products.
//
// The left factor lies in tiles [16 rows][32 terms], a kilobyte in one piece each. The right one lies in the panels of
// register_tile.h, [terms / 2][32 columns] pairs, whose halves are what the instruction wants. Include this after register_tile.h.

#include "amx.h"

namespace clipfast::cpu {
namespace {

constexpr int64_t tile_height = 16, tile_terms = 32, tile_elements = tile_height * tile_terms;

}  // namespace
}  // namespace clipfast::cpu

#if CLIPFAST_HAS_TILES

namespace clipfast::cpu {
namespace {

constexpr int64_t panel_bytes = panel * sizeof(uint32_t);  // a row of pairs of a panel, of which a tile takes half
constexpr int64_t ahead = 4;  // steps whose left tiles are asked for before they are needed: 5 to 10% on a Xeon

// Tiles of the left factor: the first one, and how many elements on the ones of the next rows and of the next terms lie
struct Left {
    const uint16_t* tile;
    int64_t rows, step;
};

inline void fetch(const uint16_t* tile) {
    for (int64_t line = 0; line < tile_height; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(tile + line * tile_terms), _MM_HINT_T0);
}

// Tiles 0 and 1, for `both` tiles of rows also 2 and 3, += A · 32 columns of B over `count` steps of 32 terms. `next` is
// what A goes on with: it is fetched, never read.
template <bool both>
inline void steps(const Left& a, const uint32_t* b, int64_t count, const uint16_t* next) {
    for (int64_t k = 0; k < count; ++k) {
        const uint16_t* soon = k + ahead < count ? a.tile + (k + ahead) * a.step : next + (k + ahead - count) * a.step;
        fetch(soon);
        if constexpr (both) fetch(soon + a.rows);
        const uint32_t* pairs = b + k * (tile_terms / 2) * panel;
        load_tile<4>(a.tile + k * a.step, tile_terms * sizeof(uint16_t));
        load_tile<6>(pairs, panel_bytes);
        load_tile<7>(pairs + panel / 2, panel_bytes);
        dot<0, 4, 6>();
        dot<1, 4, 7>();
        if constexpr (both) {
            load_tile<5>(a.tile + a.rows + k * a.step, tile_terms * sizeof(uint16_t));
            dot<2, 5, 6>();
            dot<3, 5, 7>();
        }
    }
}

template <bool both>
inline void zero_sums() {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (both) {
        zero_tile<2>();
        zero_tile<3>();
    }
}

// from and to float32 rows, `row` numbers apart
template <bool both>
inline void load_sums(const float* c, int64_t row) {
    const int64_t bytes = row * sizeof(float);
    load_tile<0>(c, bytes);
    load_tile<1>(c + 16, bytes);
    if constexpr (both) {
        load_tile<2>(c + tile_height * row, bytes);
        load_tile<3>(c + tile_height * row + 16, bytes);
    }
}

template <bool both>
inline void store_sums(float* c, int64_t row) {
    const int64_t bytes = row * sizeof(float);
    store_tile<0>(c, bytes);
    store_tile<1>(c + 16, bytes);
    if constexpr (both) {
        store_tile<2>(c + tile_height * row, bytes);
        store_tile<3>(c + tile_height * row + 16, bytes);
    }
}

}  // namespace
}  // namespace clipfast::cpu

#endif
