// What the Tensor boundaries (`<op>.cpp`) share: allocation, the outputs of an op that detects, device scope, dtype dispatch,
// registration.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "detections.h"
#include "platform.h"

#if defined(EF_EMULATE_CUDA)
#include "guarded_allocation.h"  // tests/emulation: NaN-filled memory between guard bytes
#include "runtime_emulation.h"   // and streams
#elif !defined(EF_WITH_CUDA) && !defined(__SANITIZE_ADDRESS__)
#include "caching_allocator.h"  // whose spare bytes would hide an overrun from the sanitizer
#define EF_CACHING_ALLOCATOR
#endif

namespace ef {
inline int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short:
      return 2;
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool:
      return 1;
    default:
      STD_TORCH_CHECK(false, "effdet_fast: no op has outputs of this dtype");
  }
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, bool channels_last) {
  if (channels_last) return {sizes[1] * sizes[3] * sizes[2], 1, sizes[1] * sizes[3], sizes[1]};
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

template <class Sizes>
int64_t bytes_of(const Sizes& sizes, ScalarType dtype) {
  int64_t bytes = element_bytes(dtype);
  bool fits = true;
  for (const int64_t size : sizes) fits = fits && size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes);
  STD_TORCH_CHECK(fits, "effdet_fast: an output's sizes must not be negative, nor its bytes beyond 64 bits");
  return bytes;
}

// Uninitialized. By plain functions of PyTorch's: a call of its dispatcher costs several times as much as a small allocation.
template <class Sizes>
Tensor allocate_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype, [[maybe_unused]] int64_t bytes) {
#if defined(EF_EMULATE_CUDA)
  return emulation::guarded_empty({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, dtype, like.device());
#else
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const DeviceId device = device_of(like);
#if defined(EF_CACHING_ALLOCATOR)
  if (like.is_cpu() && bytes >= CachingAllocator::kLeast) {
    return torch::stable::from_blob(CachingAllocator::instance().allocate(bytes), {sizes.data(), sizes.size()},
                                    {strides.data(), strides.size()}, like.device(), dtype,
                                    [](void* block) { CachingAllocator::instance().free(block); });
  }
#endif
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), code, device.type, device.index, &handle));
  return Tensor(handle);
#endif
}

// Uninitialized tensor on the device of `like`, dense.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last = false) {
  const int64_t bytes = bytes_of(sizes, dtype);  // first: strides of sizes that are none would overflow
  return allocate_strided(like, sizes, dense_strides(sizes, channels_last), dtype, bytes);
}

// Uninitialized tensor with the sizes, strides (of a dense tensor), dtype and device of `like`.
inline Tensor allocate_like(const Tensor& like) {
  return allocate_strided(like, like.sizes(), like.strides(), like.scalar_type(), bytes_of(like.sizes(), like.scalar_type()));
}

// The dtype sums are returned in: that of the arithmetic.
inline ScalarType acc_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

template <typename T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
const T* const_data(const std::optional<Tensor>& x) {
  return x.has_value() ? const_data<T>(*x) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The five outputs of an op that detects.
struct DetectionTensors {
  Tensor boxes, scores, labels, indices, counts;

  // Of images with boxes [batch, n, 4], `max_detections` rows each.
  DetectionTensors(const Tensor& like, int64_t max_detections)
      : boxes(allocate(like, {like.size(0), max_detections, 4}, like.scalar_type())),
        scores(allocate(like, {like.size(0), max_detections}, like.scalar_type())),
        labels(allocate(like, {like.size(0), max_detections}, ScalarType::Long)),
        indices(allocate(like, {like.size(0), max_detections}, ScalarType::Long)),
        counts(allocate(like, {like.size(0)}, ScalarType::Long)) {}

  template <typename scalar_t>
  Detections<scalar_t> data() const {
    return {mutable_data<scalar_t>(boxes), mutable_data<scalar_t>(scores), mutable_data<int64_t>(labels), mutable_data<int64_t>(indices),
            mutable_data<int64_t>(counts)};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const { return {boxes, scores, labels, indices, counts}; }
};

// Makes the device of a tensor the current one for as long as it lives, and knows the current stream.
template <class Device>
struct DeviceScope;
template <>
struct DeviceScope<Cpu> {
  explicit DeviceScope(const Tensor&) {}
  Cpu device;
};
#if defined(EF_EMULATE_CUDA)
template <>
struct DeviceScope<Cuda> {
  explicit DeviceScope(const Tensor&) {}
  Cuda device{emulation::stream};
};
#elif defined(EF_WITH_CUDA)
template <>
struct DeviceScope<Cuda> {
  explicit DeviceScope(const Tensor& x) : guard(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &device.stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  Cuda device{nullptr};
};
#endif

// Calls f.template operator()<scalar_t>() for the dtype.
template <class F>
void dispatch_floating(ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
#if !defined(EF_ONLY_FLOAT32)
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Half:
      return f.template operator()<c10::Half>();
    case ScalarType::BFloat16:
      return f.template operator()<c10::BFloat16>();
#endif
    default:
      STD_TORCH_CHECK(false, name, ": dtype must be float16, bfloat16, float32 or float64");
  }
}

// A raw op's name as a template argument.
template <size_t kSize>
struct OpName {
  char text[kSize];
  constexpr OpName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

// A boundary behind the check of all its tensors.
template <OpName kName, auto kFunction>
struct Checked;
template <OpName kName, class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Checked<kName, kFunction> {
  static Result call(Arguments... arguments) {
    TensorChecker checker(kName.text);
    (checker.see(arguments), ...);
    return kFunction(arguments...);
  }
};
template <OpName kName, auto kFunction>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl(kName.text, TORCH_BOX((&Checked<kName, kFunction>::call)));
}
}  // namespace ef

// EF_REGISTER(register_ops): register_ops<Device>(m) calls implement<"name", function<Device>>(m) for each raw op. A boundary is
// compiled once for each library, which registers its device. The emulated library registers the CUDA path for CPU tensors; it, and a
// sanitized build of the CPU's, have a namespace of their own.
#if !defined(EF_NAMESPACE)
#define EF_NAMESPACE effdet_fast
#endif
#if defined(EF_EMULATE_CUDA)
#define EF_REGISTER(register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(EF_NAMESPACE, CPU, m) { register_ops<ef::Cuda>(m); }
#elif defined(EF_WITH_CUDA)
#define EF_REGISTER(register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(EF_NAMESPACE, CUDA, m) { register_ops<ef::Cuda>(m); }
#else
#define EF_REGISTER(register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(EF_NAMESPACE, CPU, m) { register_ops<ef::Cpu>(m); }
#endif
