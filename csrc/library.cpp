// The op library: schemas that every backend implements, and what this build holds.
//
// Only PyTorch's stable ABI is used, so one file serves every PyTorch from 2.10 on.

#include <torch/csrc/stable/library.h>

#include <string>

namespace clipfast {

#define CLIPFAST_STRING_(x) #x
#define CLIPFAST_STRING(x) CLIPFAST_STRING_(x)

// "key=value" fields between semicolons, so that one glance at a bug report says what was built, and how.
std::string build_info() {
    std::string info = "compiler=" __VERSION__;
    info += ";torch_target=" CLIPFAST_STRING(TORCH_TARGET_VERSION);
#if defined(__x86_64__)
    info += ";cpu=x86_64";
#elif defined(__aarch64__)
    info += ";cpu=aarch64";
#else
    info += ";cpu=other";
#endif
    info += ";cuda=none";
    return info;
}

}  // namespace clipfast

STABLE_TORCH_LIBRARY(clipfast, m) {
    m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(clipfast, CompositeExplicitAutograd, m) {
    m.impl("build_info", TORCH_BOX(&clipfast::build_info));
}
