#include "entry_points.h"

#include <dlfcn.h>

namespace clipfast {
namespace {

CudaEntryPoints find() {
    CudaEntryPoints found;
    // the copy that PyTorch loaded, and no other: RTLD_NOLOAD gives null where there is none
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) {
        found.missing = "this process holds no libtorch_cuda.so: its PyTorch was built without CUDA";
        return found;
    }
    const char* name = "aoti_torch_get_current_cuda_stream";
    found.current_stream = reinterpret_cast<decltype(found.current_stream)>(dlsym(library, name));
    if (found.current_stream == nullptr) found.missing = std::string("PyTorch's libtorch_cuda.so has no ") + name;
    return found;
}

}  // namespace

const CudaEntryPoints& cuda_entry_points() {
    static const CudaEntryPoints found = find();
    return found;
}

}  // namespace clipfast
