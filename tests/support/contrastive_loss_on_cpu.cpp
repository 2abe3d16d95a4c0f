// The contrastive losses' kernels and launchers, compiled for the CPU under the fibre shim, over numpy arrays.
//
// Arrays come as addresses; the element type is a name. Matrix products are the caller's.
#define CLIPFAST_FIBRE_SHIM
#include "cuda/contrastive_loss_launchers.cuh"

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace py = pybind11;
using namespace clipfast;

namespace {

template <typename A>
A* at(const py::dict& d, const char* name) {
    return d.contains(name) ? reinterpret_cast<A*>(d[name].cast<uintptr_t>()) : nullptr;
}

template <typename T>
Features<T> features_of(const py::dict& d) {
    Features<T> f;
    f.image = at<T>(d, "image"), f.text = at<T>(d, "text");
    f.rows = d["rows"].cast<int>(), f.columns = d["columns"].cast<int>(), f.width = d["width"].cast<int>();
    f.image_stride = d["image_stride"].cast<int64_t>(), f.text_stride = d["text_stride"].cast<int64_t>();
    f.scale = at<Sum<T>>(d, "scale");
    f.image_factor = at<Sum<T>>(d, "image_factor"), f.text_factor = at<Sum<T>>(d, "text_factor");
    f.first_label = label_offset(d["first_label"].cast<int64_t>());
    return f;
}

// The features as the op hands them on: what is not ready for the kernels is copied as there.
template <typename T>
struct Padded {
    Features<T> features;
    std::vector<T> image, text;

    explicit Padded(const py::dict& d) : features(features_of<T>(d)) {
        Features<T>& f = features;
        const int width = Padding<T>::width(f.width);
        const auto pad = [&](const T*& matrix, int64_t& stride, int rows, std::vector<T>& memory) {
            if (!Padding<T>::is_needed(matrix, rows, f.width, stride)) return;
            memory.resize(static_cast<size_t>(rows) * width + 16 / sizeof(T));
            T* start = memory.data();
            while (reinterpret_cast<uintptr_t>(start) % 16) ++start;
            launch_pad_rows<T>(start, width, matrix, stride, f.width, rows, 0);
            matrix = start, stride = width;
        };
        pad(f.image, f.image_stride, f.rows, image), pad(f.text, f.text_stride, f.columns, text);
        f.width = width;
    }
};

template <typename Run>
auto by_dtype(const std::string& dtype, Run run) {
#ifndef CLIPFAST_FEW_DTYPES
    if (dtype == "float64") return run(double());
    if (dtype == "float16") return run(__half());
#endif
    if (dtype == "float32") return run(float());
    return run(__nv_bfloat16());
}

int stages(const py::dict& d) { return d.contains("stages") ? d["stages"].cast<int>() : kStages; }

StatisticsPlan statistics_plan(const py::dict& d) {
    return {d["group"].cast<int>(), d["shares"].cast<int>(), stages(d)};
}

int64_t softmax_numbers(const std::string& dtype, const py::dict& d) {
    return by_dtype(dtype, [&](auto x) { return statistics_plan(d).softmax_numbers(features_of<decltype(x)>(d)); });
}

void softmax_statistics(const std::string& dtype, const py::dict& d) {
    by_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        using A = Sum<T>;
        launch_softmax_statistics<T>(
            Padded<T>(d).features, statistics_plan(d), at<A>(d, "scratch"),
            {at<A>(d, "row_lse"), at<A>(d, "column_lse"), at<A>(d, "positive"), at<A>(d, "row_rival"),
             at<A>(d, "column_rival")},
            0);
    });
}

void sigmoid_statistics(const std::string& dtype, const py::dict& d) {
    by_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        using A = Sum<T>;
        launch_sigmoid_statistics<T>(
            Padded<T>(d).features, at<A>(d, "bias"), statistics_plan(d), at<A>(d, "scratch"), at<A>(d, "row_loss"), 0);
    });
}

// one chunk of rows of the logits' gradient, and the sums when `last`
void logit_gradient(const std::string& dtype, const py::dict& d) {
    by_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        using A = Sum<T>;
        const Padded<T> padded(d);
        const Features<T>& f = padded.features;
        const auto two_parts = [&](const char* name, int64_t size) {
            const A* lse = at<A>(d, name);
            return Lse<A>{lse, lse ? lse + size : nullptr};
        };
        const LogitGradient<A> g{at<A>(d, "row_weight"), at<A>(d, "column_weight"),     at<A>(d, "bias"),
                                 two_parts("row_lse", f.rows), two_parts("column_lse", f.columns), at<A>(d, "unit")};
        const int64_t row = d["row"].cast<int64_t>(), rows = d["chunk_rows"].cast<int64_t>();
        const GradientPlan plan{0, d["pitch"].cast<int64_t>(), d["shares"].cast<int>(), 0, stages(d)};
        const GradientPartials<A> partials{
            at<A>(d, "scale_sums"), at<A>(d, "bias_sums"), at<A>(d, "row_scratch")};
        if (row == 0) launch_unit<T>(f, g.row_weight, g.column_weight, at<A>(d, "unit"), 0);
        if (g.bias) {
            launch_logit_gradient<T, true>(f, g, plan, row, rows, at<T>(d, "out"), partials, at<A>(d, "row_loss"), 0);
        } else {
            launch_logit_gradient<T, false>(f, g, plan, row, rows, at<T>(d, "out"), partials, nullptr, 0);
        }
        if (row + rows < f.rows) return;
        launch_add_up<A>(partials.scale_sums, plan.sums(f), at<A>(d, "d_scale"), 0);
        if (g.bias) launch_add_up<A>(partials.bias_sums, plan.sums(f), at<A>(d, "d_bias"), 0);
    });
}

void accumulate(uintptr_t sum, uintptr_t part, int64_t count) {
    launch_accumulate<float>(reinterpret_cast<float*>(sum), reinterpret_cast<float*>(part), count, 0);
}

void finish_gradient(const std::string& dtype, const py::dict& d) {
    by_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        using A = Sum<T>;
        const auto finish = [&](auto* out) {
            launch_finish_gradient(
                out, at<const A>(d, "sum"), d["count"].cast<int64_t>(), at<const A>(d, "scale"), at<const A>(d, "unit"), 0);
        };
        d["wide"].cast<bool>() ? finish(at<A>(d, "gradient")) : finish(at<T>(d, "gradient"));
    });
}

int tile_rows(const std::string& dtype) {
    return by_dtype(dtype, [](auto x) { return kTileRows<decltype(x)>; });
}

// stages of the statistics' kernels of both losses and of the gradients', and the shared memory of a block of each
py::list rings(const std::string& dtype, int multiprocessor, int block) {
    return by_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        const SharedMemory shared{multiprocessor, block, 1024};
        const Features<T> f{nullptr, nullptr, 8192, 8192, 512};
        const int statistics = StatisticsPlan::make(f, 100, shared).stages, sums = GradientPlan::make(f, 100, shared).stages;
        py::list found;
        found.append(py::make_tuple(statistics, sizeof(StatisticsShared<T>) + statistics * kStageBytes<T>));
        found.append(py::make_tuple(sums, sizeof(GradientShared<T>) + sums * kStageBytes<T>));
        return found;
    });
}

// the multiple of blocks that a row of tiles gets
int shares(int64_t row_tiles, int64_t columns, int multiprocessors) {
    return shares_of(row_tiles, columns, multiprocessors);
}

// rows of a launch of the statistics and its shares; rows of a chunk of the gradients, its shares, and rows of the text
py::tuple plans(const std::string& dtype, int rows, int columns, int width, int multiprocessors) {
    return by_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        const SharedMemory shared{228 << 10, 227 << 10, 1024};
        const Features<T> f{nullptr, nullptr, rows, columns, width};
        const auto statistics = StatisticsPlan::make(f, multiprocessors, shared);
        const auto gradient = GradientPlan::make(f, multiprocessors, shared);
        return py::make_tuple(
            statistics.group * kTileRows<T>, statistics.shares, gradient.chunk, gradient.shares, gradient.text_block);
    });
}

}  // namespace

PYBIND11_MODULE(MODULE, m) {
    m.def("softmax_numbers", &softmax_numbers);
    m.def("softmax_statistics", &softmax_statistics);
    m.def("sigmoid_statistics", &sigmoid_statistics);
    m.def("logit_gradient", &logit_gradient);
    m.def("accumulate", &accumulate);
    m.def("finish_gradient", &finish_gradient);
    m.def("tile_rows", &tile_rows);
    m.def("hasty", [](bool whether) { shim::hasty = whether; });
    m.def("mistake", [](int which) { shim::mistake = which; });
    m.def("rings", &rings);
    m.def("shares", &shares);
    m.def("plans", &plans);
}
