// Starting a kernel and reaching its shared memory. All shared memory is dynamic, so that the emulation can poison and bound it.
#pragma once
#include "platform.h"

#if defined(EF_EMULATE_CUDA)
#include "cuda_emulation.h"  // tests/emulation: the same functions for a host compiler
#else
#include <stdexcept>
#include <string>

namespace ef {
inline void check_cuda(const char* name, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Cuda device, Args... args) {
  if (shared_bytes > (48u << 10)) {  // above the default the kernel must opt in
    check_cuda(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(device.stream)>>>(static_cast<Params>(args)...);
  check_cuda(name, cudaGetLastError());
}

template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}
}  // namespace ef
#endif
