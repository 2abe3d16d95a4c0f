// Whether weights still are what they were: hashes of some of their lines, which after some turns are all of them.
//
// A matrix is taken as rows of lines of 64 bytes, or of more where a row would have too many. A turn reads one line of one
// row in every group of 1, 2 or 4 rows; the row is drawn at random, and the group's others follow in the next turns. The
// lines are those of a lattice: point n of a turn lies in line (n · step + shift) mod lines, and the shift grows from one
// group's turns to the next. The step is coprime to the number of lines, so that a turn reads from every column, and close
// to the golden section of it, so that a turn reads from every block of 1/64 of the matrix.
//
// What takes time is that lines of different rows are far apart, each of them a miss of the caches and often of the TLB.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace clipfast::cpu {
namespace {

using torch::stable::Tensor;

constexpr int64_t unit = 64;  // bytes that a core fetches together
constexpr int64_t most_turns = 256, least_points = 256;
constexpr int64_t ahead = 32;  // lines that are fetched together

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Matrix {
    const char* data;
    int64_t rows, row_bytes, stride;  // bytes from row to row
    int64_t line, lines, step;  // bytes; lines of a row
    int64_t group, points;      // rows; points a group
    int64_t turns() const { return group * lines; }
    int64_t groups() const { return divide_up(rows, group); }
};

int64_t golden(int64_t lines) {
    const int64_t wanted = int64_t(0.6180339887498949 * double(lines) + 0.5);
    for (int64_t distance = 0;; ++distance)
        for (int64_t step : {wanted - distance, wanted + distance})
            if (step > 0 && std::gcd(step, lines) == 1) return step;
}

Matrix matrix_of(const char* op, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) > 0 && t.size(1) > 0 && (t.stride(1) == 1 || t.size(1) == 1), op,
                    "(weights): expected [rows, columns], not empty, each row in one piece");
    const int64_t element = int64_t(t.element_size());
    Matrix m;
    m.data = static_cast<const char*>(t.const_data_ptr());
    m.rows = t.size(0);
    m.row_bytes = t.size(1) * element;
    m.stride = t.stride(0) * element;
    // 1/64 of the rows are 32 or more, 12 or more, or few. That none of 1/64 of scattered rows is among those drawn has a
    // probability of 0.75^32 or 0.5^12 at most; of seven, or three, that lie side by side one always is.
    m.group = m.rows >= 2048 ? 4 : m.rows >= 768 ? 2 : 1;
    m.line = unit * divide_up(divide_up(m.row_bytes, unit), most_turns / m.group);
    m.lines = divide_up(m.row_bytes, m.line);
    m.points = std::min(m.lines, divide_up(std::max(least_points, m.lines), m.groups()));
    m.step = golden(m.lines);
    return m;
}

// Eight 64-bit words, which one register of AVX-512 holds; elsewhere the compiler makes as many of them as it takes
typedef uint64_t Words __attribute__((vector_size(unit)));

#define CLIPFAST_INLINE inline __attribute__((always_inline))

// One to one in the word for a given state and in the state for a given word: one word that changes always shows
template <class T>
CLIPFAST_INLINE void mix(T& state, const T& word) {
    state ^= word;
    state = (state << 29 | state >> 35) * 0x9e3779b97f4a7c15u;
}

// Where a turn's lines begin and end, point by point
class Points {
  public:
    Points(const Matrix& m, int64_t turn)
        : m(m), which(turn % m.group), shift(turn / m.group), line(shift), left(m.groups() * m.points) {}

    struct Line {
        const char* begin;
        int64_t bytes;
    };
    // Fetches up to `count` lines; returns how many
    CLIPFAST_INLINE int64_t next(Line* lines, int64_t count) {
        count = std::min(count, left);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = line * m.line;
            lines[i] = {m.data + row() * m.stride + begin, std::min(m.line, m.row_bytes - begin)};
            for (int64_t at = 0; at < m.line; at += unit) __builtin_prefetch(lines[i].begin + at);
            if (++point == m.points) point = 0, ++n;
            if ((line += m.step) >= m.lines) line -= m.lines;
        }
        left -= count;
        return count;
    }

  private:
    const Matrix& m;
    int64_t which, shift, line, left, n = 0, point = 0;

    CLIPFAST_INLINE int64_t row() const {
        if (m.group == 1) return n;
        const int64_t drawn = int64_t(uint64_t(n * most_turns + shift + 1) * 0xd6e8feb86659fd93u >> 40);
        // exclusive or: a group's turns take its rows in some order
        return std::min(n * m.group + ((drawn ^ which) & (m.group - 1)), m.rows - 1);
    }
};

// `whole` where all lines are of one unit
template <bool whole>
CLIPFAST_INLINE int64_t hash_lines(const Matrix& m, int64_t turn) {
    Points points(m, turn);
    Words state = {1, 2, 3, 4, 5, 6, 7, 8};
    // one lot is on its way while the lot before is read
    Points::Line lots[2][ahead];
    int64_t counts[2] = {points.next(lots[0], ahead), 0};
    for (int64_t i = 0; counts[i]; i ^= 1) {
        counts[i ^ 1] = points.next(lots[i ^ 1], ahead);
        for (int64_t j = 0; j < counts[i]; ++j) {
            const auto [begin, bytes] = lots[i][j];
            for (int64_t at = 0; at < (whole ? unit : bytes); at += unit) {
                Words words = {};
                std::memcpy(&words, begin + at, whole || bytes - at >= unit ? unit : bytes - at);
                mix(state, words);
            }
        }
    }
    uint64_t sum = 0;
    for (int64_t i = 0; i < int64_t(unit / sizeof(uint64_t)); ++i) mix<uint64_t>(sum, state[i]);
    return int64_t(sum);
}

CLIPFAST_INLINE int64_t hash_any(const Matrix& m, int64_t turn) {
    return m.line == unit && m.row_bytes % unit == 0 ? hash_lines<true>(m, turn) : hash_lines<false>(m, turn);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq"))) int64_t hash_avx512(const Matrix& m, int64_t turn) {
    return hash_any(m, turn);
}
#endif

int64_t hash(const Matrix& m, int64_t turn) {
#if defined(__x86_64__)
    static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (wide) return hash_avx512(m, turn);
#endif
    return hash_any(m, turn);
}

std::vector<Matrix> matrices(const char* op, const std::vector<Tensor>& weights) {
    std::vector<Matrix> all;
    all.reserve(weights.size());
    for (const Tensor& t : weights) all.push_back(matrix_of(op, t));
    return all;
}

template <class F>
void share(int64_t count, const F& f) {
    torch::stable::parallel_for(0, count, 1, f);
}

int64_t turns_of(const std::vector<Matrix>& all, std::vector<int64_t>* firsts) {
    int64_t sum = 0;
    for (const Matrix& m : all) {
        firsts->push_back(sum);
        sum += m.turns();
    }
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------
// operators

Tensor fingerprint(const std::vector<Tensor>& weights) {
    STD_TORCH_CHECK(!weights.empty(), "fingerprint(weights): got none");
    const std::vector<Matrix> all = matrices("fingerprint", weights);
    std::vector<int64_t> firsts;
    const int64_t count = turns_of(all, &firsts);
    Tensor hashes = torch::stable::new_empty(weights[0], {count}, torch::headeronly::ScalarType::Long);
    int64_t* to = static_cast<int64_t*>(hashes.mutable_data_ptr());
    share(count, [&](int64_t begin, int64_t end) {
        int64_t m = std::upper_bound(firsts.begin(), firsts.end(), begin) - firsts.begin() - 1;
        for (int64_t i = begin; i < end; ++i) {
            while (i - firsts[m] >= all[m].turns()) ++m;
            to[i] = hash(all[m], i - firsts[m]);
        }
    });
    return hashes;
}

int64_t changed_weight(const std::vector<Tensor>& weights, const Tensor& fingerprint, int64_t turn) {
    const std::vector<Matrix> all = matrices("changed_weight", weights);
    std::vector<int64_t> firsts;
    STD_TORCH_CHECK(fingerprint.scalar_type() == torch::headeronly::ScalarType::Long && fingerprint.is_contiguous() &&
                        fingerprint.numel() == turns_of(all, &firsts) && turn >= 0,
                    "changed_weight(fingerprint): expected what fingerprint gives for these weights");
    const int64_t* expected = static_cast<const int64_t*>(fingerprint.const_data_ptr());
    std::vector<char> differs(all.size());
    share(int64_t(all.size()), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            // what comes next is on its way while this is read: vectors are short
            Points::Line next[ahead];
            if (m + 1 < end) Points(all[m + 1], turn % all[m + 1].turns()).next(next, ahead);
            differs[m] = hash(all[m], turn % all[m].turns()) != expected[firsts[m] + turn % all[m].turns()];
        }
    });
    const auto first = std::find(differs.begin(), differs.end(), 1);
    return first == differs.end() ? -1 : first - differs.begin();
}

}  // namespace
}  // namespace clipfast::cpu

STABLE_TORCH_LIBRARY_IMPL(clipfast, CPU, m) {
    m.impl("fingerprint", TORCH_BOX(&clipfast::cpu::fingerprint));
    m.impl("changed_weight", TORCH_BOX(&clipfast::cpu::changed_weight));
}
