// The few functions of CUDA's runtime that benchmarks/variants/harness.cuh calls, on the memory and the clock of the host.
#pragma once
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
struct cudaFuncAttributes {
  int numRegs = 0;
  size_t localSizeBytes = 0;
};
using cudaEvent_t = std::chrono::steady_clock::time_point*;

inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaMalloc(void** p, size_t bytes) { return posix_memalign(p, 256, bytes) ? cudaErrorMemoryAllocation : cudaSuccess; }
inline void cudaFree(void* p) { std::free(p); }
inline cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return std::memset(p, byte, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new std::chrono::steady_clock::time_point, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, void*) { return *event = std::chrono::steady_clock::now(), cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  return *milliseconds = std::chrono::duration<float, std::milli>(*end - *begin).count(), cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) { return *attributes = {}, cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { return *blocks = 1, cudaSuccess; }
