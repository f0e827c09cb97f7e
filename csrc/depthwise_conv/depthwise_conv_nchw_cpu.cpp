// One plane after the other, vectorised along the row. The rows a result needs are copied once each, converted, activated and padded
// with zeros, into a ring of scratch lines; for stride 2 forward, even and odd columns apart. So every tap reads consecutive values,
// and no column is special.
#include "depthwise_conv_cpu.h"

namespace ef::depthwise_conv {
namespace {
constexpr int kMaxTaps = 25;
constexpr int kMaxRows = 5;
constexpr int64_t kMaxLanes = 8;

int64_t padded(int64_t columns) { return ceil_div(columns, kMaxLanes) * kMaxLanes; }

// The taps of one row of results: out[j] = init + sum over i of filter[i] * in[i][j].
template <typename A>
struct Taps {
  const A* in[kMaxTaps];  // each readable up to the padded number of columns
  A filter[kMaxTaps];
  int count = 0;
  void add(const A* line, A weight) {
    in[count] = line;
    filter[count++] = weight;
  }
};

template <int kVectors, typename V, typename A>
EF_HD void convolve_tile(const Taps<A>& taps, A init, A* out, int64_t j) {
  V sum[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) sum[v] = V{} + init;
  for (int i = 0; i < taps.count; ++i) {
    const V w = V{} + taps.filter[i];
    const A* in = taps.in[i] + j;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[v] += load<V>(in + v * kLanes<V, A>) * w;
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) store<V>(out + j + v * kLanes<V, A>, sum[v]);
}

// `out` holds the padded number of columns.
template <typename A>
EF_CPU_CLONES void convolve_line(const Taps<A>& taps, A init, A* out, int64_t columns) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t kStep = kLanes<V, A>;
  int64_t j = 0;
  for (; j + 7 * kStep < columns; j += 8 * kStep) convolve_tile<8, V>(taps, init, out, j);
  for (; j + 1 * kStep < columns; j += 2 * kStep) convolve_tile<2, V>(taps, init, out, j);
  for (; j < columns; j += kStep) convolve_tile<1, V>(taps, init, out, j);
}

template <typename V, typename A>
EF_HD A sum_of_lanes(const V& v) {
  A sum = 0;
  for (int i = 0; i < kLanes<V, A>; ++i) sum += v[i];
  return sum;
}

// sums[t] += sum over j of grad[j] * line[t % kStep][j + t / kStep].
template <int kTaps, int kStep, typename A>
EF_CPU_CLONES void correlate_line(const A* grad, const A* line, int64_t line_step, int64_t columns, A* sums) {
  using V = typename VectorOf<A>::type;
  V sum[kTaps] = {};
  int64_t j = 0;
  for (; j + kLanes<V, A> <= columns; j += kLanes<V, A>) {
    const V g = load<V>(grad + j);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) sum[t] += g * load<V>(line + t % kStep * line_step + j + t / kStep);
  }
  A rest[kTaps] = {};
  for (; j < columns; ++j) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) rest[t] += grad[j] * line[t % kStep * line_step + j + t / kStep];
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) sums[t] += sum_of_lanes<V, A>(sum[t]) + rest[t];
}

template <typename A>
EF_CPU_CLONES A sum_line(const A* line, int64_t columns) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) sum += line[j];
  return sum;
}

// out[p][j] = prologue(in[offset + j step + p]), zero outside [0, columns); `count` values of each of the `step` phases.
template <Activation kPrologue, typename scalar_t, typename A>
EF_CPU_CLONES void load_line(const scalar_t* __restrict in, int64_t columns, int64_t offset, int step, A* __restrict out, int64_t count) {
  for (int p = 0; p < step; ++p, out += count) {
    const int64_t start = offset + p;
    const int64_t first = std::clamp<int64_t>(start < 0 ? ceil_div(-start, step) : 0, 0, count);
    const int64_t last = std::clamp<int64_t>(columns > start ? ceil_div(columns - start, step) : 0, first, count);
    for (int64_t j = 0; j < first; ++j) out[j] = A(0);
    if (step == 1) {
      for (int64_t j = first; j < last; ++j) out[j] = activate<kPrologue>(A(in[start + j]));
    } else {
      for (int64_t j = first; j < last; ++j) out[j] = activate<kPrologue>(A(in[start + 2 * j]));
    }
    for (int64_t j = last; j < count; ++j) out[j] = A(0);
  }
}

// out[j step] = value[j], converted, times the derivative of the prologue at x[j step].
template <Activation kPrologue, typename scalar_t, typename A>
EF_CPU_CLONES void finish_line(const A* __restrict value, const scalar_t* __restrict x, scalar_t* __restrict out, int step,
                               int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    A v = value[j];
    if constexpr (kPrologue != Activation::kNone) v *= activate_grad<kPrologue>(A(x[j * step]));
    out[j * step] = scalar_t(v);
  }
}

// The rows of a plane as scratch lines, the last few of them held.
template <typename scalar_t>
class Lines {
  using A = acc_t<scalar_t>;

 public:
  Lines(int64_t columns, int64_t offset, int step, int64_t count, Activation prologue, int slot)
      : columns_(columns),
        offset_(offset),
        count_(count),
        step_(step),
        prologue_(prologue),
        ring_(scratch<A>(slot, kMaxRows * step * count)) {}

  void start_plane(const scalar_t* plane) {
    plane_ = plane;
    std::fill_n(held_, kMaxRows, -1);
  }
  const A* row(int64_t i) {
    A* out = ring_ + i % kMaxRows * step_ * count_;
    if (held_[i % kMaxRows] != i) {
      held_[i % kMaxRows] = i;
      dispatch_activation(int64_t(prologue_), [&]<Activation kPrologue>() {
        load_line<kPrologue>(plane_ + i * columns_, columns_, offset_, step_, out, count_);
      });
    }
    return out;
  }
  int64_t count() const { return count_; }

 private:
  int64_t columns_, offset_, count_;
  int step_;
  Activation prologue_;
  A* ring_;
  const scalar_t* plane_ = nullptr;
  int64_t held_[kMaxRows];
};
}  // namespace

template <typename scalar_t>
std::vector<acc_t<scalar_t>> Nchw::pack_filter(const Shape& s, const scalar_t* weight, bool) {
  return std::vector<acc_t<scalar_t>>(weight, weight + s.c * s.kernel * s.kernel);
}

template <typename scalar_t>
void Nchw::forward(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* filter, const acc_t<scalar_t>* bias, scalar_t* y,
                   const Block& block) {
  using A = acc_t<scalar_t>;
  Lines<scalar_t> lines(s.w, -s.left, s.stride, padded(s.ow) + s.kernel, s.prologue, 0);
  A* line = scratch<A>(1, padded(s.ow));
  for (int64_t c = block.first_channel; c < block.last_channel; ++c) {
    const int64_t plane = block.n * s.c + c;
    const A* w = filter + c * s.kernel * s.kernel;
    lines.start_plane(x + plane * s.h * s.w);
    for (int64_t oy = block.first_row; oy < block.last_row; ++oy) {
      Taps<A> taps;
      for (int ky = 0; ky < s.kernel; ++ky) {
        const int64_t iy = oy * s.stride - s.top + ky;
        if (iy < 0 || iy >= s.h) continue;
        const A* row = lines.row(iy);
        for (int kx = 0; kx < s.kernel; ++kx) taps.add(row + kx % s.stride * lines.count() + kx / s.stride, w[ky * s.kernel + kx]);
      }
      convolve_line(taps, bias ? bias[c] : A(0), line, s.ow);
      scalar_t* out = y + (plane * s.oh + oy) * s.ow;
      finish_line<Activation::kNone, scalar_t>(line, nullptr, out, 1, s.ow);
    }
  }
}

template <typename scalar_t>
void Nchw::grad_input(const Shape& s, const scalar_t* grad, const scalar_t* x, const acc_t<scalar_t>* filter, scalar_t* grad_x,
                      const Block& block) {
  using A = acc_t<scalar_t>;
  int64_t start[2], offset[2];  // per phase: its first column, and the output column its first tap reads there
  for (int p = 0; p < s.stride; ++p) {
    start[p] = phase_start(s.left, s.stride, p);
    offset[p] = (start[p] + s.left) / s.stride - (phase_taps(s.kernel, s.stride, p) - 1);
  }
  const int64_t base = s.stride == 1 ? offset[0] : std::min(offset[0], offset[1]);
  Lines<scalar_t> lines(s.ow, base, 1, padded(ceil_div(s.w, s.stride)) + s.kernel + 1, Activation::kNone, 0);
  A* line = scratch<A>(1, padded(ceil_div(s.w, s.stride)));
  for (int64_t c = block.first_channel; c < block.last_channel; ++c) {
    const int64_t plane = block.n * s.c + c;
    const A* w = filter + c * s.kernel * s.kernel;
    lines.start_plane(grad + plane * s.oh * s.ow);
    for (int64_t iy = block.first_row; iy < block.last_row; ++iy) {
      const int q = int((iy + s.top) % s.stride), row_taps = phase_taps(s.kernel, s.stride, q);
      for (int p = 0; p < s.stride; ++p) {
        if (start[p] >= s.w) continue;
        Taps<A> taps;
        for (int i = 0; i < row_taps; ++i) {
          const int64_t oy = (iy + s.top) / s.stride - (row_taps - 1) + i;
          if (oy < 0 || oy >= s.oh) continue;
          const A* row = lines.row(oy) + (offset[p] - base);
          const int ky = phase_tap(s.kernel, s.stride, q, i);
          for (int t = 0; t < phase_taps(s.kernel, s.stride, p); ++t)
            taps.add(row + t, w[ky * s.kernel + phase_tap(s.kernel, s.stride, p, t)]);
        }
        const int64_t columns = ceil_div(s.w - start[p], s.stride), at = (plane * s.h + iy) * s.w + start[p];
        convolve_line(taps, A(0), line, columns);
        dispatch_activation(int64_t(s.prologue),
                            [&]<Activation kPrologue>() { finish_line<kPrologue>(line, x + at, grad_x + at, s.stride, columns); });
      }
    }
  }
}

template <typename scalar_t>
void Nchw::grad_weight(const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partial, bool with_bias,
                       const Slab& slab) {
  using A = acc_t<scalar_t>;
  const int taps = s.kernel * s.kernel;
  Lines<scalar_t> lines(s.w, -s.left, s.stride, padded(s.ow) + s.kernel, s.prologue, 0);
  Lines<scalar_t> grad_lines(s.ow, 0, 1, padded(s.ow), Activation::kNone, 1);
  const auto correlate = s.kernel == 3 ? (s.stride == 1 ? correlate_line<3, 1, A> : correlate_line<3, 2, A>)
                                       : (s.stride == 1 ? correlate_line<5, 1, A> : correlate_line<5, 2, A>);
  for (int64_t c = slab.first_channel; c < slab.last_channel; ++c) {
    A sums[kMaxTaps + 1] = {};
    for (int64_t i = slab.first_row; i < slab.last_row; ++i) {
      const int64_t n = i / s.oh, oy = i % s.oh, plane = n * s.c + c;
      if (i == slab.first_row || oy == 0) {
        lines.start_plane(x + plane * s.h * s.w);
        grad_lines.start_plane(grad + plane * s.oh * s.ow);
      }
      const A* g = grad_lines.row(oy);
      for (int ky = 0; ky < s.kernel; ++ky) {
        const int64_t iy = oy * s.stride - s.top + ky;
        if (iy >= 0 && iy < s.h) correlate(g, lines.row(iy), lines.count(), s.ow, sums + ky * s.kernel);
      }
      if (with_bias) sums[taps] += sum_line(g, s.ow);
    }
    for (int t = 0; t <= taps; ++t) partial[t * s.c + c] = sums[t];
  }
}

#define EF_DEFINE(scalar_t)                                                                                                            \
  template std::vector<acc_t<scalar_t>> Nchw::pack_filter(const Shape&, const scalar_t*, bool);                                        \
  template void Nchw::forward(const Shape&, const scalar_t*, const acc_t<scalar_t>*, const acc_t<scalar_t>*, scalar_t*, const Block&); \
  template void Nchw::grad_input(const Shape&, const scalar_t*, const scalar_t*, const acc_t<scalar_t>*, scalar_t*, const Block&);     \
  template void Nchw::grad_weight(const Shape&, const scalar_t*, const scalar_t*, acc_t<scalar_t>*, bool, const Slab&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::depthwise_conv
