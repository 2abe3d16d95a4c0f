// 16-bit floating-point numbers as float32, and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "products.h"

namespace clipfast::cpu {

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float from_bfloat16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// round to nearest even; NaN stays NaN
inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t(x != x ? 0x7fc0 : rounded);
}

inline float from_float16(uint16_t x) {
    const uint32_t magnitude = x & 0x7fff, sign = uint32_t(x & 0x8000) << 16;
    // exponent and fraction at their places in float32, then 2^112 mends the exponent's bias, subnormals included
    const float value = magnitude >= 0x7c00 ? from_bits(0x7f800000 | (magnitude & 0x3ff) << 13)
                                            : from_bits(magnitude << 13) * from_bits(0x77800000);
    return from_bits(to_bits(value) | sign);
}

inline uint16_t to_float16(float x) {
    const uint16_t sign = uint16_t(to_bits(x) >> 16 & 0x8000);
    const uint32_t bits = to_bits(x) & 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // what rounds past 65504
    if (bits < 0x38800000) {                       // subnormal: adding 0.5 rounds at 2^-24
        return sign | uint16_t(to_bits(from_bits(bits) + 0.5f) - 0x3f000000);
    }
    return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// Row i of a matrix of float32, bfloat16 or float16.
inline void to_float(const Matrix& source, int64_t i, float* row) {
    const auto* bits = static_cast<const uint16_t*>(source.data) + i * source.stride;
    switch (source.dtype) {
        case Dtype::bfloat16:
            for (int64_t k = 0; k < source.width; ++k) row[k] = from_bfloat16(bits[k]);
            break;
        case Dtype::float16:
            for (int64_t k = 0; k < source.width; ++k) row[k] = from_float16(bits[k]);
            break;
        default:
            std::memcpy(row, static_cast<const float*>(source.data) + i * source.stride, source.width * sizeof(float));
    }
}

}  // namespace clipfast::cpu
