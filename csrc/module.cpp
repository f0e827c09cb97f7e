// effdet_fast._C, the optional Python module: helpers for the host, in pybind11. The kernels' libraries know nothing of it, and no
// tensor crosses here.
#include <pybind11/pybind11.h>

namespace {
// Those instruction sets beyond the architecture's baseline that this processor and its system have.
pybind11::list processor_features() {
  pybind11::list found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#define EF_ASK(name) \
  if (__builtin_cpu_supports(name)) found.append(name);
  EF_ASK("sse4.2")
  EF_ASK("avx")
  EF_ASK("fma")
  EF_ASK("avx2")
  EF_ASK("avx512f")
  EF_ASK("avx512bw")
  EF_ASK("avx512dq")
  EF_ASK("avx512vl")
  EF_ASK("avx512vnni")
  EF_ASK("avx512bf16")
#undef EF_ASK
#endif
  return found;
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("processor_features", &processor_features,
        "The instruction sets beyond the baseline that this processor has; empty where the compiler cannot ask.");
}
