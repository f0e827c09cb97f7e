// The passes over the pieces of x, and who does which.
// Where there are enough channels for the threads, NCHW goes block by block of channels: the second pass finds them in the cache.
// The second pass over channels_last goes backwards, as the last chunks are still there.
// An exponential costs more than writing and reading a float: behind SiLU the backward's first pass leaves grad act'(z) in grad_x.
#include "../common/parallel.h"
#include "../common/platform.h"
#include "batch_norm_act_chunks.h"

namespace ef::batch_norm_act {
namespace {
// The four passes: prepare(begin, end) sets the constants of these channels, run(piece) does some of theirs.
template <typename scalar_t>
struct Moments {
  using A = acc_t<scalar_t>;
  Shape s;
  const scalar_t* x;
  A* partials;
  Chunks chunks;

  void prepare(int64_t, int64_t) {}
  void run(const Piece& piece) const {
    const int64_t sums = chunks.sums(piece), width = chunks.width;
    A *pivot = scratch<A>(0, chunks.lanes), *sum = scratch<A>(1, 2 * sums), *squares = sum + sums;
    set_pivots(piece, pivot + piece.channel);
    for (int64_t lane = s.c; lane < chunks.lanes; ++lane) pivot[lane] = pivot[lane - s.c];
    std::fill_n(sum, 2 * sums, A(0));
    for_spans(s, piece, [&](int64_t offset, int64_t count, int64_t k, auto of) {
      add_moments(x + offset, count, width, of(pivot), sum + k * width, squares + k * width);
    });
    A* out = partials + piece.chunk * 3 * s.c + piece.channel;
    std::copy_n(pivot + piece.channel, piece.channels, out);
    fold(sum, sums, piece.channels, s.inner > 1, out + s.c);
    fold(squares, sums, piece.channels, s.inner > 1, out + 2 * s.c);
  }
  // Medians of three pixels: the first, one in the middle, the last.
  void set_pivots(const Piece& piece, A* pivot) const {
    const scalar_t* first = x + piece.offset;
    if (s.inner == 1) {
      const int64_t last = piece.count - s.c;
      return medians(first, first + last / 2 / s.c * s.c, first + last, s.c, 1, pivot);
    }
    const int64_t image = s.c * s.inner, last = piece.images - 1;
    medians(first, first + last / 2 * image + piece.count / 2, first + last * image + piece.count - 1, piece.channels, s.inner, pivot);
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
  Chunks chunks;
  Constants<A> of_norm{};

  void prepare(int64_t begin, int64_t end) { of_norm.set(norm, s, chunks.lanes, begin, end); }
  void run(const Piece& piece) const {
    for_spans(s, piece, [&](int64_t offset, int64_t count, int64_t, auto of) {
      normalize<kActivation>(x + offset, count, chunks.width, of(of_norm.mean), of(of_norm.scale), of(of_norm.bias), y + offset);
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
  Chunks chunks;
  Constants<A> of_norm{};

  void prepare(int64_t begin, int64_t end) { of_norm.set(norm, s, chunks.lanes, begin, end); }
  void run(const Piece& piece) const {
    const int64_t sums = chunks.sums(piece), width = chunks.width;
    A *sum = scratch<A>(1, 2 * sums), *products = sum + sums;
    std::fill_n(sum, 2 * sums, A(0));
    for_spans(s, piece, [&](int64_t offset, int64_t count, int64_t k, auto of) {
      add_gradients<kActivation, kKeep>(in.grad + offset, in.x + offset, count, width, of(of_norm.mean), of(of_norm.scale),
                                        of(of_norm.bias), sum + k * width, products + k * width, kKeep ? kept + offset : nullptr);
    });
    A* out = in.partials + piece.chunk * 3 * s.c + piece.channel;
    fold(sum, sums, piece.channels, s.inner > 1, out);
    fold(products, sums, piece.channels, s.inner > 1, out + s.c);
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
  Chunks chunks;
  Constants<A> of_norm{};
  A *shift = nullptr, *slope = nullptr;

  void prepare(int64_t begin, int64_t end) {
    const int64_t lanes = chunks.lanes;
    of_norm.set(norm, s, lanes, begin, end);
    shift = scratch<A>(2, 2 * lanes);
    slope = shift + lanes;
    fill_lanes(shift, lanes, s.c, begin, end, [&](int64_t c) {
      const GradChannel<A> of_channel = norm.grad_channel(sums, factor, s.c, c);
      return std::array{of_channel.shift, of_channel.slope};
    });
  }
  void run(const Piece& piece) const {
    for_spans(s, piece, [&](int64_t offset, int64_t count, int64_t, auto of) {
      input_gradients<kActivation>(grad + offset, x + offset, count, chunks.width, of(of_norm.mean), of(of_norm.scale), of(of_norm.bias),
                                   of(shift), of(slope), grad_x + offset);
    });
  }
};

template <class Pass>
void run_all(const Shape& s, const Pass& prototype, bool backwards) {
  const Chunks& chunks = prototype.chunks;
  const int64_t blocks = chunks.blocks(s), pieces = chunks.count * blocks;
  parallel_for(pieces, std::max<int64_t>(1, kChunk * pieces / (s.c * s.values())), [&](int64_t begin, int64_t end) {
    Pass pass = prototype;
    pass.prepare(0, s.c);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = backwards ? begin + end - 1 - i : i;
      pass.run(chunks.piece(s, at / blocks, at % blocks));
    }
  });
}

// Both passes over one block of channels after the other; `between(first, last + 1)` ends the first for its channels.
bool goes_by_block(const Shape& s, const Chunks& chunks) {
  uint32_t threads = 1;
  return s.inner > 1 && torch_get_num_threads(&threads) == 0 && chunks.blocks(s) >= 2 * int64_t(threads);
}
template <class First, class Second, class Between>
void run_both_by_block(const Shape& s, const First& first, const Second& second, const Between& between) {
  const Chunks& chunks = first.chunks;
  parallel_for(chunks.blocks(s), std::max<int64_t>(1, kChunk / (s.values() * chunks.channels)), [&](int64_t begin, int64_t end) {
    First one = first;
    Second two = second;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channel = block * chunks.channels, last = std::min(s.c, channel + chunks.channels);
      one.prepare(channel, last);
      for (int64_t i = 0; i < chunks.count; ++i) one.run(chunks.piece(s, i, block));
      between(channel, last);
      two.prepare(channel, last);
      for (int64_t i = chunks.count - 1; i >= 0; --i) two.run(chunks.piece(s, i, block));
    }
  });
}

template <typename A>
EF_CPU_CLONES void finish_moments(const Shape& s, const Chunks& chunks, const A* __restrict partials, int64_t begin, int64_t end,
                                  const Statistics<A>& statistics) {
  double totals[kLanes], means[kLanes];
  const int64_t lanes = end - begin;
  std::fill_n(totals, lanes, 0.0);
  for (int64_t i = 0; i < chunks.count; ++i) {
    const A *pivot = partials + i * 3 * s.c + begin, *sum = pivot + s.c;
    const double count = double(chunks.values(s, i));
    for (int64_t j = 0; j < lanes; ++j) totals[j] += count * pivot[j] + sum[j];
  }
  for (int64_t j = 0; j < lanes; ++j) {
    means[j] = totals[j] / double(s.values());
    totals[j] = 0;
  }
  for (int64_t i = 0; i < chunks.count; ++i) {
    const A *pivot = partials + i * 3 * s.c + begin, *sum = pivot + s.c, *squares = sum + s.c;
    const double count = double(chunks.values(s, i));
    for (int64_t j = 0; j < lanes; ++j) totals[j] += squares_about(means[j], count, pivot[j], sum[j], squares[j]);
  }
  for (int64_t j = 0; j < lanes; ++j) {
    statistics.set(begin + j, A(means[j]), A(totals[j] < 0 ? 0 : totals[j] / double(s.values())), s.values());
  }
}

template <typename A>
EF_CPU_CLONES void finish_sums(const Shape& s, const Chunks& chunks, const Norm<A>& norm, const A* __restrict partials, int64_t begin,
                               int64_t end, A* __restrict sums) {
  double totals[2][kLanes] = {};
  const int64_t lanes = end - begin;
  for (int64_t i = 0; i < chunks.count; ++i) {
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
  const int64_t grain = std::max<int64_t>(1, kChunk / (kLanes * partials));
  parallel_for(ceil_div(s.c, kLanes), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) f(block * kLanes, std::min(s.c, (block + 1) * kLanes));
  });
}
}  // namespace

int64_t partial_count(Cpu, const Shape& s) { return Chunks(s).count; }

template <typename scalar_t>
void launch_stats(Cpu, const Shape& s, const scalar_t* x, acc_t<scalar_t>* partials, const Statistics<acc_t<scalar_t>>& statistics) {
  const Chunks chunks(s);
  run_all(s, Moments<scalar_t>{s, x, partials, chunks}, false);
  for_channel_blocks(s, chunks.count, [&](int64_t begin, int64_t end) { finish_moments(s, chunks, partials, begin, end, statistics); });
}

template <typename scalar_t>
void launch_forward(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, scalar_t* y) {
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_all(s, Forward<kActivation, scalar_t>{s, norm, x, y, Chunks::image_by_image(s)}, true);
  });
}

template <typename scalar_t>
void launch_train(Cpu cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* x, acc_t<scalar_t>* partials,
                  const Statistics<acc_t<scalar_t>>& statistics, scalar_t* y) {
  const Chunks chunks(s);
  if (!goes_by_block(s, chunks)) {
    launch_stats(cpu, s, x, partials, statistics);
    return launch_forward(cpu, s, norm, x, y);
  }
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_both_by_block(s, Moments<scalar_t>{s, x, partials, chunks}, Forward<kActivation, scalar_t>{s, norm, x, y, chunks},
                      [&](int64_t begin, int64_t end) { finish_moments(s, chunks, partials, begin, end, statistics); });
  });
}

template <typename scalar_t>
void launch_sums(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in) {
  const Chunks chunks(s);
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_all(s, Sums<kActivation, false, scalar_t>{s, norm, in, nullptr, chunks}, false);
  });
  for_channel_blocks(s, chunks.count, [&](int64_t begin, int64_t end) { finish_sums(s, chunks, norm, in.partials, begin, end, in.sums); });
}

template <typename scalar_t>
void launch_grad_input(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const scalar_t* grad, const scalar_t* x,
                       const acc_t<scalar_t>* sums, double factor, scalar_t* grad_x) {
  using A = acc_t<scalar_t>;
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    run_all(s, InputGradient<kActivation, scalar_t>{s, norm, grad, x, sums, A(factor), grad_x, Chunks::image_by_image(s)}, true);
  });
}

template <typename scalar_t>
void launch_train_backward(Cpu, const Shape& s, const Norm<acc_t<scalar_t>>& norm, const Gradients<scalar_t>& in, scalar_t* grad_x) {
  using A = acc_t<scalar_t>;
  const Chunks chunks(s);
  const A factor = A(1.0 / double(s.values()));
  const auto finish = [&](int64_t begin, int64_t end) { finish_sums(s, chunks, norm, in.partials, begin, end, in.sums); };
  dispatch_activation(int64_t(norm.activation), [&]<Activation kActivation>() {
    constexpr bool kKeep = kActivation == Activation::kSilu && std::is_same_v<scalar_t, A>;
    constexpr Activation kLeft = kKeep ? Activation::kNone : kActivation;
    const Sums<kActivation, kKeep, scalar_t> first{s, norm, in, grad_x, chunks};
    const InputGradient<kLeft, scalar_t> second{s, norm, kKeep ? grad_x : in.grad, in.x, in.sums, factor, grad_x, chunks};
    if (goes_by_block(s, chunks)) return run_both_by_block(s, first, second, finish);
    run_all(s, first, false);
    for_channel_blocks(s, chunks.count, finish);
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
