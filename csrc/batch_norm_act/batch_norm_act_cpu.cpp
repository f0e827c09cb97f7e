// The passes over the segments of x, and who does which.
// Where there are enough channels for the threads, NCHW goes channel by channel: the second pass over a channel finds it in the cache.
// The second pass over channels_last goes backwards, as the last segments are still there.
// An exponential costs more than writing and reading a float: behind SiLU the backward's first pass leaves grad act'(z) in grad_x.
#include "../common/dtypes.h"
#include "../common/parallel.h"
#include "batch_norm_act_segments.h"

namespace ef::batch_norm_act {
namespace {
// The four passes: prepare(channel) sets the constants of the lanes for segments that start with this channel, run(segment) does one.
template <typename scalar_t>
struct Moments {
  using A = acc_t<scalar_t>;
  Shape s;
  const scalar_t* x;
  A* partials;
  Segments segments;

  void prepare(int64_t) {}
  void run(const Segment& segment) const {
    const int64_t width = segments.width;
    A *pivot = scratch<A>(0, 3 * width), *sum = pivot + width, *squares = sum + width;
    const scalar_t* first = x + segment.offset;
    const int64_t pixel = s.inner == 1 ? s.c : 1, last = segment.count - pixel, middle = last / 2 / pixel * pixel;
    medians(first, first + middle, first + last, pixel, pivot);
    for (int64_t lane = pixel; lane < width; ++lane) pivot[lane] = pivot[lane - pixel];
    std::fill_n(sum, 2 * width, A(0));
    add_moments(first, segment.count, width, pivot, sum, squares);
    A* out = partials + segment.index * 3 * s.c;
    s.inner == 1 ? void(std::copy_n(pivot, s.c, out)) : void(out[segment.channel] = pivot[0]);
    fold(sum, width, s, segment.channel, out + s.c);
    fold(squares, width, s, segment.channel, out + 2 * s.c);
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
  A* lanes = nullptr;

  void prepare(int64_t channel) {
    const int64_t width = segments.width;
    lanes = scratch<A>(0, 3 * width);
    fill_lanes(lanes, width, s, channel, [&](int64_t c) {
      const Channel<A> constants = norm.channel(c);
      return std::array{constants.mean, constants.scale, constants.bias};
    });
  }
  void run(const Segment& segment) const {
    const int64_t width = segments.width;
    normalise<kActivation>(x + segment.offset, segment.count, width, lanes, lanes + width, lanes + 2 * width, y + segment.offset);
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
  Forward<kActivation, scalar_t> constants{s, norm, nullptr, nullptr, segments};

  void prepare(int64_t channel) { constants.prepare(channel); }
  void run(const Segment& segment) const {
    const int64_t width = segments.width;
    const A* lanes = constants.lanes;
    A *sum = scratch<A>(1, 2 * width), *products = sum + width;
    std::fill_n(sum, 2 * width, A(0));
    add_gradients<kActivation, kKeep>(in.grad + segment.offset, in.x + segment.offset, segment.count, width, lanes, lanes + width,
                                      lanes + 2 * width, sum, products, kKeep ? kept + segment.offset : nullptr);
    A* out = in.partials + segment.index * 3 * s.c;
    fold(sum, width, s, segment.channel, out);
    fold(products, width, s, segment.channel, out + s.c);
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
  Forward<kActivation, scalar_t> constants{s, norm, nullptr, nullptr, segments};
  A* lanes = nullptr;

  void prepare(int64_t channel) {
    const int64_t width = segments.width;
    constants.prepare(channel);
    lanes = scratch<A>(1, 2 * width);
    fill_lanes(lanes, width, s, channel, [&](int64_t c) {
      const GradChannel<A> of_channel = norm.grad_channel(sums, factor, s.c, c);
      return std::array{of_channel.shift, of_channel.slope};
    });
  }
  void run(const Segment& segment) const {
    const int64_t width = segments.width;
    const A* of_norm = constants.lanes;
    input_gradients<kActivation>(grad + segment.offset, x + segment.offset, segment.count, width, of_norm, of_norm + width,
                                 of_norm + 2 * width, lanes, lanes + width, grad_x + segment.offset);
  }
};

// One channel's segments, from the last to the first if `backwards`.
template <class Pass>
void run_channel(const Shape& s, Pass& pass, int64_t channel, bool backwards) {
  pass.prepare(channel);
  const int64_t pieces = pass.segments.per_plane, all = s.n * pieces;
  for (int64_t i = 0; i < all; ++i) {
    const int64_t piece = backwards ? all - 1 - i : i;
    pass.run(pass.segments.of_plane(s, piece / pieces, channel, piece % pieces));
  }
}

template <class Pass>
void run_all(const Shape& s, const Pass& prototype, bool backwards) {
  const Segments& segments = prototype.segments;
  if (s.inner == 1) {
    parallel_for(segments.count, 1, [&](int64_t begin, int64_t end) {
      Pass pass = prototype;
      pass.prepare(0);
      for (int64_t i = begin; i < end; ++i) pass.run(segments.of_pixels(s, backwards ? begin + end - 1 - i : i));
    });
    return;
  }
  parallel_for(s.n * s.c, std::max<int64_t>(1, kSegment / s.inner), [&](int64_t begin, int64_t end) {
    Pass pass = prototype;
    for (int64_t plane = begin; plane < end; ++plane) {
      pass.prepare(plane % s.c);
      for (int64_t i = 0; i < segments.per_plane; ++i) pass.run(segments.of_plane(s, plane / s.c, plane % s.c, i));
    }
  });
}

// Both passes over one channel after the other; `between` ends the first for a channel.
bool goes_by_channel(const Shape& s) {
  uint32_t threads = 1;
  return s.inner > 1 && torch_get_num_threads(&threads) == 0 && s.c >= 2 * int64_t(threads);
}
template <class First, class Second, class Between>
void run_both_by_channel(const Shape& s, const First& first, const Second& second, const Between& between) {
  parallel_for(s.c, std::max<int64_t>(1, kSegment / s.values()), [&](int64_t begin, int64_t end) {
    First one = first;
    Second two = second;
    for (int64_t channel = begin; channel < end; ++channel) {
      run_channel(s, one, channel, false);
      between(channel);
      run_channel(s, two, channel, true);
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
  dispatch_activation(int64_t(norm.activation),
                      [&]<Activation kActivation>() { run_all(s, Forward<kActivation, scalar_t>{s, norm, x, y, Segments(s)}, true); });
}

template <typename scalar_t>
void launch_train(Cpu cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics, scalar_t* y) {
  if (!goes_by_channel(s)) {
    launch_stats(cpu, s, x, partials, statistics);
    return launch_forward(cpu, s, norm, x, y);
  }
  const Segments segments(s);
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_both_by_channel(s, Moments<scalar_t>{s, x, partials, segments}, Forward<kActivation, scalar_t>{s, norm, x, y, segments},
                        [&](int64_t channel) { finish_moments(s, segments, partials, channel, channel + 1, statistics); });
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
    run_all(s, InputGradient<kActivation, scalar_t>{s, norm, grad, x, sums, A(factor), grad_x, Segments(s)}, true);
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
    if (goes_by_channel(s)) return run_both_by_channel(s, first, second, [&](int64_t channel) { finish(channel, channel + 1); });
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
