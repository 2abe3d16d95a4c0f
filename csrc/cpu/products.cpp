// Products through BLAS (the one that PyTorch brings), or plain loops where there is none.

#include "products.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "convert.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace clipfast::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------
// BLAS by name: PyTorch's own library exports it (MKL on x86, OpenBLAS elsewhere), and no symbol is linked

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);
using Dgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                       const int*, const double*, const int*, const double*, double*, const int*);
using Bf16Gemm = void (*)(int, int, int, int, int, int, float, const uint16_t*, int, const uint16_t*, int, float,
                          float*, int);

void* find(const char* name) {
    static void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? dlsym(torch, name) : nullptr;
}

Sgemm blas(float) {
    static auto f = reinterpret_cast<Sgemm>(find("sgemm_"));
    return f;
}
Dgemm blas(double) {
    static auto f = reinterpret_cast<Dgemm>(find("dgemm_"));
    return f;
}
Bf16Gemm mkl_bf16() {
    static auto f = reinterpret_cast<Bf16Gemm>(find("cblas_gemm_bf16bf16f32"));
    return f;
}

// C[m, n] = op(A) · op(B) + beta · C, row-major, `trans` meaning that the matrix in memory is the transpose
template <class Real>
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const Real* a, int64_t lda, const Real* b,
          int64_t ldb, Real beta, Real* c, int64_t ldc) {
    // BLAS counts in columns: C row by row is Cᵀ column by column, Cᵀ = op(B)ᵀ · op(A)ᵀ
    const int m_ = int(m), n_ = int(n), k_ = int(k), lda_ = int(lda), ldb_ = int(ldb), ldc_ = int(ldc);
    const Real one = 1;
    blas(Real())(trans_b ? "T" : "N", trans_a ? "T" : "N", &n_, &m_, &k_, &one, b, &ldb_, a, &lda_, &beta, c, &ldc_);
}

template <class Real>
void portable_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const Real* a, int64_t lda,
                   const Real* b, int64_t ldb, Real beta, Real* c, int64_t ldc) {
    for (int64_t i = 0; i < m; ++i) {
        Real* row = c + i * ldc;
        if (beta == 0) std::fill(row, row + n, Real(0));
        for (int64_t l = 0; l < k; ++l) {
            const Real x = trans_a ? a[l * lda + i] : a[i * lda + l];
            if (trans_b)
                for (int64_t j = 0; j < n; ++j) row[j] += x * b[j * ldb + l];
            else
                for (int64_t j = 0; j < n; ++j) row[j] += x * b[l * ldb + j];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// features in the precision of the sums: read in place where they have it, converted a block at a time otherwise

constexpr int64_t blas_columns = 256, blas_block = 512;

// BLAS rounds the last rows and columns of an odd size otherwise than the rest, and equal features would get logits that
// differ: rows are taken by sixteens, the last ones with rows of zeros.
constexpr int64_t granule = 16;
int64_t whole(int64_t count) { return (count + granule - 1) / granule * granule; }

template <class Real>
class ConvertedRows : public RowBlock {
public:
    ConvertedRows(const Matrix& source, int64_t most) : source_(source), most_(std::min(most, whole(source.rows))) {}
    void fill(int64_t first, int64_t count, int64_t part, int64_t) override {
        if (part > 0) return;  // so few rows are not worth sharing
        first_ = first;
        in_place_ = count % granule == 0 && source_.dtype == own_dtype;
        if (in_place_) return;
        copy_.resize(most_ * source_.width);
        for (int64_t i = 0; i < count; ++i) copy(first + i, copy_.data() + i * source_.width);
        std::fill(copy_.begin() + count * source_.width, copy_.begin() + whole(count) * source_.width, Real(0));
    }
    const Real* row(int64_t i) const {
        return in_place_ ? static_cast<const Real*>(source_.data) + (first_ + i) * source_.stride
                         : copy_.data() + i * source_.width;
    }
    int64_t stride() const { return in_place_ ? source_.stride : source_.width; }
    int64_t width() const { return source_.width; }

private:
    static constexpr Dtype own_dtype = sizeof(Real) == 8 ? Dtype::float64 : Dtype::float32;
    void copy(int64_t i, Real* to) const {
        if constexpr (std::is_same_v<Real, float>)
            to_float(source_, i, to);
        else
            std::memcpy(to, static_cast<const Real*>(source_.data) + i * source_.stride, source_.width * sizeof(Real));
    }
    const Matrix source_;
    const int64_t most_;
    int64_t first_ = 0;
    bool in_place_ = false;
    std::vector<Real> copy_;
};

template <class Real, auto multiply>
class BlasProducts : public Products<Real> {
public:
    BlasProducts(const ConvertedRows<Real>& rows, const Matrix& text) : image_(rows), text_(text, blas_columns) {}
    void columns(int64_t first, int64_t count) override {
        text_.fill(first, count, 0, 1);
        columns_ = count;
    }
    void logits(int64_t first, int64_t count, Real* logits) override {
        multiply(false, true, whole(count), whole(columns_), image_.width(), image_.row(first), image_.stride(), text_.row(0),
                 text_.stride(), Real(0), logits, blas_columns);
    }
    void gradients(int64_t first, int64_t count, const Real* g, Real* d_image, Real* d_text) override {
        const int64_t width = image_.width();
        multiply(false, false, count, width, columns_, g, blas_columns, text_.row(0), text_.stride(), Real(1), d_image,
                 width);
        multiply(true, false, columns_, width, count, g, blas_columns, image_.row(first), image_.stride(), Real(1),
                 d_text, width);
    }

private:
    const ConvertedRows<Real>& image_;
    ConvertedRows<Real> text_;
    int64_t columns_ = 0;
};

template <class Real>
std::unique_ptr<RowBlock> converted_rows(const Matrix& image, int64_t block_rows) {
    return std::make_unique<ConvertedRows<Real>>(image, block_rows);
}

template <class Real, auto multiply>
std::unique_ptr<Products<Real>> blas_products(const RowBlock& rows, const Matrix& text) {
    return std::make_unique<BlasProducts<Real, multiply>>(static_cast<const ConvertedRows<Real>&>(rows), text);
}

template <class Real, auto multiply>
constexpr Gemm<Real> through_blas(const char* name) {
    return {name, blas_columns, blas_block, converted_rows<Real>, blas_products<Real, multiply>};
}

// ---------------------------------------------------------------------------------------------------------------
// bfloat16 through MKL, whose product of bfloat16 with float32 sums uses AMX where the CPU has it

constexpr int row_major = 101, plain = 111, transposed = 112;

class Bf16RowsInPlace : public RowBlock {
public:
    explicit Bf16RowsInPlace(const Matrix& source) : source(source) {}
    void fill(int64_t first, int64_t, int64_t, int64_t) override { first_ = first; }
    const uint16_t* row(int64_t i) const {
        return static_cast<const uint16_t*>(source.data) + (first_ + i) * source.stride;
    }
    const Matrix source;

private:
    int64_t first_ = 0;
};

class MklBf16Products : public Products<float> {
public:
    MklBf16Products(const Bf16RowsInPlace& rows, const Matrix& text)
        : image_(rows), text_(text), g_(sub_rows * blas_columns) {}
    void columns(int64_t first, int64_t count) override {
        text_.fill(first, count, 0, 1);
        columns_ = count;
    }
    void logits(int64_t first, int64_t count, float* logits) override {
        mkl_bf16()(row_major, plain, transposed, int(count), int(columns_), int(image_.source.width), 1.f,
                   image_.row(first), int(image_.source.stride), text_.row(0), int(text_.source.stride), 0.f, logits,
                   int(blas_columns));
    }
    void gradients(int64_t first, int64_t count, const float* g, float* d_image, float* d_text) override {
        const int width = int(image_.source.width);
        for (int64_t i = 0; i < count * blas_columns; ++i) g_[i] = to_bfloat16(g[i]);
        mkl_bf16()(row_major, plain, plain, int(count), width, int(columns_), 1.f, g_.data(), int(blas_columns),
                   text_.row(0), int(text_.source.stride), 1.f, d_image, width);
        mkl_bf16()(row_major, transposed, plain, int(columns_), width, int(count), 1.f, g_.data(), int(blas_columns),
                   image_.row(first), int(image_.source.stride), 1.f, d_text, width);
    }

private:
    const Bf16RowsInPlace& image_;
    Bf16RowsInPlace text_;
    int64_t columns_ = 0;
    std::vector<uint16_t> g_;
};

std::unique_ptr<RowBlock> bf16_rows_in_place(const Matrix& image, int64_t) {
    return std::make_unique<Bf16RowsInPlace>(image);
}

std::unique_ptr<Products<float>> mkl_bf16_products(const RowBlock& rows, const Matrix& text) {
    return std::make_unique<MklBf16Products>(static_cast<const Bf16RowsInPlace&>(rows), text);
}

bool has_amx_bf16() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
    return false;
#endif
}

}  // namespace

template <class Real>
const Gemm<Real>& choose_gemm(Dtype dtype) {
    static const Gemm<Real> of_blas = through_blas<Real, &gemm<Real>>("blas");
    static const Gemm<Real> portable = through_blas<Real, &portable_gemm<Real>>("portable");
    const bool has_blas = blas(Real()) != nullptr;
    const char* wish = std::getenv("CLIPFAST_CPU_GEMM");
    const std::string wanted = wish ? wish : "";
    if constexpr (std::is_same_v<Real, float>) {
        static const Gemm<float> of_mkl_bf16{"mkl_bf16", blas_columns, blas_block, bf16_rows_in_place,
                                             mkl_bf16_products};
        if (dtype == Dtype::bfloat16) {
            const Gemm<float>* amx = amx_bf16_gemm();
            if (amx && (wanted == "amx_bf16" || wanted.empty())) return *amx;
            // a library that was built without AMX
            if (mkl_bf16() && (wanted == "mkl_bf16" || (wanted.empty() && has_amx_bf16()))) return of_mkl_bf16;
            const Gemm<float>* own = avx512_bf16_gemm();
            if (own && (wanted == "avx512_bf16" || wanted.empty())) return *own;
        }
    }
    if (has_blas && (wanted == "blas" || wanted.empty())) return of_blas;
    STD_TORCH_CHECK(wanted == "portable" || wanted.empty(), "CLIPFAST_CPU_GEMM: got ", wanted,
                    ", expected one that this CPU and dtype can have of portable, blas, avx512_bf16, amx_bf16, mkl_bf16");
    return portable;
}

template const Gemm<float>& choose_gemm<float>(Dtype);
template const Gemm<double>& choose_gemm<double>(Dtype);

}  // namespace clipfast::cpu
