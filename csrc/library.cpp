// What each library of kernels (CPU, CUDA) says about itself: as ops, and in its file, where it can be read without loading it.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_info.h"  // written by setup.py: EF_BUILD_INFO, members of a JSON object as a string literal
#include "common/choices.h"

#if !defined(EF_WITH_CUDA)
#include "common/caching_allocator.h"
#endif

namespace {
// effdet_fast/_build_info.py looks for the words before the object.
constexpr char kMark[] = "effdet_fast build info: ";
#define EF_TELL(name, ...) #name "(" #__VA_ARGS__ ") "
[[gnu::used]] constexpr char kMarkedInfo[] =
    "effdet_fast build info: {" EF_BUILD_INFO ", \"choices\": \"" EF_CHOICES(EF_TELL) EF_LIMITS(EF_TELL) "\"}";
#undef EF_TELL

std::string build_info() { return kMarkedInfo + sizeof(kMark) - 1; }

#if !defined(EF_WITH_CUDA)
// The instruction set EF_CPU_CLONES picks on this processor.
std::string cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "baseline";
}

void empty_cache() { ef::CachingAllocator::instance().empty(); }
#endif
}  // namespace

#if defined(EF_WITH_CUDA)
STABLE_TORCH_LIBRARY_FRAGMENT(effdet_fast, m) { m.def("cuda_build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(effdet_fast, CompositeExplicitAutograd, m) { m.impl("cuda_build_info", TORCH_BOX(&build_info)); }
#else
STABLE_TORCH_LIBRARY_FRAGMENT(effdet_fast, m) {
  m.def("cpu_build_info() -> str");
  m.def("cpu_level() -> str");
  m.def("empty_cache() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(effdet_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_build_info", TORCH_BOX(&build_info));
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}
#endif
