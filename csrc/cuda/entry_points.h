// The functions that only a PyTorch with CUDA has, found while the process runs.
//
// They lie in libtorch_cuda. The op library cannot name that one, because it also has to load where there is none. A
// weak symbol would not do either: Python loads PyTorch with RTLD_LOCAL, so the symbol would stay null although
// libtorch_cuda is there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <string>

namespace clipfast {

struct CudaEntryPoints {
    // writes the device's current stream, a cudaStream_t
    AOTITorchError (*current_stream)(int32_t device, void** stream) = nullptr;
    std::string missing;  // what is not there and why; empty where all were found
};

// Looks for them at the first call, from whichever thread that comes.
const CudaEntryPoints& cuda_entry_points();

}  // namespace clipfast
