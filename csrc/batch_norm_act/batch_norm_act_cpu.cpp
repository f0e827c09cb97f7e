// The passes over the parts of x, and who does which.
// Where there are enough channels for the threads, NCHW goes block by block of channels: the second pass finds them in the cache.
// The second pass over channels_last goes backwards, as the last segments are still there.
// An exponential costs more than writing and reading a float: behind SiLU the backward's first pass leaves grad act'(z) in grad_x.
#include "../common/parallel.h"
#include "../common/platform.h"
#include "batch_norm_act_segments.h"

namespace ef::batch_norm_act {
namespace {
// The four passes: prepare(begin, end) sets the constants of these channels, run(part) does some of theirs.
template <typename scalar_t>
struct Moments {
  using A = acc_t<scalar_t>;
  Shape s;
  const scalar_t* x;
  A* partials;
  Segments segments;

  void prepare(int64_t, int64_t) {}
  void run(const Part& part) const {
    const int64_t sums = segments.sums(part), width = segments.width;
    A *pivot = scratch<A>(0, segments.lanes), *sum = scratch<A>(1, 2 * sums), *squares = sum + sums;
    set_pivots(part, pivot + part.channel);
    for (int64_t lane = s.c; lane < segments.lanes; ++lane) pivot[lane] = pivot[lane - s.c];
    std::fill_n(sum, 2 * sums, A(0));
    for_runs(s, part, [&](int64_t offset, int64_t count, int64_t k, auto of) {
      add_moments(x + offset, count, width, of(pivot), sum + k * width, squares + k * width);
    });
    A* out = partials + part.segment * 3 * s.c + part.channel;
    std::copy_n(pivot + part.channel, part.channels, out);
    fold(sum, sums, part.channels, s.inner > 1, out + s.c);
    fold(squares, sums, part.channels, s.inner > 1, out + 2 * s.c);
  }
  // Medians of three pixels: the first, one in the middle, the last.
  void set_pivots(const Part& part, A* pivot) const {
    const scalar_t* first = x + part.offset;
    if (s.inner == 1) {
      const int64_t last = part.count - s.c;
      return medians(first, first + last / 2 / s.c * s.c, first + last, s.c, 1, pivot);
    }
    const int64_t image = s.c * s.inner, last = part.images - 1;
    medians(first, first + last / 2 * image + part.count / 2, first + last * image + part.count - 1, part.channels, s.inner, pivot);
  }
};

template <typename A>
struct Constants {
  A *mean = nullptr, *scale = nullptr, *bias = nullptr;

  void set(const Norm<A>& norm, const Shape& s, int64_t lanes, int64_t begin, int64_t end) {
    mean = scratch<A>(0, 3 * lanes);
    scale = mean + lanes;
    bias = scale + lanes;
    fill_lanes(mean, lanes, s.c, begin, end, [&](int64_t c) {
      const Channel<A> channel = norm.channel(c);
      return std::array{channel.mean, channel.scale, channel.bias};
    });
  }
};

template <Activation kActivation, typename scalar_t>
struct Forward {
  using A = acc_t<scalar_t>;
  Shape s;
  Norm<A> norm;
  const scalar_t* x;
  scalar_t* y;
  Segments segments;
  Constants<A> of_norm{};

  void prepare(int64_t begin, int64_t end) { of_norm.set(norm, s, segments.lanes, begin, end); }
  void run(const Part& part) const {
    for_runs(s, part, [&](int64_t offset, int64_t count, int64_t, auto of) {
      normalize<kActivation>(x + offset, count, segments.width, of(of_norm.mean), of(of_norm.scale), of(of_norm.bias), y + offset);
    });
  }
};

template <Activation kActivation, bool kKeep, typename scalar_t>
struct Sums {
  using A = acc_t<scalar_t>;
  Shape s;
  Norm<A> norm;
  Gradients<scalar_t> in;
  scalar_t* kept;
  Segments segments;
  Constants<A> of_norm{};

  void prepare(int64_t begin, int64_t end) { of_norm.set(norm, s, segments.lanes, begin, end); }
  void run(const Part& part) const {
    const int64_t sums = segments.sums(part), width = segments.width;
    A *sum = scratch<A>(1, 2 * sums), *products = sum + sums;
    std::fill_n(sum, 2 * sums, A(0));
    for_runs(s, part, [&](int64_t offset, int64_t count, int64_t k, auto of) {
      add_gradients<kActivation, kKeep>(in.grad + offset, in.x + offset, count, width, of(of_norm.mean), of(of_norm.scale),
                                        of(of_norm.bias), sum + k * width, products + k * width, kKeep ? kept + offset : nullptr);
    });
    A* out = in.partials + part.segment * 3 * s.c + part.channel;
    fold(sum, sums, part.channels, s.inner > 1, out);
    fold(products, sums, part.channels, s.inner > 1, out + s.c);
  }
};

template <Activation kActivation, typename scalar_t>
struct InputGradient {
  using A = acc_t<scalar_t>;
  Shape s;
  Norm<A> norm;
  const scalar_t* grad;
  const scalar_t* x;
  const A* sums;
  A factor;
  scalar_t* grad_x;
  Segments segments;
  Constants<A> of_norm{};
  A *shift = nullptr, *slope = nullptr;

  void prepare(int64_t begin, int64_t end) {
    const int64_t lanes = segments.lanes;
    of_norm.set(norm, s, lanes, begin, end);
    shift = scratch<A>(2, 2 * lanes);
    slope = shift + lanes;
    fill_lanes(shift, lanes, s.c, begin, end, [&](int64_t c) {
      const GradChannel<A> of_channel = norm.grad_channel(sums, factor, s.c, c);
      return std::array{of_channel.shift, of_channel.slope};
    });
  }
  void run(const Part& part) const {
    for_runs(s, part, [&](int64_t offset, int64_t count, int64_t, auto of) {
      input_gradients<kActivation>(grad + offset, x + offset, count, segments.width, of(of_norm.mean), of(of_norm.scale), of(of_norm.bias),
                                   of(shift), of(slope), grad_x + offset);
    });
  }
};

template <class Pass>
void run_all(const Shape& s, const Pass& prototype, bool backwards) {
  const Segments& segments = prototype.segments;
  const int64_t blocks = segments.blocks(s), parts = segments.count * blocks;
  parallel_for(parts, std::max<int64_t>(1, kSegment * parts / (s.c * s.values())), [&](int64_t begin, int64_t end) {
    Pass pass = prototype;
    pass.prepare(0, s.c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = backwards ? begin + end - 1 - i : i;
      pass.run(segments.part(s, at / blocks, at % blocks));
    }
  });
}

// Both passes over one block of channels after the other; `between(first, last + 1)` ends the first for its channels.
bool goes_by_block(const Shape& s, const Segments& segments) {
  uint32_t threads = 1;
  return s.inner > 1 && torch_get_num_threads(&threads) == 0 && segments.blocks(s) >= 2 * int64_t(threads);
}
template <class First, class Second, class Between>
void run_both_by_block(const Shape& s, const First& first, const Second& second, const Between& between) {
  const Segments& segments = first.segments;
  parallel_for(segments.blocks(s), std::max<int64_t>(1, kSegment / (s.values() * segments.channels)), [&](int64_t begin, int64_t end) {
    First one = first;
    Second two = second;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channel = block * segments.channels, last = std::min(s.c, channel + segments.channels);
      one.prepare(channel, last);
      for (int64_t i = 0; i < segments.count; ++i) one.run(segments.part(s, i, block));
      between(channel, last);
      two.prepare(channel, last);
      for (int64_t i = segments.count - 1; i >= 0; --i) two.run(segments.part(s, i, block));
    }
  });
}

template <typename A>
EF_CPU_CLONES void finish_moments(const Shape& s, const Segments& segments, const A* __restrict partials, int64_t begin, int64_t end,
                                  const Statistics<A>& statistics) {
  double totals[kLanes], means[kLanes];
  const int64_t lanes = end - begin;
  std::fill_n(totals, lanes, 0.0);
  for (int64_t i = 0; i < segments.count; ++i) {
    const A *pivot = partials + i * 3 * s.c + begin, *sum = pivot + s.c;
    const double count = double(segments.values(s, i));
    for (int64_t j = 0; j < lanes; ++j) totals[j] += count * pivot[j] + sum[j];
  }
  for (int64_t j = 0; j < lanes; ++j) {
    means[j] = totals[j] / double(s.values());
    totals[j] = 0;
  }
  for (int64_t i = 0; i < segments.count; ++i) {
    const A *pivot = partials + i * 3 * s.c + begin, *sum = pivot + s.c, *squares = sum + s.c;
    const double count = double(segments.values(s, i));
    for (int64_t j = 0; j < lanes; ++j) totals[j] += squares_about(means[j], count, pivot[j], sum[j], squares[j]);
  }
  for (int64_t j = 0; j < lanes; ++j) {
    statistics.set(begin + j, A(means[j]), A(totals[j] < 0 ? 0 : totals[j] / double(s.values())), s.values());
  }
}

template <typename A>
EF_CPU_CLONES void finish_sums(const Shape& s, const Segments& segments, const Norm<A>& norm, const A* __restrict partials, int64_t begin,
                               int64_t end, A* __restrict sums) {
  double totals[2][kLanes] = {};
  const int64_t lanes = end - begin;
  for (int64_t i = 0; i < segments.count; ++i) {
    const A *sum = partials + i * 3 * s.c + begin, *products = sum + s.c;
    for (int64_t j = 0; j < lanes; ++j) {
      totals[0][j] += sum[j];
      totals[1][j] += products[j];
    }
  }
  for (int64_t j = 0; j < lanes; ++j) {
    sums[begin + j] = A(totals[0][j]);
    sums[s.c + begin + j] = A(totals[1][j] * inverse_deviation(norm.var[begin + j], norm.eps));
  }
}

// f(first channel, last channel + 1), of at most kLanes.
template <class F>
void for_channel_blocks(const Shape& s, int64_t partials, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kSegment / (kLanes * partials));
  parallel_for(ceil_div(s.c, kLanes), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) f(block * kLanes, std::min(s.c, (block + 1) * kLanes));
  });
}
}  // namespace

int64_t partial_count(Cpu, const Shape& s) { return Segments(s).count; }

template <typename scalar_t>
void launch_stats(Cpu, const Shape& s, const scalar_t* x, acc_t<scalar_t>* partials, const Statistics<acc_t<scalar_t>>& statistics) {
  const Segments segments(s);
  run_all(s, Moments<scalar_t>{s, x, partials, segments}, false);
  for_channel_blocks(s, segments.count, [&](int64_t begin, int64_t end) { finish_moments(s, segments, partials, begin, end, statistics); });
}

template <typename scalar_t>
void launch_forward(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, scalar_t* y) {
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_all(s, Forward<kActivation, scalar_t>{s, norm, x, y, Segments::image_by_image(s)}, true);
  });
}

template <typename scalar_t>
void launch_train(Cpu cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics, scalar_t* y) {
  const Segments segments(s);
  if (!goes_by_block(s, segments)) {
    launch_stats(cpu, s, x, partials, statistics);
    return launch_forward(cpu, s, norm, x, y);
  }
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_both_by_block(s, Moments<scalar_t>{s, x, partials, segments}, Forward<kActivation, scalar_t>{s, norm, x, y, segments},
                      [&](int64_t begin, int64_t end) { finish_moments(s, segments, partials, begin, end, statistics); });
  });
}

template <typename scalar_t>
void launch_sums(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in) {
  const Segments segments(s);
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_all(s, Sums<kActivation, false, scalar_t>{s, norm, in, nullptr, segments}, false);
  });
  for_channel_blocks(s, segments.count,
                     [&](int64_t begin, int64_t end) { finish_sums(s, segments, norm, in.partials, begin, end, in.sums); });
}

template <typename scalar_t>
void launch_grad_input(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* grad, const scalar_t* x,
                       const acc_t<scalar_t>* sums, double factor, scalar_t* grad_x) {
  using A = acc_t<scalar_t>;
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_all(s, InputGradient<kActivation, scalar_t>{s, norm, grad, x, sums, A(factor), grad_x, Segments::image_by_image(s)}, true);
  });
}

template <typename scalar_t>
void launch_train_backward(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in, scalar_t* grad_x) {
  using A = acc_t<scalar_t>;
  const Segments segments(s);
  const A factor = A(1.0 / double(s.values()));
  const auto finish = [&](int64_t begin, int64_t end) { finish_sums(s, segments, norm, in.partials, begin, end, in.sums); };
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    constexpr bool kKeep = kActivation == Activation::kSilu && std::is_same_v<scalar_t, A>;
    constexpr Activation kLeft = kKeep ? Activation::kNone : kActivation;
    const Sums<kActivation, kKeep, scalar_t> first{s, norm, in, grad_x, segments};
    const InputGradient<kLeft, scalar_t> second{s, norm, kKeep ? grad_x : in.grad, in.x, in.sums, factor, grad_x, segments};
    if (goes_by_block(s, segments)) return run_both_by_block(s, first, second, finish);
    run_all(s, first, false);
    for_channel_blocks(s, segments.count, finish);
    run_all(s, second, true);
  });
}

#define EF_DEFINE(T)                                                                                                             \
  template void launch_stats<T>(Cpu, const Shape&, const T*, acc_t<T>*, const Statistics<acc_t<T>>&);                            \
  template void launch_forward<T>(Cpu, const Shape&, const Norm<acc_t<T>>&, const T*, T*);                                       \
  template void launch_train<T>(Cpu, const Shape&, const Norm<acc_t<T>>&, const T*, acc_t<T>*, const Statistics<acc_t<T>>&, T*); \
  template void launch_sums<T>(Cpu, const Shape&, const Norm<acc_t<T>>&, const Gradients<T>&);                                   \
  template void launch_grad_input<T>(Cpu, const Shape&, const Norm<acc_t<T>>&, const T*, const T*, const acc_t<T>*, double, T*); \
  template void launch_train_backward<T>(Cpu, const Shape&, const Norm<acc_t<T>>&, const Gradients<T>&, T*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::batch_norm_act
