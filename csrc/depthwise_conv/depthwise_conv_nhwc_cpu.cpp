// Channels last: which rows of the image meet which rows of the filter; the loops along them are in depthwise_conv_nhwc_rows.h.
#include "depthwise_conv_nhwc_rows.h"

namespace ef::depthwise_conv {
namespace {
// The rows of a tensor [rows, columns, c] as A, with the prologue applied: in place where nothing has to be done, else through a ring
// that holds the last few.
template <typename scalar_t>
class Rows {
  using A = acc_t<scalar_t>;

 public:
  Rows(const scalar_t* data, int64_t columns, int64_t all_channels, int64_t first_channel, int64_t channels, Activation prologue, int slot)
      : data_(data + first_channel),
        columns_(columns),
        all_channels_(all_channels),
        channels_(channels),
        prologue_(prologue),
        ring_(is_direct() ? nullptr : scratch<A>(slot, kMaxRows * columns * channels)) {}

  int64_t step() const { return is_direct() ? all_channels_ : channels_; }

  const A* row(int64_t i) {
    const scalar_t* in = data_ + i * columns_ * all_channels_;
    if constexpr (std::is_same_v<scalar_t, A>) {
      if (is_direct()) return in;
    }
    A* out = ring_ + i % kMaxRows * columns_ * channels_;
    if (held_[i % kMaxRows] != i) {
      held_[i % kMaxRows] = i;
      dispatch_activation(int64_t(prologue_),
                          [&]<Activation kPrologue>() { load_row<kPrologue>(in, all_channels_, out, columns_, channels_); });
    }
    return out;
  }

 private:
  bool is_direct() const { return std::is_same_v<scalar_t, A> && prologue_ == Activation::kNone; }

  const scalar_t* data_;
  int64_t columns_, all_channels_, channels_;
  Activation prologue_;
  A* ring_;
  int64_t held_[kMaxRows] = {-1, -1, -1, -1, -1};
};

// Where a row of results is computed: in the tensor itself, or in scratch to be converted from.
template <typename scalar_t>
acc_t<scalar_t>* working_row(scalar_t* row, int64_t columns, int64_t channels) {
  if constexpr (std::is_same_v<scalar_t, acc_t<scalar_t>>) return row;
  return scratch<acc_t<scalar_t>>(2, columns * channels);
}
}  // namespace

template <typename scalar_t>
std::vector<acc_t<scalar_t>> Nhwc::pack_filter(const Shape& s, const scalar_t* weight, bool gradient) {
  std::vector<acc_t<scalar_t>> packed(s.kernel * s.kernel * s.c);
  auto* out = packed.data();
  for (int ky = 0; ky < s.kernel; ++ky) {
    const int phases = gradient ? s.stride : 1;
    for (int q = 0; q < phases; ++q) {
      for (int i = 0; i < phase_taps(s.kernel, phases, q); ++i, out += s.c) {
        const int kx = gradient ? phase_tap(s.kernel, phases, q, i) : i;
        for (int64_t c = 0; c < s.c; ++c) out[c] = weight[(c * s.kernel + ky) * s.kernel + kx];
      }
    }
  }
  return packed;
}

template <typename scalar_t>
void Nhwc::forward(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* filter, const acc_t<scalar_t>* bias, scalar_t* y,
                   const Block& block) {
  using A = acc_t<scalar_t>;
  constexpr bool kConverts = !std::is_same_v<scalar_t, A>;
  const int64_t channels = block.channels();
  Rows<scalar_t> rows(x + block.n * s.h * s.w * s.c, s.w, s.c, block.first_channel, channels, s.prologue, 0);
  ConvolveJob<A> job;
  job.init = bias ? bias + block.first_channel : nullptr;
  job.in_step = rows.step();
  job.filter_step = s.c;
  job.out_step = kConverts ? channels : s.c;
  job.offset = -s.left;
  job.first_column = block.first_column;
  job.last_column = block.last_column;
  job.in_columns = s.w;
  job.channels = channels;
  for (int64_t oy = block.first_row; oy < block.last_row; ++oy) {
    job.rows = 0;
    for (int ky = 0; ky < s.kernel; ++ky) {
      const int64_t iy = oy * s.stride - s.top + ky;
      if (iy < 0 || iy >= s.h) continue;
      job.in[job.rows] = rows.row(iy);
      job.filter[job.rows++] = filter + ky * s.kernel * s.c + block.first_channel;
    }
    scalar_t* out = y + (block.n * s.oh + oy) * s.ow * s.c + block.first_channel;
    job.out = working_row(out, s.ow, channels);
    convolve(s.kernel, s.stride, job);
    if (kConverts) finish_row<Activation::kNone>(job.out, channels, out, out, s.c, block.first_column, block.last_column, channels);
  }
}

template <typename scalar_t>
void Nhwc::grad_input(const Shape& s, const scalar_t* grad, const scalar_t* x, const acc_t<scalar_t>* filter, scalar_t* grad_x,
                      const Block& block) {
  using A = acc_t<scalar_t>;
  constexpr bool kConverts = !std::is_same_v<scalar_t, A>;
  const int64_t channels = block.channels(), step = kConverts ? channels : s.c;
  Rows<scalar_t> rows(grad + block.n * s.oh * s.ow * s.c, s.ow, s.c, block.first_channel, channels, Activation::kNone, 0);
  ConvolveJob<A> job;
  job.init = nullptr;
  job.in_step = rows.step();
  job.filter_step = s.c;
  job.out_step = step * s.stride;
  job.in_columns = s.ow;
  job.channels = channels;
  for (int64_t iy = block.first_row; iy < block.last_row; ++iy) {
    const int64_t at = (block.n * s.h + iy) * s.w * s.c + block.first_channel;
    const int q = int((iy + s.top) % s.stride), row_taps = phase_taps(s.kernel, s.stride, q);
    const int64_t last = (iy + s.top) / s.stride;
    A* out = working_row(grad_x + at, s.w, channels);
    job.rows = 0;
    for (int i = 0; i < row_taps; ++i) {
      const int64_t oy = last - (row_taps - 1) + i;
      if (oy < 0 || oy >= s.oh) continue;
      job.in[job.rows] = rows.row(oy);
      job.filter[job.rows++] = filter + phase_tap(s.kernel, s.stride, q, i) * s.kernel * s.c + block.first_channel;
    }
    for (int p = 0; p < s.stride; ++p) {
      const int taps = phase_taps(s.kernel, s.stride, p);
      const int64_t start = phase_start(s.left, s.stride, p);
      job.first_column = std::max<int64_t>(0, ceil_div(block.first_column - start, s.stride));
      job.last_column = std::max<int64_t>(0, ceil_div(block.last_column - start, s.stride));
      job.offset = (start + s.left) / s.stride - (taps - 1);
      job.out = out + start * step;
      convolve(taps, 1, job);
      for (int r = 0; r < job.rows; ++r) job.filter[r] += taps * s.c;
    }
    if (kConverts || s.prologue != Activation::kNone) {
      dispatch_activation(int64_t(s.prologue), [&]<Activation kPrologue>() {
        finish_row<kPrologue>(out, step, x + at, grad_x + at, s.c, block.first_column, block.last_column, channels);
      });
    }
  }
}

template <typename scalar_t>
void Nhwc::grad_weight(const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partial, bool with_bias,
                       const Slab& slab) {
  using A = acc_t<scalar_t>;
  const int64_t channels = slab.channels(), taps = s.kernel * s.kernel;
  Rows<scalar_t> rows(x, s.w, s.c, slab.first_channel, channels, s.prologue, 0);
  Rows<scalar_t> grad_rows(grad, s.ow, s.c, slab.first_channel, channels, Activation::kNone, 1);
  partial += slab.first_channel;
  for (int64_t t = 0; t <= taps; ++t) std::fill_n(partial + t * s.c, channels, A(0));
  CorrelateJob<A> job;
  job.bias_sums = with_bias ? partial + taps * s.c : nullptr;
  job.grad_step = grad_rows.step();
  job.in_step = rows.step();
  job.sums_step = s.c;
  job.offset = -s.left;
  job.in_columns = s.w;
  job.channels = channels;
  for (int64_t column = 0; column < s.ow; column += slab.strip_columns) {
    job.first_column = column;
    job.last_column = std::min(s.ow, column + slab.strip_columns);
    for (int64_t i = slab.first_row; i < slab.last_row; ++i) {
      const int64_t n = i / s.oh, oy = i % s.oh;
      job.grad = grad_rows.row(i);
      job.rows = 0;
      for (int ky = 0; ky < s.kernel; ++ky) {
        const int64_t iy = oy * s.stride - s.top + ky;
        if (iy < 0 || iy >= s.h) continue;
        job.in[job.rows] = rows.row(n * s.h + iy);
        job.sums[job.rows++] = partial + ky * s.kernel * s.c;
      }
      correlate(s.kernel, s.stride, job);
    }
  }
}

#define EF_DEFINE(scalar_t)                                                                                                            \
  template std::vector<acc_t<scalar_t>> Nhwc::pack_filter(const Shape&, const scalar_t*, bool);                                        \
  template void Nhwc::forward(const Shape&, const scalar_t*, const acc_t<scalar_t>*, const acc_t<scalar_t>*, scalar_t*, const Block&); \
  template void Nhwc::grad_input(const Shape&, const scalar_t*, const scalar_t*, const acc_t<scalar_t>*, scalar_t*, const Block&);     \
  template void Nhwc::grad_weight(const Shape&, const scalar_t*, const scalar_t*, acc_t<scalar_t>*, bool, const Slab&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::depthwise_conv
