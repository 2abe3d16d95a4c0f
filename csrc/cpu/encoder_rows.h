// What the encoder's kernels have in common, whatever multiplies: rows that are loaded, stored, normed and packed, softmax,
// and attention of one query. Included by encoder_kernels.h and encoder_amx.cpp between the pragmas that allow the
// instructions, after register_tile.h; CLIPFAST_TILE_ORDER is 1 where activations lie in tile order (encoder.h).

namespace clipfast::cpu {
namespace {

#if CLIPFAST_BFLOAT16
using Element = uint16_t;
#else
using Element = float;
#endif
constexpr int64_t terms_a_unit = sizeof(uint32_t) / sizeof(Element);

inline float as_float(Element x) {
#if CLIPFAST_BFLOAT16
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof(y));
    return y;
#else
    return x;
#endif
}

const uint32_t* units_at(const void* p, int64_t element) {
    return reinterpret_cast<const uint32_t*>(static_cast<const Element*>(p) + element);
}

#if CLIPFAST_BFLOAT16
inline void store(Element* p, Lanes x) { store(p, first_lanes(lanes), x); }
#endif

// run(then, gelu) with a product's kind as constants of the compiler
template <class Run>
void for_kind(const Product& p, const Run& run) {
    using Then = Product::Then;
    const auto with = [&](auto gelu) { run(std::integral_constant<Then, Then::gelu>(), gelu); };
    const std::integral_constant<Gelu, Gelu::none> none;
    if (p.then == Then::add) return run(std::integral_constant<Then, Then::add>(), none);
    if (p.then == Then::store) return run(std::integral_constant<Then, Then::store>(), none);
    switch (p.gelu) {
        case Gelu::none: return with(none);
        case Gelu::tanh: return with(std::integral_constant<Gelu, Gelu::tanh>());
        case Gelu::quick: return with(std::integral_constant<Gelu, Gelu::quick>());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// activations

#if CLIPFAST_TILE_ORDER
inline int64_t activation_elements(int64_t rows, int64_t width) {
    return round_up(rows, 2 * tile_height) * round_up(width, tile_terms);
}
inline int64_t activation_at(int64_t width, int64_t row, int64_t column) {
    const int64_t tile = row / tile_height * (round_up(width, tile_terms) / tile_terms) + column / tile_terms;
    return tile * tile_height * tile_terms + row % tile_height * tile_terms + column % tile_terms;
}
#else
inline int64_t activation_elements(int64_t rows, int64_t width) { return rows * width; }
inline int64_t activation_at(int64_t width, int64_t row, int64_t column) { return row * width + column; }
#endif

// lanes of columns from `column` on, those of the mask, of one row of activations
inline void put(void* activations, int64_t width, int64_t row, int64_t column, Mask mask, Lanes x) {
    Element* to = static_cast<Element*>(activations) + activation_at(width, row, column);
#if CLIPFAST_TILE_ORDER
    const int64_t left = tile_terms - column % tile_terms;
    if (left < lanes) {  // the rest lies in the next tile
        const Mask here = first_lanes(left);
        store(static_cast<Element*>(activations) + activation_at(width, row, column + left) - left, mask & ~here, x);
        mask &= here;
    }
#endif
    store(to, mask, x);
}
inline void put(void* activations, int64_t width, int64_t row, int64_t column, Lanes x) {
#if CLIPFAST_TILE_ORDER
    put(activations, width, row, column, first_lanes(lanes), x);
#else
    store(static_cast<Element*>(activations) + activation_at(width, row, column), x);
#endif
}

void copy_row(const void* from, int64_t row, int64_t width, void* to, int64_t to_row) {
#if CLIPFAST_TILE_ORDER
    const int64_t together = tile_terms;
#else
    const int64_t together = width;
#endif
    for (int64_t c = 0; c < width; c += together)
        std::memcpy(static_cast<Element*>(to) + activation_at(width, to_row, c),
                    static_cast<const Element*>(from) + activation_at(width, row, c), together * sizeof(Element));
}

// `count` rows of units, `row` units apart, to panels: to[p][unit][panel] of `to_units` each, zeros beyond the last row
// and unit
void pack_rows(const uint32_t* from, int64_t count, int64_t row, int64_t units, uint32_t* to, int64_t to_units) {
    for (int64_t c = 0; c < round_up(count, panel); c += lanes) {
        const uint32_t* rows[lanes];
        for (int64_t i = 0; i < lanes; ++i) rows[i] = c + i < count ? from + (c + i) * row : nullptr;
        uint32_t* at = to + c / panel * to_units * panel + c % panel;
        for (int64_t k = 0; k < units; k += lanes) transpose(rows, k, units, at);
        if (c % panel == 0) std::memset(at + units * panel, 0, (to_units - units) * panel * sizeof *at);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// LayerNorm and conversions

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t width, void* y,
                int64_t row) {
    Lanes sum = all(0.f), squares = all(0.f);
    for (int64_t i = 0; i < width; i += lanes) sum = sum + load(x + i);
    const Lanes mean = all(sum_of(sum) / float(width));
    for (int64_t i = 0; i < width; i += lanes) {
        const Lanes d = load(x + i) - mean;
        squares = fused(d, d, squares);
    }
    const float variance = sum_of(squares) / float(width);
    const Lanes rstd = all(1.f / std::sqrt(variance + eps));
    for (int64_t i = 0; i < width; i += lanes) {
        const Lanes normed = (load(x + i) - mean) * rstd;
        put(y, width, row, i, fused(normed, load(weight + i), load(bias + i)));
    }
}

void to_float(const void* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += lanes) {
        const Mask mask = first_lanes(count - i);
        store(to + i, mask, load(mask, static_cast<const Element*>(from) + i));
    }
}

void from_float(const float* from, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i += lanes) {
        const Mask mask = first_lanes(count - i);
        store(static_cast<Element*>(to) + i, mask, load(mask, from + i));
    }
}

// ---------------------------------------------------------------------------------------------------------------
// attention

int64_t padded(int64_t tokens) { return round_up(tokens, panel); }

// values [tokens, head_dim] to panels of columns whose units are neighbouring tokens
void pack_values(const Head& h, uint32_t* to) {
    const int64_t units = padded(h.tokens) / terms_a_unit;
    for (int64_t u = 0; u < units; ++u)
        for (int64_t d = 0; d < round_up(h.head_dim, panel); d += lanes) {
            const int64_t t = u * terms_a_unit;
            const Element* at = static_cast<const Element*>(h.v) + t * h.row + d;
            const Mask mask = first_lanes(h.head_dim - d), none = first_lanes(0);
            uint32_t* unit = to + (d / panel * units + u) * panel + d % panel;
#if CLIPFAST_BFLOAT16
            store_pairs(unit, t < h.tokens ? mask : none, at, t + 1 < h.tokens ? mask : none, at + h.row);
#else
            store(reinterpret_cast<float*>(unit), load(t < h.tokens ? mask : none, at));
#endif
        }
}

// softmax numerators of one row over its first `visible` keys, in the dtype, with zeros up to `keys`; returns their sum
float exponentials(const float* scores, int64_t visible, int64_t keys, float scale, Element* weights) {
    Lanes most = all(-__builtin_inff());
    for (int64_t j = 0; j < visible; j += lanes)
        most = choose(first_lanes(visible - j), larger(most, load(scores + j)), most);
    const Lanes shift = all(largest_of(most)), s = all(scale);
    Lanes sum = all(0.f);
    for (int64_t j = 0; j < keys; j += lanes) {
        const Lanes e = choose(first_lanes(visible - j), exponential((load(scores + j) - shift) * s), all(0.f));
        sum = sum + e;
        store(weights + j, e);
    }
    return sum_of(sum);
}

void attention_of_one(const Head& h, void* scratch) {
    const int64_t keys = padded(h.tokens);
    float* scores = static_cast<float*>(scratch);
    Element* weights = reinterpret_cast<Element*>(scores + keys);
    const Element *q = static_cast<const Element*>(h.q), *k = static_cast<const Element*>(h.k);
    for (int64_t j = 0; j < h.tokens; ++j) {
        Lanes sum = all(0.f);
        for (int64_t d = 0; d < h.head_dim; d += lanes) {
            const Mask mask = first_lanes(h.head_dim - d);
            sum = fused(load(mask, q + d), load(mask, k + j * h.row + d), sum);
        }
        scores[j] = sum_of(sum);
    }
    const Lanes rescale = reciprocal(all(exponentials(scores, h.tokens, keys, h.scale, weights)));
    for (int64_t d = 0; d < h.head_dim; d += lanes) {
        const Mask mask = first_lanes(h.head_dim - d);
        Lanes sum = all(0.f);
        for (int64_t j = 0; j < h.tokens; ++j) {
            const Lanes value = load(mask, static_cast<const Element*>(h.v) + j * h.row + d);
            sum = fused(all(as_float(weights[j])), value, sum);
        }
        put(h.out, h.width, h.first, h.column + d, mask, sum * rescale);
    }
}

}  // namespace
}  // namespace clipfast::cpu
