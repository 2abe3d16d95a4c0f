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
inline Vector get(const T* p, std::integral_constant<bool, whole>, int64_t count) {
    if constexpr (whole) return load(p);
    return load(p, count);
}
template <class T, bool whole>
inline void put(T* p, Vector a, std::integral_constant<bool, whole>, int64_t count) {
    if constexpr (whole) return store(p, a);
    store(p, a, count);
}

template <class Whole>
inline void accumulate(float* p, Vector a, Whole whole, int64_t count) {
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
    Vector sum[4] = {zero(), zero(), zero(), zero()};
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
inline Vector kept(Vector a, std::integral_constant<bool, whole>, int64_t count) {
    if constexpr (whole) return a;
    float part[lanes];
    store(part, a);
    return load(part, count);
}

template <class T>
void norm_row(const Norm& p, int64_t r, const T* x, const T* residual, T* stream, T* y) {
    const float sum = sum_over(p.width, [&](int64_t c, Vector s, auto whole, int64_t n) {
        Vector v = get(x + c, whole, n);
        if (residual) {
            v = rounded(add(v, get(residual + c, whole, n)), T{});
            put(stream + c, v, whole, n);
        }
        return add(s, v);
    });
    const T* row = residual ? stream : x;
    const float mean = sum / float(p.width);
    const Vector m = all(mean);
    const float squares = sum_over(p.width, [&](int64_t c, Vector s, auto whole, int64_t n) {
        const Vector d = kept(sub(get(row + c, whole, n), m), whole, n);
        return fma(d, d, s);
    });
    const float rstd = 1.f / __builtin_sqrtf(squares / float(p.width) + p.eps);
    const Vector scale = all(rstd);
    columns(p.width, [&](int64_t c, auto whole, int64_t n) {
        const Vector normed = mul(sub(get(row + c, whole, n), m), scale);
        put(y + c, fma(normed, get(p.weight + c, whole, n), get(p.bias + c, whole, n)), whole, n);
    });
    p.mean[r] = mean;
    p.rstd[r] = rstd;
}

void norm(const Norm& p, int64_t begin, int64_t end, float* scratch) {
    // two dtypes meet in a float32 stream: what is shorter is widened a row at a time
    const bool mixed = p.residual && p.x_dtype != p.residual_dtype;
    with_type(p.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = r * p.width;
            const void* x = row_of(p.x, p.x_dtype, at);
            const void* residual = p.residual ? row_of(p.residual, p.residual_dtype, at) : nullptr;
            if (mixed && p.x_dtype != Dtype::float32) {
                to_float(x, p.x_dtype, p.width, scratch);
                x = scratch;
            }
            if (mixed && p.residual_dtype != Dtype::float32) {
                to_float(residual, p.residual_dtype, p.width, scratch + p.width);
                residual = scratch + p.width;
            }
            norm_row<T>(p, r, static_cast<const T*>(x), static_cast<const T*>(residual),
                        residual ? static_cast<T*>(p.stream) + at : nullptr, static_cast<T*>(p.y) + at);
        }
    });
}

// dx = rstd · (g - mean(g) - x̂ · mean(g · x̂)), plus the stream's own gradient, with g = dy · weight, x̂ = (x - mean) · rstd
template <class T, int rows>
void norm_gradient_rows(const NormGradient& p, int64_t r, T* const dx[], NormSums sums) {
    const T *x[rows], *dy[rows], *d_stream[rows];
    Vector mean[rows], rstd[rows], g_sum[rows], gx_sum[rows];
    for (int i = 0; i < rows; ++i) {
        const int64_t at = (r + i) * p.width;
        x[i] = static_cast<const T*>(p.x) + at;
        dy[i] = static_cast<const T*>(p.dy) + at;
        d_stream[i] = p.d_stream ? static_cast<const T*>(p.d_stream) + at : nullptr;
        mean[i] = all(p.mean[r + i]), rstd[i] = all(p.rstd[r + i]);
        g_sum[i] = gx_sum[i] = zero();
    }
    columns(p.width, [&](int64_t c, auto whole, int64_t n) {
        const Vector weight = get(p.weight + c, whole, n);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            const Vector g = mul(get(dy[i] + c, whole, n), weight);
            g_sum[i] = add(g_sum[i], g);
            gx_sum[i] = fma(g, sub(get(x[i] + c, whole, n), mean[i]), gx_sum[i]);
        }
    });
    // dx = rstd · g + of_normed · (x - mean) - shift, in as few steps
    Vector of_normed[rows], shift[rows];
    for (int i = 0; i < rows; ++i) {
        const float r_ = p.rstd[r + i], scale = r_ / float(p.width);
        shift[i] = all(scale * sum_of(g_sum[i]));
        of_normed[i] = all(-scale * r_ * r_ * sum_of(gx_sum[i]));
    }
    columns(p.width, [&](int64_t c, auto whole, int64_t n) {
        const Vector weight = get(p.weight + c, whole, n);
        Vector of_weight = zero(), of_bias = zero(), of_all = zero();
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            const Vector d = get(dy[i] + c, whole, n), centred = sub(get(x[i] + c, whole, n), mean[i]);
            Vector out = fma(mul(d, weight), rstd[i], fma(centred, of_normed[i], sub(zero(), shift[i])));
            if (d_stream[i]) out = add(out, get(d_stream[i] + c, whole, n));
            put(dx[i] + c, out, whole, n);
            of_all = add(of_all, out);
            of_weight = fma(d, mul(centred, rstd[i]), of_weight);
            of_bias = add(d, of_bias);
        }
        accumulate(sums.d_weight + c, of_weight, whole, n);
        accumulate(sums.d_bias + c, of_bias, whole, n);
        if (sums.dx) accumulate(sums.dx + c, of_all, whole, n);
    });
}

void norm_gradient(const NormGradient& p, int64_t begin, int64_t end, NormSums sums, float* scratch) {
    constexpr int most = 2;
    // a float32 gradient may be wanted in other dtypes: its rows go to one that is float32, or stay here
    const bool to_dx = p.dx_dtype == p.dtype;
    const bool to_residual = !to_dx && p.d_residual && p.d_residual_dtype == p.dtype;
    with_type(p.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t r = begin; r < end; r += most) {
            const int count = int(end - r < most ? end - r : most);
            T* out[most];
            for (int i = 0; i < count; ++i) {
                void* base = to_dx ? p.dx : to_residual ? p.d_residual : nullptr;
                out[i] = base ? static_cast<T*>(base) + (r + i) * p.width
                              : reinterpret_cast<T*>(scratch) + i * p.width;
            }
            if (count == most) norm_gradient_rows<T, most>(p, r, out, sums);
            else
                for (int i = 0; i < count; ++i) norm_gradient_rows<T, 1>(p, r + i, out + i, sums);
            for (int i = 0; i < count; ++i) {
                const int64_t at = (r + i) * p.width;
                const float* row = reinterpret_cast<const float*>(out[i]);
                if (!to_dx) from_float(row, p.width, row_of(p.dx, p.dx_dtype, at), p.dx_dtype);
                if (p.d_residual && !to_residual)
                    from_float(row, p.width, row_of(p.d_residual, p.d_residual_dtype, at), p.d_residual_dtype);
            }
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
                columns(count, [&](int64_t c, auto whole, int64_t n) {
                    Vector v = get(x + c, whole, n);
                    if (bias) v = add(v, get(bias + c, whole, n));
                    put(y + c, gelu<decltype(form)::value, exact>(v), whole, n);
                });
                begin += count;
            }
        });
    });
}

template <class T, Form form, int rows>
void gelu_gradient_rows(const Activation& p, int64_t r, float* d_bias) {
    constexpr bool exact = std::is_same_v<T, float>;
    const T *x = static_cast<const T*>(p.x) + r * p.width, *dy = static_cast<const T*>(p.dy) + r * p.width;
    T* dx = static_cast<T*>(p.y) + r * p.width;
    columns(p.width, [&](int64_t c, auto whole, int64_t n) {
        const Vector bias = p.bias ? get(p.bias + c, whole, n) : zero();
        Vector sum = zero();
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            const int64_t at = i * p.width + c;
            const Vector v = add(get(x + at, whole, n), bias);
            const Vector out = mul(get(dy + at, whole, n), gelu_derivative<form, exact>(v));
            put(dx + at, out, whole, n);
            sum = add(sum, out);
        }
        if (d_bias) accumulate(d_bias + c, sum, whole, n);
    });
}

void gelu_gradient(const Activation& p, int64_t begin, int64_t end, float* d_bias) {
    with_type(p.dtype, [&](auto t) {
        using T = decltype(t);
        with_form(p.form, [&](auto form) {
            constexpr Form f = decltype(form)::value;
            int64_t r = begin;
            for (; r + 2 <= end; r += 2) gelu_gradient_rows<T, f, 2>(p, r, d_bias);
            if (r < end) gelu_gradient_rows<T, f, 1>(p, r, d_bias);
        });
    });
}

// in groups: the errors of a sum grow with its length
void sum_parts(const float* parts, int64_t count, int64_t width, int64_t begin, int64_t end, float* sums) {
    constexpr int64_t group = 16;
    columns(end - begin, [&](int64_t c, auto whole, int64_t n) {
        Vector total = zero();
        for (int64_t first = 0; first < count; first += group) {
            Vector sum = zero();
            for (int64_t b = first; b < count && b < first + group; ++b)
                sum = add(sum, get(parts + b * width + begin + c, whole, n));
            total = add(total, sum);
        }
        put(sums + begin + c, total, whole, n);
    });
}

const RowKernels kernels{norm, norm_gradient, gelu, gelu_gradient, sum_parts, to_float, from_float};

}  // namespace
}  // namespace clipfast::cpu
