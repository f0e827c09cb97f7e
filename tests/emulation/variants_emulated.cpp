// benchmarks/variants for tests/benchmarks/test_variants.py, by ctypes: each variant on arrays of its caller, and the whole program.
#define EF_CUDA_ARCHS "none"
#define main variants_main
#include "../../benchmarks/variants/variants.cu"

namespace {
using namespace ef::variants;

// Calls the variant `name` of those that `each` goes through; whether there is one.
template <class Each, class... Args>
bool call(const char* name, Each&& each, Args... args) {
  bool found = false;
  each([&](const char* variant, const auto& plan) {
    if (std::strcmp(variant, name) != 0) return;
    found = true;
    plan(args...);
  });
  return found;
}
}  // namespace

extern "C" {
int run_all(const char* path) {
  const char* arguments[] = {"variants", path};
  return variants_main(2, const_cast<char**>(arguments));
}
void set_thread_order_seed(unsigned seed) { ef::emulation::thread_order_seed = seed; }

bool depthwise(const char* name, int kernel, int64_t n, int64_t c, int64_t h, int64_t w, int64_t tile_rows, const bf16* x,
               const bf16* weight, bf16* y) {
  const Map map{n, c, h, w, tile_rows};
  if (kernel == 5) return call(name, [&](auto&& f) { each_depthwise<5>(map, f); }, map, x, weight, y);
  return call(name, [&](auto&& f) { each_depthwise<3>(map, f); }, map, x, weight, y);
}
// Returns the sum of the losses; NaN where there is no such variant.
double loss(const char* name, int64_t rows, int64_t classes, double alpha, double smoothing, float scale, const bf16* logits,
            const int32_t* labels, bf16* grads) {
  const LossProblem problem{rows, classes, ef::focal_loss::Parameters<float>::of(alpha, 1.5, smoothing), scale};
  std::vector<float> partials(loss_blocks(problem));
  if (!call(name, [&](auto&& f) { each_loss(problem, f); }, problem, logits, labels, grads, partials.data())) return NAN;
  double sum = 0;
  for (float partial : partials) sum += partial;
  return sum;
}
bool chain(const char* name, int64_t chains, int64_t steps, Word* counter, Word* published) {
  return call(name, [&](auto&& f) { each_chain(chains, steps, f); }, steps, counter, published);
}
// In float32, and with the same coefficients in float64.
void low_polynomial(int degree, int64_t n, const float* s, float* single, double* exact) {
  for (int64_t i = 0; i < n; ++i) {
    single[i] = degree == 4 ? minus_log1m_low<4>(s[i]) : minus_log1m_low<3>(s[i]);
    exact[i] = degree == 4 ? minus_log1m_low<4>(double(s[i])) : minus_log1m_low<3>(double(s[i]));
  }
}
}
