// The Python extension module. Loading it registers the ops; pybind11 tells what was built and frees kept memory. No tensor crosses here.
#include <pybind11/pybind11.h>
#include <torch/headeronly/util/Exception.h>

#include "common/large_blocks.h"

#if defined(EF_WITH_CUDA)
#include <cuda_runtime.h>

#include "common/platform.h"

namespace ef {
void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": launch failed: ", cudaGetErrorString(error));
}
}  // namespace ef
#endif

namespace {
// The instruction set EF_CPU_CLONES picks on this processor.
const char* cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "baseline";
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = EF_COMPILER;
    info["torch"] = EF_TORCH_VERSION;
    info["cpu_levels"] = EF_CPU_LEVELS;
    info["cpu_level"] = cpu_level();
#if defined(EF_WITH_CUDA)
    info["cuda"] = EF_CUDA_VERSION;
    info["cuda_archs"] = EF_CUDA_ARCHS;
#else
    info["cuda"] = pybind11::none();
    info["cuda_archs"] = "";
#endif
    return info;
  });
  m.def("empty_cache", [] { ef::LargeBlocks::instance().empty(); });
}
