// How a kernel is started, apart from its arguments.
#pragma once
#include "../../csrc/common/launch.cuh"

namespace ef::variants {
template <class... Params>
struct LaunchPlan {
  void (*kernel)(Params...);
  dim3 grid, block;
  size_t shared_bytes;

  template <class... Args>
  void operator()(Args... args) const {
    launch("variant", kernel, grid, block, shared_bytes, Cuda{nullptr}, args...);
  }
};
template <class... Params>
LaunchPlan(void (*)(Params...), dim3, dim3, size_t) -> LaunchPlan<Params...>;
}  // namespace ef::variants
