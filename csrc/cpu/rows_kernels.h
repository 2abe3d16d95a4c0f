// The kernels of rows.h over some vectors: include it behind the lanes and gelu_lanes.h.

namespace clipfast::cpu {
namespace {

template <class F>
void with_type(Dtype dtype, const F& f) {
    if (dtype == Dtype::bfloat16) return f(Bfloat16{});
    if (dtype == Dtype::float16) return f(Float16{});
    f(float{});
}

// f(column, whole): whole vectors first, then what is left of one, with how many lanes of it
template <class F>
inline void columns(int64_t width, const F& f) {
    int64_t c = 0;
    for (; c + lanes <= width; c += lanes) f(c, std::true_type{}, lanes);
    if (c < width) f(c, std::false_type{}, width - c);
}

template <class T, bool whole>
inline Lanes get(const T* p, std::integral_constant<bool, whole>, int64_t count) {
    if constexpr (whole) return load(p);
    return load(p, count);
}
template <class T, bool whole>
inline void put(T* p, Lanes a, std::integral_constant<bool, whole>, int64_t count) {
    if constexpr (whole) return store(p, a);
    store(p, a, count);
}

template <class Whole>
inline void accumulate(float* p, Lanes a, Whole whole, int64_t count) {
    put(p, add(get(p, whole, count), a), whole, count);
}

template <class T>
void to_float_(const T* from, int64_t count, float* to) {
    columns(count, [&](int64_t c, auto whole, int64_t n) { put(to + c, get(from + c, whole, n), whole, n); });
}
template <class T>
void from_float_(const float* from, int64_t count, T* to) {
    columns(count, [&](int64_t c, auto whole, int64_t n) { put(to + c, get(from + c, whole, n), whole, n); });
}

void to_float(const void* from, Dtype dtype, int64_t count, float* to) {
    with_type(dtype, [&](auto t) { to_float_(static_cast<const decltype(t)*>(from), count, to); });
}
void from_float(const float* from, int64_t count, void* to, Dtype dtype) {
    with_type(dtype, [&](auto t) { from_float_(from, count, static_cast<decltype(t)*>(to)); });
}

const char* row_of(const void* rows, Dtype dtype, int64_t elements) {
    return static_cast<const char*>(rows) + elements * (dtype == Dtype::float32 ? 4 : 2);
}
char* row_of(void* rows, Dtype dtype, int64_t elements) {
    return static_cast<char*>(rows) + elements * (dtype == Dtype::float32 ? 4 : 2);
}

// ---------------------------------------------------------------------------------------------------------------
// LayerNorm

// f gets the index of one of four sums, which take turns so that an addition need not wait for the one before
template <class F>
inline float sum_over(int64_t width, const F& f) {
    Lanes sum[4] = {all(0.f), all(0.f), all(0.f), all(0.f)};
    int64_t c = 0;
    for (; c + 4 * lanes <= width; c += 4 * lanes)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] = f(c + i * lanes, sum[i], std::true_type{}, lanes);
    for (; c + lanes <= width; c += lanes) sum[0] = f(c, sum[0], std::true_type{}, lanes);
    if (c < width) sum[0] = f(c, sum[0], std::false_type{}, width - c);
    return sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

// zeros where a part of a vector has no columns
template <bool whole>
inline Lanes kept(Lanes a, std::integral_constant<bool, whole>, int64_t count) {
    if constexpr (whole) return a;
    float part[lanes];
    store(part, a);
    return load(part, count);
}

template <class T, bool adds>
struct NormRow {
    const T *x, *residual;
    T *stream, *y;

    // takes part in the sum of what is normalised, and stores it where it is a sum itself
    template <class Whole>
    Lanes take(int64_t c, Lanes sum, Whole whole, int64_t n) const {
        Lanes v = get(x + c, whole, n);
        if constexpr (adds) {
            v = rounded(add(v, get(residual + c, whole, n)), T{});
            put(stream + c, v, whole, n);
        }
        return add(sum, v);
    }
    const T* normalised() const { return adds ? stream : x; }
};

// From a row's sum to its result. `next` is read and summed up by the way, and its sum returned: where memory has three
// things to do for a row (residual + LayerNorm) it need not wait while a row goes from pass to pass in the cache, which
// gives 10 to 17%. Where it has one, reading beside writing costs as much.
template <class T, bool adds>
float norm_row(const Norm& p, int64_t r, float sum, NormRow<T, adds> row, const NormRow<T, adds>* next) {
    const T* from = row.normalised();
    // not through references: a store of a vector may be one of anything
    T* const y = row.y;
    const float *const weight = p.weight, *const bias = p.bias;
    const int64_t width = p.width;
    const float mean = sum / float(width);
    const Lanes m = all(mean);
    const float squares = sum_over(width, [=](int64_t c, Lanes s, auto whole, int64_t n) {
        const Lanes d = kept(sub(get(from + c, whole, n), m), whole, n);
        return fused(d, d, s);
    });
    const float rstd = 1.f / __builtin_sqrtf(squares / float(width) + p.eps);
    const Lanes scale = all(rstd);
    p.mean[r] = mean;
    p.rstd[r] = rstd;
    const auto finish = [=](int64_t c, auto whole, int64_t n) {
        const Lanes normed = mul(sub(get(from + c, whole, n), m), scale);
        put(y + c, fused(normed, get(weight + c, whole, n), get(bias + c, whole, n)), whole, n);
    };
    if (!next) {
        columns(width, finish);
        return 0;
    }
    return sum_over(width, [=, following = *next](int64_t c, Lanes s, auto whole, int64_t n) {
        finish(c, whole, n);
        return following.take(c, s, whole, n);
    });
}

template <class T, bool adds>
void norm_rows(const Norm& p, int64_t begin, int64_t end, float* scratch) {
    using Row = NormRow<T, adds>;
    // two dtypes meet in a float32 stream: what is shorter is widened a row at a time, in turn in two places
    const auto widened = [&](const void* rows, Dtype dtype, int64_t r, int64_t place) {
        const void* from = row_of(rows, dtype, r * p.width);
        if (dtype == p.dtype) return static_cast<const T*>(from);
        float* to = scratch + (2 * place + r % 2) * p.width;
        to_float(from, dtype, p.width, to);
        return reinterpret_cast<const T*>(to);
    };
    const auto row_at = [&](int64_t r) {
        const int64_t at = r * p.width;
        Row row{widened(p.x, p.x_dtype, r, 0), nullptr, nullptr, static_cast<T*>(p.y) + at};
        if constexpr (adds) {
            row.residual = widened(p.residual, p.residual_dtype, r, 1);
            row.stream = static_cast<T*>(p.stream) + at;
        }
        return row;
    };
    const auto sum_of_row = [&](Row row) {
        return sum_over(p.width, [=](int64_t c, Lanes s, auto whole, int64_t n) { return row.take(c, s, whole, n); });
    };
    Row row = row_at(begin);
    float sum = sum_of_row(row);
    for (int64_t r = begin; r + 1 < end; ++r) {
        const Row next = row_at(r + 1);
        const float following = norm_row<T, adds>(p, r, sum, row, adds ? &next : nullptr);
        sum = adds ? following : sum_of_row(next);
        row = next;
    }
    norm_row<T, adds>(p, end - 1, sum, row, nullptr);
}

void norm(const Norm& p, int64_t begin, int64_t end, float* scratch) {
    with_type(p.dtype, [&](auto t) {
        if (p.residual) return norm_rows<decltype(t), true>(p, begin, end, scratch);
        norm_rows<decltype(t), false>(p, begin, end, scratch);
    });
}

// dx = rstd · (g - mean(g) - x̂ · mean(g · x̂)), plus the stream's own gradient, with g = dy · weight, x̂ = (x - mean) · rstd.
// One row at a time: a second pass over several at once would take fewer instructions, but rows that are not read one
// behind the other take memory half as long again.
template <class T>
void norm_gradient_row(const NormGradient& p, int64_t r, T* dx, NormSums sums) {
    const int64_t at = r * p.width;
    const T *x = static_cast<const T*>(p.x) + at, *dy = static_cast<const T*>(p.dy) + at;
    const T* d_stream = p.d_stream ? static_cast<const T*>(p.d_stream) + at : nullptr;
    const float* const weight = p.weight;
    const int64_t width = p.width;
    const Lanes mean = all(p.mean[r]), rstd = all(p.rstd[r]);
    Lanes g_sum[2] = {all(0.f), all(0.f)}, gx_sum[2] = {all(0.f), all(0.f)};
    const auto add_up = [&](int64_t c, int i, auto whole, int64_t n) {
        const Lanes g = mul(get(dy + c, whole, n), get(weight + c, whole, n));
        g_sum[i] = add(g_sum[i], g);
        gx_sum[i] = fused(g, sub(get(x + c, whole, n), mean), gx_sum[i]);
    };
    int64_t c = 0;
    for (; c + 2 * lanes <= width; c += 2 * lanes) {
        add_up(c, 0, std::true_type{}, lanes);
        add_up(c + lanes, 1, std::true_type{}, lanes);
    }
    columns(width - c, [&](int64_t rest, auto whole, int64_t n) { add_up(c + rest, 0, whole, n); });
    const Lanes g_mean = all(sum_of(add(g_sum[0], g_sum[1])) / float(width));
    const Lanes of_centred = all(sum_of(add(gx_sum[0], gx_sum[1])) / float(width) * p.rstd[r] * p.rstd[r]);
    columns(width, [=](int64_t c, auto whole, int64_t n) {
        const Lanes d = get(dy + c, whole, n), centred = sub(get(x + c, whole, n), mean);
        // as it was for the mean: over one column the difference is zero
        const Lanes g = apart(mul(d, get(weight + c, whole, n)));
        Lanes out = mul(fused_negative(centred, of_centred, sub(g, g_mean)), rstd);
        if (d_stream) out = add(out, get(d_stream + c, whole, n));
        put(dx + c, out, whole, n);
        accumulate(sums.d_weight + c, mul(d, mul(centred, rstd)), whole, n);
        accumulate(sums.d_bias + c, d, whole, n);
        if (sums.dx) accumulate(sums.dx + c, out, whole, n);
    });
}

void norm_gradient(const NormGradient& p, int64_t begin, int64_t end, NormSums sums, float* scratch) {
    // a float32 gradient may be wanted in other dtypes: its rows go to one that is float32, or are kept here
    const bool to_dx = p.dx_dtype == p.dtype;
    const bool to_residual = !to_dx && p.d_residual && p.d_residual_dtype == p.dtype;
    with_type(p.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = r * p.width;
            T* out = to_dx         ? static_cast<T*>(p.dx) + at
                     : to_residual ? static_cast<T*>(p.d_residual) + at
                                   : reinterpret_cast<T*>(scratch);
            norm_gradient_row<T>(p, r, out, sums);
            const float* row = reinterpret_cast<const float*>(out);
            if (!to_dx) from_float(row, p.width, row_of(p.dx, p.dx_dtype, at), p.dx_dtype);
            if (p.d_residual && !to_residual)
                from_float(row, p.width, row_of(p.d_residual, p.d_residual_dtype, at), p.d_residual_dtype);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------
// bias and GELU

template <class F>
void with_form(Form form, const F& f) {
    if (form == Form::erf) return f(std::integral_constant<Form, Form::erf>{});
    if (form == Form::tanh) return f(std::integral_constant<Form, Form::tanh>{});
    f(std::integral_constant<Form, Form::quick>{});
}

void gelu(const Activation& p, int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto t) {
        using T = decltype(t);
        constexpr bool exact = std::is_same_v<T, float>;
        with_form(p.form, [&](auto form) {
            while (begin < end) {
                // with a bias, up to the end of a row
                const int64_t column = p.bias ? begin % p.width : 0, rest = p.bias ? p.width - column : end - begin;
                const int64_t count = rest < end - begin ? rest : end - begin;
                const T* x = static_cast<const T*>(p.x) + begin;
                T* y = static_cast<T*>(p.y) + begin;
                const float* bias = p.bias ? p.bias + column : nullptr;
                columns(count, [=](int64_t c, auto whole, int64_t n) {
                    Lanes v = get(x + c, whole, n);
                    if (bias) v = add(v, get(bias + c, whole, n));
                    put(y + c, gelu<decltype(form)::value, exact>(v), whole, n);
                });
                begin += count;
            }
        });
    });
}

template <class T, Form form>
void gelu_gradient_row(const Activation& p, int64_t r, float* d_bias) {
    constexpr bool exact = std::is_same_v<T, float>;
    const int64_t at = r * p.width;
    const T *x = static_cast<const T*>(p.x) + at, *dy = static_cast<const T*>(p.dy) + at;
    T* dx = static_cast<T*>(p.y) + at;
    const float* const bias = p.bias;
    columns(p.width, [=](int64_t c, auto whole, int64_t n) {
        Lanes v = get(x + c, whole, n);
        if (bias) v = add(v, get(bias + c, whole, n));
        const Lanes out = mul(get(dy + c, whole, n), gelu_derivative<form, exact>(v));
        put(dx + c, out, whole, n);
        if (d_bias) accumulate(d_bias + c, out, whole, n);
    });
}

void gelu_gradient(const Activation& p, int64_t begin, int64_t end, float* d_bias) {
    with_type(p.dtype, [&](auto t) {
        with_form(p.form, [&](auto form) {
            for (int64_t r = begin; r < end; ++r)
                gelu_gradient_row<decltype(t), decltype(form)::value>(p, r, d_bias);
        });
    });
}

// in groups: the errors of a sum grow with its length
void sum_parts(const float* parts, int64_t count, int64_t width, int64_t begin, int64_t end, float* sums) {
    constexpr int64_t group = 16;
    columns(end - begin, [&](int64_t c, auto whole, int64_t n) {
        Lanes total = all(0.f);
        for (int64_t first = 0; first < count; first += group) {
            Lanes sum = all(0.f);
            for (int64_t b = first; b < count && b < first + group; ++b)
                sum = add(sum, get(parts + b * width + begin + c, whole, n));
            total = add(total, sum);
        }
        put(sums + begin + c, total, whole, n);
    });
}

const RowKernels kernels{vectors, norm, norm_gradient, gelu, gelu_gradient, sum_parts, to_float, from_float};

}  // namespace
}  // namespace clipfast::cpu
