// What the losses do with one tile of logits, in plain loops that the compiler turns into vectors.
//
// A tile holds raw products (image_i · text_j), `columns` of its `stride` columns in use. Row vectors (a, u, …) start at
// the tile's first row, column vectors (g, v, …) at its first column. label(r) is the column of row r's label within
// the tile, or outside 0..columns-1.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "convert.h"

// compiled once for each of these and chosen when the library is loaded
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLIPFAST_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLIPFAST_VECTORISED
#endif
#define CLIPFAST_INLINE inline __attribute__((always_inline))

namespace clipfast::cpu {

// ---------------------------------------------------------------------------------------------------------------
// exp and log1p in float32 without a call: within 2 units of rounding, NaN stays NaN

CLIPFAST_INLINE double exp_(double x) { return std::exp(x); }

CLIPFAST_INLINE float exp_(float x) {
    // below -87 the result is under float's normal range: 0 (sums of exponentials never see the difference)
    const float low = -87.f, clamped = x < low ? low : x > 88.f ? 88.f : x;
    // adding 1.5·2^23 leaves the nearest integer in the low bits
    const float magic = 12582912.f, shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    // x - n·ln 2 in two steps, the first exact
    const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const float power = from_bits((to_bits(shifted) << 23) + 0x3f800000u);
    return x < low ? 0.f : p * power;
}

CLIPFAST_INLINE double log1p_(double x) { return std::log1p(x); }

// for x in 0..1: log(1 + x) = 2 artanh(x / (2 + x)), whose argument is at most 1/3
CLIPFAST_INLINE float log1p_(float x) {
    const float u = x / (2.f + x), v = u * u;
    float p = 1.f / 15;
    for (float c : {1.f / 13, 1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3, 1.f}) p = p * v + c;
    return x != x ? x : 2.f * u * p;
}

template <class Real>
constexpr Real lowest = -std::numeric_limits<Real>::infinity();

// A running log-sum-exp: Σ exp(x) = (1 + others) · exp(most). The largest term, which is 1, stays out of the sum: where a
// pair is learned the others are tiny, and their digits are its gradient.
template <class Real>
struct Running {
    Real most = lowest<Real>, others = -1, rival = lowest<Real>;

    void merge(Real more_most, Real more_others, Real more_rival) {
        rival = std::max(rival, more_rival);
        // before anything was seen, the largest is -inf and the sum is 0
        if (more_most > most) {
            others = (1 + others) * std::exp(most - more_most) + more_others;
            most = more_most;
        } else {
            others += (1 + more_others) * std::exp(more_most - most);
        }
    }
};

// A sum of float64 terms that loses no digits to its length (Neumaier's compensation).
struct Sum {
    double high = 0, low = 0;
    void add(double x) {
        const double sum = high + x;
        low += std::fabs(high) >= std::fabs(x) ? (high - sum) + x : (x - sum) + high;
        high = sum;
    }
    double value() const { return high + low; }
};

// Log-sum-exps in two parts: the largest logit, and the logarithm of the sum of exponentials beside it.
template <class Real>
struct Lse {
    const Real *most, *rest;
    Lse operator+(int64_t i) const { return {most + i, rest + i}; }
};

template <class Real>
struct Tile {
    Real* x;
    int64_t rows, columns, stride;
    int64_t first_label;  // label of row r: column r + first_label of the tile

    int64_t label(int64_t r) const {
        const int64_t c = r + first_label;
        return c >= 0 && c < columns ? c : -1;
    }
};

// Calls f(begin, end) for the columns before and after a row's label, or for all of them where it has none.
template <class F>
CLIPFAST_INLINE void beside(int64_t label, int64_t columns, const F& f) {
    f(0, label < 0 ? columns : label);
    if (label >= 0) f(label + 1, columns);
}

// ---------------------------------------------------------------------------------------------------------------
// CLIP

// x_ij = a_i · g_j · product; gives the rows' sums of this tile and updates the columns', as in Running. `positive` gets
// the labels' logits. `scratch` has room for two rows.
template <class Real>
CLIPFAST_INLINE void statistics_(const Tile<Real>& t, const Real* a, const Real* g, Real* positive, Real* row_most,
                                 Real* row_others, Real* row_rival, Real* col_most, Real* col_others, Real* col_rival,
                                 Real* scratch) {
    const int64_t columns = t.columns;
    Real *most = scratch, *largest = scratch + t.stride;  // the columns' new maxima, and how many logits are one
    for (int64_t c = 0; c < columns; ++c) most[c] = col_most[c];
    for (int64_t r = 0; r < t.rows; ++r) {
        Real* x = t.x + r * t.stride;
        const Real factor = a[r];
        for (int64_t c = 0; c < columns; ++c) x[c] *= factor * g[c];
        // the label's logit stands aside while rivals are sought
        const int64_t label = t.label(r);
        const Real own = label < 0 ? lowest<Real> : x[label];
        if (label >= 0) positive[r] = own, x[label] = lowest<Real>;
        Real rival = lowest<Real>;
#pragma omp simd reduction(max : rival)
        for (int64_t c = 0; c < columns; ++c) rival = x[c] > rival ? x[c] : rival;
        for (int64_t c = 0; c < columns; ++c) col_rival[c] = x[c] > col_rival[c] ? x[c] : col_rival[c];
        if (label >= 0) x[label] = own, most[label] = own > most[label] ? own : most[label];
        row_rival[r] = rival;
        row_most[r] = rival > own ? rival : own;
    }
    for (int64_t c = 0; c < columns; ++c) {
        most[c] = col_rival[c] > most[c] ? col_rival[c] : most[c];
        const bool higher = most[c] > col_most[c];
        col_others[c] = higher ? (1 + col_others[c]) * exp_(col_most[c] - most[c]) : col_others[c];
        // a new maximum is one of this tile's logits: the first of them is the 1 that stays out
        largest[c] = higher ? Real(-1) : Real(0);
        col_most[c] = most[c];
    }
    for (int64_t r = 0; r < t.rows; ++r) {
        const Real* x = t.x + r * t.stride;
        const Real high = row_most[r];
        Real sum = 0, equal = -1;
#pragma omp simd reduction(+ : sum, equal)
        for (int64_t c = 0; c < columns; ++c) {
            const bool in_row = x[c] == high, in_column = x[c] == most[c];
            const Real of_row = exp_(x[c] - high), of_column = exp_(x[c] - most[c]);
            sum += in_row ? Real(0) : of_row;
            equal += in_row ? Real(1) : Real(0);
            col_others[c] += in_column ? Real(0) : of_column;
            largest[c] += in_column ? Real(1) : Real(0);
        }
        row_others[r] = sum + equal;
    }
    for (int64_t c = 0; c < columns; ++c) col_others[c] += largest[c];
}

// The tile becomes G_ij · f_i · g_j; returns Σ G_ij · f_i · g_j · product. `logit` has room for one row.
template <class Real>
CLIPFAST_INLINE double gradient_(const Tile<Real>& t, Real s, const Real* f, const Real* g, Lse<Real> row,
                                 Lse<Real> col, const Real* u, const Real* v, Real* logit) {
    Sum total;
    for (int64_t r = 0; r < t.rows; ++r) {
        Real* x = t.x + r * t.stride;
        const Real a = s * f[r], of_row = f[r], most = row.most[r], rest = row.rest[r], weight = u[r];
        for (int64_t c = 0; c < t.columns; ++c) logit[c] = x[c] * (a * g[c]);
        // the logits must be rounded as in the statistics, not joined with the subtraction that follows
        asm volatile("" ::: "memory");
        const int64_t label = t.label(r);
        if (label >= 0) {
            // exp - 1 at once: the difference would lose the digits of a pair that is learned
            const Real product = x[label], p = weight * std::expm1(logit[label] - most - rest) +
                                               v[label] * std::expm1(logit[label] - col.most[label] - col.rest[label]);
            const Real d = p * (of_row * g[label]);
            total.add(double(d) * product);
            x[label] = d;
        }
        beside(label, t.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = begin; c < end; ++c) {
                const Real p =
                    weight * exp_(logit[c] - most - rest) + v[c] * exp_(logit[c] - col.most[c] - col.rest[c]);
                const Real d = p * (of_row * g[c]);
                sum += d * x[c];
                x[c] = d;
            }
            total.add(sum);
        });
    }
    return total.value();
}

// ---------------------------------------------------------------------------------------------------------------
// SigLIP

// row_loss[r] += Σ_c log(1 + exp(-z · (x + b)))
template <class Real>
CLIPFAST_INLINE void sigmoid_statistics_(const Tile<Real>& t, Real s, Real b, const Real* f, const Real* g,
                                         double* row_loss) {
    for (int64_t r = 0; r < t.rows; ++r) {
        const Real* x = t.x + r * t.stride;
        const Real a = s * f[r];
        double total = 0;
        const int64_t label = t.label(r);
        if (label >= 0) {
            const Real y = -(x[label] * (a * g[label]) + b);
            total = double(y > 0 ? y : Real(0)) + std::log1p(std::exp(y > 0 ? -y : y));
        }
        beside(label, t.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = begin; c < end; ++c) {
                const Real y = x[c] * (a * g[c]) + b;
                sum += (y > 0 ? y : Real(0)) + log1p_(exp_(y > 0 ? -y : y));
            }
            total += sum;
        });
        row_loss[r] += total;
    }
}

// The tile becomes G_ij · f_i · g_j; returns Σ G_ij · f_i · g_j · product, adds Σ G_ij to d_bias and to row_loss what
// sigmoid_statistics_ does.
template <class Real>
CLIPFAST_INLINE double sigmoid_gradient_(const Tile<Real>& t, Real s, Real b, const Real* f, const Real* g,
                                         const Real* u, double* row_loss, Sum* d_bias) {
    Sum total;
    for (int64_t r = 0; r < t.rows; ++r) {
        Real* x = t.x + r * t.stride;
        const Real a = s * f[r], of_row = f[r], weight = u[r];
        const int64_t label = t.label(r);
        double losses = 0;
        if (label >= 0) {
            const Real product = x[label], y = product * (a * g[label]) + b, e = std::exp(y < 0 ? y : -y);
            losses = double(y < 0 ? -y : Real(0)) + std::log1p(e);
            const Real p = -weight * ((y < 0 ? Real(1) : e) / (1 + e)), d = p * (of_row * g[label]);
            d_bias->add(p);
            total.add(double(d) * product);
            x[label] = d;
        }
        beside(label, t.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
            double sum = 0, bias = 0, loss = 0;
#pragma omp simd reduction(+ : sum, bias, loss)
            for (int64_t c = begin; c < end; ++c) {
                // σ by the exponential that cannot overflow
                const Real y = x[c] * (a * g[c]) + b, e = exp_(y < 0 ? y : -y);
                const Real p = weight * ((y < 0 ? e : Real(1)) / (1 + e)), d = p * (of_row * g[c]);
                loss += (y > 0 ? y : Real(0)) + log1p_(e);
                bias += p;
                sum += d * x[c];
                x[c] = d;
            }
            total.add(sum);
            d_bias->add(bias);
            losses += loss;
        });
        row_loss[r] += losses;
    }
    return total.value();
}

}  // namespace clipfast::cpu
