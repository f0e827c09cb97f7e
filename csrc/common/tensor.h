// What every Tensor boundary (`<op>.cpp`) shares: allocation, device scope, dtype dispatch, registration.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "dtypes.h"
#include "huge_pages.h"
#include "platform.h"

#if defined(EF_EMULATE_CUDA)
#include "guarded_allocation.h"  // tests/emulation: NaN-filled memory between guard bytes
#endif

namespace ef {
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor just allocated.
inline Tensor in_huge_pages(Tensor fresh) {
  if (fresh.is_cpu()) prefer_huge_pages(fresh.mutable_data_ptr(), fresh.numel() * int64_t(fresh.element_size()));
  return fresh;
}

// Uninitialised tensor on the device of `like`.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                       MemoryFormat format = MemoryFormat::Contiguous) {
#if defined(EF_EMULATE_CUDA)
  return emulation::guarded_empty(sizes, emulation::dense_strides(sizes, format == MemoryFormat::ChannelsLast), dtype, like.device());
#else
  return in_huge_pages(torch::stable::empty(sizes, dtype, torch::headeronly::Layout::Strided, like.device(), false, format));
#endif
}

// Uninitialised tensor with the sizes, strides (of a dense tensor), dtype and device of `like`.
inline Tensor allocate_like(const Tensor& like) {
#if defined(EF_EMULATE_CUDA)
  const auto sizes = like.sizes(), strides = like.strides();
  return emulation::guarded_empty({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, like.scalar_type(), like.device());
#else
  return in_huge_pages(torch::stable::empty_like(like));
#endif
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
  Cuda device{nullptr};
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
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<c10::Half>();
    case ScalarType::BFloat16:
      return f.template operator()<c10::BFloat16>();
    default:
      STD_TORCH_CHECK(false, name, ": dtype must be float16, bfloat16, float32 or float64");
  }
}
}  // namespace ef

// EF_REGISTER(register_ops): register_ops<Device>(m) calls m.impl("name", TORCH_BOX(&function<Device>)) for each raw op. The emulated
// library registers the CUDA path for CPU tensors in a namespace of its own.
#if defined(EF_EMULATE_CUDA)
#define EF_REGISTER(register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(effdet_fast_emulated, CPU, m) { register_ops<ef::Cuda>(m); }
#elif defined(EF_WITH_CUDA)
#define EF_REGISTER(register_ops)                                              \
  STABLE_TORCH_LIBRARY_IMPL(effdet_fast, CPU, m) { register_ops<ef::Cpu>(m); } \
  STABLE_TORCH_LIBRARY_IMPL(effdet_fast, CUDA, m) { register_ops<ef::Cuda>(m); }
#else
#define EF_REGISTER(register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(effdet_fast, CPU, m) { register_ops<ef::Cpu>(m); }
#endif
