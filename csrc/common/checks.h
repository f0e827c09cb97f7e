// What a Tensor boundary asks before anything is read or written: the raw ops can be handed every tensor there is.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "choices.h"

namespace ef {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct DeviceId {
  int32_t type, index;
  bool operator==(const DeviceId&) const = default;
};
inline DeviceId device_of(const Tensor& x) {
  DeviceId device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device.index));
  return device;
}

// Whether every element lies inside the storage, which may have been resized below the tensor, at a whole number of elements.
inline bool is_there(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t last = x.storage_offset();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    last += (sizes[i] - 1) * strides[i];
  }
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  const int64_t element = int64_t(x.element_size());
  return (last + 1) * element <= bytes && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % element == 0;
}

// Of the arguments of a raw op, those that are tensors, one after the other.
class TensorChecker {
 public:
  explicit TensorChecker(const char* op) : op_(op) {}
  void see(const Tensor& x) {
    const DeviceId device = device_of(x);
    if (!first_) first_ = device;
    STD_TORCH_CHECK(device == *first_, op_, ": all tensors must be on one device, but tensor ", count_, " is on another than tensor 0");
    STD_TORCH_CHECK(is_there(x), op_, ": tensor ", count_, " must be aligned and lie inside its storage");
    ++count_;
  }
  void see(const std::optional<Tensor>& x) {
    if (x) see(*x);
  }
  void see(const std::vector<Tensor>& xs) {
    for (const Tensor& x : xs) see(x);
  }
  template <class Other>
  void see(const Other&) {}

 private:
  const char* op_;
  std::optional<DeviceId> first_;
  int count_ = 0;
};

// Whether the elements lie one after the other in the order of the layout, which for channels_last takes [n, c, h, w]; the stride of a
// dimension of size 1, and strides where there is no element, do not matter.
inline bool is_dense(const Tensor& x, bool channels_last) {
  if (!channels_last) return x.is_contiguous();
  if (x.dim() != 4) return false;
  if (x.numel() == 0) return true;
  int64_t expected = 1;
  for (const int axis : {1, 3, 2, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}
inline bool is_dense(const Tensor& x) { return is_dense(x, false) || is_dense(x, true); }
inline bool has_size_of(const Tensor& x, const Tensor& other) {
  const auto a = x.sizes(), b = other.sizes();
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}
inline bool is_shaped(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const auto a = x.sizes();
  return std::equal(a.begin(), a.end(), sizes.begin(), sizes.end());
}
inline bool is_plain(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return is_shaped(x, sizes) && x.is_contiguous() && x.scalar_type() == dtype;
}
inline bool is_dense_like(const Tensor& x, const Tensor& other, bool channels_last) {
  return has_size_of(x, other) && x.scalar_type() == other.scalar_type() && is_dense(x, channels_last);
}

// Where it costs no synchronization: every label, int64 or int32, is a class, -1 (background) or -2 (ignored).
inline void check_labels(const Tensor& labels, int64_t classes, const char* op) {
  if (!labels.is_cpu()) return;
  const auto check = [&](const auto* values) {
    for (int64_t i = 0, count = labels.numel(); i < count; ++i)
      STD_TORCH_CHECK(values[i] >= -2 && values[i] < classes, op, ": labels must be a class in [0, ", classes,
                      "), -1 (background) or -2 (ignored), got ", values[i]);
  };
  labels.scalar_type() == ScalarType::Long ? check(static_cast<const int64_t*>(labels.const_data_ptr()))
                                           : check(static_cast<const int32_t*>(labels.const_data_ptr()));
}

// A choice (choices.h) from its number in Python; `least` where not all are to be had.
template <class Choice>
Choice choice_of(int64_t number, const char* op, const char* name, Choice least = Choice{}) {
  constexpr int64_t kLast = count_of(Choice{}) - 1;
  STD_TORCH_CHECK(number >= int64_t(least) && number <= kLast, op, ": ", name, " must be a number from ", int64_t(least), " to ", kLast,
                  ", got ", number);
  return static_cast<Choice>(number);
}
inline Activation activation_of(int64_t number, const char* op) { return choice_of<Activation>(number, op, "activation"); }
}  // namespace ef
