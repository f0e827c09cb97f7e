// The few functions of CUDA's runtime that our host code calls, on the memory and the clock of the host; streams and graphs of emulated
// launches. A launch ends before the next begins, whatever their streams, unless `between_blocks` makes one in the middle of another.
#pragma once
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ef::emulation {
inline void* stream = nullptr;                       // the current one
inline unsigned long long capture = 0;               // the id of the capture that launches go to; 0: none, they run
inline std::vector<std::function<void()>> captured;  // launches, of all captures
// Called in the middle of each launch with the number of blocks that have run; the launch is killed where it returns true.
inline bool (*between_blocks)(uint64_t blocks) = nullptr;

inline void run_between_blocks(const char* name, uint64_t blocks) {
  if (!between_blocks) return;
  const auto call = std::exchange(between_blocks, nullptr);  // not in launches that it makes
  const bool is_killed = call(blocks);
  between_blocks = call;
  if (is_killed) throw std::runtime_error(std::string(name) + ": killed");
}
}  // namespace ef::emulation

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = void*;
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
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id) {
  *status = ef::emulation::capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (ef::emulation::capture) *id = ef::emulation::capture;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return *id = reinterpret_cast<uintptr_t>(stream), cudaSuccess;
}
