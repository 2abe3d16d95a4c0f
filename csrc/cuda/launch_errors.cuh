// What an error of the CUDA runtime becomes.
//
// Two kinds are told apart. Where a launch never began, the device is as it was and PyTorch can compute the op instead:
// Python knows such an error by the words "a kernel could not be launched" and the error's name behind them. Everything
// else (out of memory, an illegal address, a capture that broke) is not the kernel's, or leaves nothing to go on with.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace clipfast {

inline bool never_began(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue:
        case cudaErrorInvalidConfiguration:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorInvalidResourceHandle:
        case cudaErrorInsufficientDriver:
        case cudaErrorCallRequiresNewerDriver:
        case cudaErrorInvalidKernelImage:
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidPtx:
        case cudaErrorUnsupportedPtxVersion:
        case cudaErrorJitCompilerNotFound:
        case cudaErrorJitCompilationDisabled:
        case cudaErrorSharedObjectSymbolNotFound:
        case cudaErrorSharedObjectInitFailed:
        case cudaErrorSymbolNotFound:
        case cudaErrorLaunchOutOfResources:
        case cudaErrorNotPermitted:
        case cudaErrorNotSupported:
            return true;
        default:
            return false;
    }
}

// Raises a RuntimeError for an error and takes it out of the runtime's memory, where a later check would find it again.
inline void check_launch(const char* op, cudaError_t error, const std::string& detail = "") {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();
    const char *name = cudaGetErrorName(error), *text = cudaGetErrorString(error);
    STD_TORCH_CHECK(!never_began(error), op, ": a kernel could not be launched: ", name, ": ", text, detail);
    // PyTorch's words for the same
    STD_TORCH_CHECK(false, op, ": CUDA error: ", text, " (", name, ")", detail);
}

// Lets a kernel have more shared memory than the 48 KB that need no leave.
template <typename Kernel>
void allow_shared(Kernel kernel, const char* name, int bytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) return;
    int device = 0, most = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        (void)cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const std::string limit = std::to_string(most) + " bytes of shared memory on device " + std::to_string(device);
    check_launch(name, error, " (it asks for " + std::to_string(bytes) + " of at most " + limit + ")");
}

}  // namespace clipfast
