// Device memory, random values, comparison and timing for variants.cu; a line of JSON for each measurement.
#pragma once
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/common/launch.cuh"
#include "chain.cuh"
#include "launch_plan.h"
#if defined(EF_EMULATE_CUDA)
#include "runtime_emulation.h"  // tests/emulation
#endif

namespace ef::variants {
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) { check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes())); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }
  int64_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void fill(int byte) { check(cudaMemset(data_, byte, bytes())); }
  void copy_from(const DeviceArray& other) { check(cudaMemcpy(data_, other.data_, bytes(), cudaMemcpyDeviceToDevice)); }

 private:
  T* data_ = nullptr;
  int64_t size_;
};

// Nearly normal: of the sum of four uniform numbers.
__global__ void random_kernel(c10::BFloat16* x, int64_t n, float mean, float deviation) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const Word bits = mixed(Word(i) + 1);
    float sum = -2;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += float(bits >> (16 * k) & 0xffff) * (1.f / 65536);
    x[i] = c10::BFloat16(mean + deviation * 1.7320508f * sum);
  }
}
inline void fill_random(const DeviceArray<c10::BFloat16>& x, float mean, float deviation) {
  launch("random", random_kernel, 1024, 256, 0, Cuda{nullptr}, x.get(), x.size(), mean, deviation);
}

// The largest |a - b| / max(|a|, |b|), as the bits of a float; NaN, which what was never written is, differs infinitely from anything.
template <typename T>
__global__ void difference_kernel(const T* a, const T* b, int64_t n, unsigned* largest) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  float found = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const float x = float(a[i]), y = float(b[i]);
    if (x == y) continue;
    const float size = fabsf(x) > fabsf(y) ? fabsf(x) : fabsf(y), difference = fabsf(x - y) / size;
    if (!(difference <= found)) found = difference == difference ? difference : INFINITY;
  }
  unsigned bits;
  std::memcpy(&bits, &found, sizeof(bits));
  if (bits) atomicMax(largest, bits);
}
template <typename T>
double largest_difference(const DeviceArray<T>& a, const DeviceArray<T>& b) {
  DeviceArray<unsigned> result(1);
  result.fill(0);
  launch("difference", difference_kernel<T>, 1024, 256, 0, Cuda{nullptr}, a.get(), b.get(), a.size(), result.get());
  float found;
  check(cudaMemcpy(&found, result.get(), sizeof(found), cudaMemcpyDeviceToHost));
  return found;
}

// What is measured: bytes that must move; 0 where that says nothing.
struct Case {
  std::string name;
  std::vector<int64_t> shape;
  double bytes;
};

class Harness {
 public:
  explicit Harness(const char* path) : file_(std::fopen(path, "w")), flush_(kFlushBytes) {
    if (!file_) throw std::runtime_error(std::string("cannot write ") + path);
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~Harness() { std::fclose(file_); }

  // Milliseconds of the fastest of some runs, each behind prepare() and with another content in the L2 cache.
  template <class Prepare, class Run>
  double best(Prepare&& prepare, Run&& run) {
    double least = 0;
    for (int i = 0; i <= kRuns; ++i) {
      prepare();
      flush_.fill(i);
      check(cudaEventRecord(begin_, nullptr));
      run();
      check(cudaEventRecord(end_, nullptr));
      check(cudaEventSynchronize(end_));
      float milliseconds;
      check(cudaEventElapsedTime(&milliseconds, begin_, end_));
      if (i == 1 || (i > 1 && milliseconds < least)) least = milliseconds;  // the first run loads code
    }
    return least;
  }

  // `difference()`: of the results from those of the plain variant; more than `tolerance` is wrong.
  template <class... Params, class Prepare, class Difference, class... Args>
  void measure(const Case& of, const char* variant, const LaunchPlan<Params...>& plan, double tolerance, Prepare&& prepare,
               Difference&& difference, Args... args) {
    const double milliseconds = best(prepare, [&] { plan(args...); });
    const double found = difference();
    const bool agrees = found <= tolerance;
    all_agree_ = all_agree_ && agrees;
    cudaFuncAttributes attributes;
    int blocks = 0;
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(plan.kernel)));
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(plan.kernel),
                                                        int(plan.block.x * plan.block.y), plan.shared_bytes));
    std::string line = "{\"case\": \"" + of.name + "\", \"variant\": \"" + variant + "\", \"shape\": [";
    for (size_t i = 0; i < of.shape.size(); ++i) line += (i ? ", " : "") + std::to_string(of.shape[i]);
    line += "], \"milliseconds\": " + number(milliseconds) + ", \"bytes\": " + number(of.bytes);
    line += ", \"percent_of_copy\": " + (of.bytes > 0 ? number(100 * copy_milliseconds(of.bytes) / milliseconds) : "null");
    line += ", \"agrees\": " + std::string(agrees ? "true" : "false") + ", \"difference\": " + (found <= 1e9 ? number(found) : "null");
    line += ", \"registers\": " + std::to_string(attributes.numRegs) + ", \"local_bytes\": " + std::to_string(attributes.localSizeBytes);
    line +=
        ", \"shared_bytes\": " + std::to_string(plan.shared_bytes) + ", \"blocks_per_multiprocessor\": " + std::to_string(blocks) + "}\n";
    for (std::FILE* out : {file_, stdout}) {
      std::fputs(line.c_str(), out);
      std::fflush(out);
    }
  }
  bool all_agree() const { return all_agree_; }

 private:
#if defined(EF_EMULATE_CUDA)
  static constexpr int64_t kFlushBytes = 1 << 10, kRuns = 1;
#else
  static constexpr int64_t kFlushBytes = 256 << 20, kRuns = 30;
#endif
  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.6g", value);
    return text;
  }
  // Of so many bytes, read and written together.
  double copy_milliseconds(double bytes) {
    if (bytes != copied_) {
      DeviceArray<c10::BFloat16> source(int64_t(bytes / 4)), target(int64_t(bytes / 4));
      fill_random(source, 0, 1);
      copy_ = best([] {}, [&] { target.copy_from(source); });
      copied_ = bytes;
    }
    return copy_;
  }

  std::FILE* file_;
  DeviceArray<unsigned char> flush_;
  cudaEvent_t begin_, end_;
  double copied_ = 0, copy_ = 0;
  bool all_agree_ = true;
};
}  // namespace ef::variants
