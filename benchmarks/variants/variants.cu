// Measures the variants that no calculation decides: `variants FILE` prints a line of JSON for each and writes it to FILE. Exit status 0
// if all results agree with those of the first variant of their case, 1 if not. `python -m benchmarks.variants` builds it.
#include "chain.cuh"
#include "depthwise.cuh"
#include "harness.cuh"
#include "loss.cuh"

namespace ef::variants {
namespace {
// Read from the file by effdet_fast/_build_info.py.
[[gnu::used]] const char kBuildInfo[] = "effdet_fast build info: {\"cuda_archs\": \"" EF_CUDA_ARCHS "\"}";

#if defined(EF_EMULATE_CUDA)
constexpr bool kSmall = true;
#else
constexpr bool kSmall = false;
#endif

template <int kKernel>
void depthwise(Harness& harness, int64_t n, int64_t c, int64_t side) {
  const Map map = kSmall ? Map{1, c < 64 ? 32 : 72, 9, 7, 5} : Map{n, c, side, side, 32};
  const int64_t size = map.n * map.c * map.h * map.w;
  const Case of{"depthwise " + std::to_string(kKernel) + "x" + std::to_string(kKernel), {map.n, map.c, map.h, map.w}, 4. * size};
  DeviceArray<bf16> x(size), weight(map.c * kKernel * kKernel), y(size), plain(size);
  fill_random(x, 0, 1);
  fill_random(weight, 0, 0.3f);
  bool first = true;
  each_depthwise<kKernel>(map, [&](const char* name, const auto& plan) {
    y.fill(0xff);
    harness.measure(
        of, name, plan, 0, [] {},
        [&] {
          if (first) plain.copy_from(y);
          first = false;
          return largest_difference(y, plain);
        },
        map, x.get(), weight.get(), y.get());
  });
}

// `mean` and `deviation`: of the logits. A gradient may be rounded to the next of its 8 bits' numbers.
void loss(Harness& harness, const char* name, float mean, float deviation) {
  const int64_t images = kSmall ? 1 : 16, anchors = kSmall ? 112 : 98208;
  const LossProblem problem{images * anchors, 90, focal_loss::Parameters<float>::of(0.25, 1.5, 0), 1e-3f};
  const int64_t size = problem.rows * problem.classes;
  DeviceArray<bf16> x(size), grad(size), plain(size);
  DeviceArray<int32_t> labels(problem.rows);
  DeviceArray<float> partials(loss_blocks(problem)), plain_partials(partials.size());
  fill_random(x, mean, deviation);
  labels.fill(0xff);  // all background
  bool first = true;
  each_loss(problem, [&](const char* variant, const auto& plan) {
    grad.fill(0xff);
    partials.fill(0xff);
    harness.measure(
        {name, {images, anchors, problem.classes}, 4. * size}, variant, plan, 0.0079, [] {},
        [&] {
          if (first) {
            plain.copy_from(grad);
            plain_partials.copy_from(partials);
          }
          first = false;
          const double of_sums = 1e3 * largest_difference(partials, plain_partials), of_grads = largest_difference(grad, plain);
          return of_sums <= of_grads ? of_grads : of_sums;
        },
        problem, x.get(), labels.get(), grad.get(), partials.get());
  });
}

void chain(Harness& harness, int64_t chains, int64_t steps) {
  if (kSmall) chains = chains > 1 ? 2 : 1, steps = 5;
  DeviceArray<Word> counter(1), published(chains * steps * 2), plain(published.size());
  bool first = true;
  each_chain(chains, steps, [&](const char* variant, const auto& plan) {
    const auto prepare = [&] {
      counter.fill(0);
      published.fill(0);
    };
    const auto difference = [&] {
      if (first) plain.copy_from(published);
      first = false;
      std::vector<Word> a(published.size()), b(plain.size());
      check(cudaMemcpy(a.data(), published.get(), published.bytes(), cudaMemcpyDeviceToHost));
      check(cudaMemcpy(b.data(), plain.get(), plain.bytes(), cudaMemcpyDeviceToHost));
      double differing = 0;
      for (size_t i = 0; i < a.size(); ++i) differing += a[i] != b[i] || !(a[i] & nms::kPublished);
      return differing;
    };
    harness.measure({"chain", {chains, steps}, 0}, variant, plan, 0, prepare, difference, steps, counter.get(), published.get());
  });
}

// Each tensor has 64 MB and more: EfficientDet-D0's at 64 images, where those are smaller at 128.
void all(Harness& harness) {
  depthwise<3>(harness, 64, 32, 256);
  depthwise<5>(harness, 64, 240, 64);
  depthwise<3>(harness, 128, 480, 32);
  depthwise<5>(harness, 64, 672, 32);
  loss(harness, "loss, none above -2.7", -5.f, 0.5f);
  loss(harness, "loss, 0.2 % above -2.7", -6.f, 1.25f);
  chain(harness, 16, 79);  // 16 images of 5000 boxes of one class
  chain(harness, 1, 792);  // an image of 50 000
}
}  // namespace
}  // namespace ef::variants

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: variants FILE\n%s\n", ef::variants::kBuildInfo);
    return 2;
  }
  try {
    ef::variants::Harness harness(arguments[1]);
    ef::variants::all(harness);
    return harness.all_agree() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "variants: %s\n", error.what());
    return 1;
  }
}
