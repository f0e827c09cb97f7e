// Cuts the work into parts that depend on the shape only, does them on several threads line by line, and adds the weight gradient's
// parts in order: the results do not depend on the threads.
#include "../common/parallel.h"
#include "depthwise_conv_lines.h"

namespace ef::depthwise_conv {
namespace {
constexpr int64_t kRingBytes = 24 << 10;   // of the lines that a result reads: they stay in the first-level cache
constexpr int64_t kRows = 16;              // of a part, which reads kernel - 1 more
constexpr int64_t kGroup = kLaneMultiple;  // planes of NCHW: few streams of memory, each long
constexpr int64_t kMinColumns = 16;
constexpr int64_t kGrainMultiplies = 1 << 16;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkPositions = 512;  // far more than the taps that adding a chunk costs

// The size of a part: rows, columns of a strip, channels of a group; `reach` columns are read for each computed. Channels last keeps
// whole pixels together, so that memory is read in long pieces.
struct Parts {
  int64_t columns, group, blocks, strips, groups;
  Parts(const Shape& s, int64_t height, int64_t width, int reach) {
    group = s.channels_last ? lanes_of(s.c) : std::min(kGroup, lanes_of(s.c));
    groups = ceil_div(s.c, group);
    const int64_t most = std::max(kMinColumns, kRingBytes / (s.kernel * reach * group * int64_t(sizeof(float))));
    columns = ceil_div(ceil_div(width, ceil_div(width, most)), kTileColumns) * kTileColumns;
    strips = ceil_div(width, columns);
    blocks = ceil_div(height, kRows);
  }
};

struct Part {
  int64_t n, first_row, last_row, first_column, last_column, first_channel, channels;
};

template <class F>
void for_each_part(int64_t parts, int64_t multiplies, const F& f) {
  const int64_t grain = std::clamp<int64_t>(kGrainMultiplies * parts / std::max<int64_t>(1, multiplies), 1, parts);
  parallel_for(parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part);
  });
}

// f(part) over all parts of n images of height x width; consecutive ones are below each other.
template <class F>
void for_each_block(const Shape& s, const Parts& parts, int64_t height, int64_t width, const F& f) {
  const int64_t multiplies = s.n * s.c * s.oh * s.ow * s.kernel * s.kernel;
  for_each_part(s.n * parts.groups * parts.strips * parts.blocks, multiplies, [&](int64_t i) {
    const int64_t row = i % parts.blocks * kRows, column = i / parts.blocks % parts.strips * parts.columns;
    const int64_t n_and_group = i / parts.blocks / parts.strips, channel = n_and_group % parts.groups * parts.group;
    f(Part{n_and_group / parts.groups, row, std::min(height, row + kRows), column, std::min(width, column + parts.columns), channel,
           std::min(s.c - channel, parts.group)});
  });
}

// Of a tensor like x or y with rows of `width`: these columns and the part's channels.
template <typename scalar_t>
View<scalar_t> view_of(const Shape& s, scalar_t* data, int64_t height, int64_t width, int64_t first_column, int64_t last_column,
                       int64_t first_channel, int64_t channels) {
  View<scalar_t> view{data, s.c * height * width, width, 1, height * width, height, last_column - first_column, channels};
  if (s.channels_last) view.row_step = width * s.c, view.column_step = s.c, view.channel_step = 1;
  view.data += first_column * view.column_step + first_channel * view.channel_step;
  return view;
}

struct Span {
  int64_t first, last;
};
// What of [0, size) lies in [first, last).
Span clipped(int64_t first, int64_t last, int64_t size) {
  first = std::clamp<int64_t>(first, 0, size);
  return {first, std::clamp(last, first, size)};
}

// The input columns that outputs [first, last) read.
Span columns_read(const Shape& s, int64_t first, int64_t last) {
  return clipped(first * s.stride - s.left, (last - 1) * s.stride - s.left + s.kernel, s.w);
}

// Group after group [tap][lane]; for the gradient, the taps of a row in the order of its phases.
template <typename scalar_t>
std::vector<acc_t<scalar_t>> packed_filter(const Shape& s, const scalar_t* weight, int64_t group, bool gradient) {
  const int taps = s.kernel * s.kernel, phases = gradient ? s.stride : 1;
  int order[5];
  for (int q = 0, i = 0; q < phases; ++q) {
    for (int t = 0; t < phase_taps(s.kernel, phases, q); ++t) order[i++] = gradient ? phase_tap(s.kernel, phases, q, t) : t;
  }
  std::vector<acc_t<scalar_t>> packed(taps * lanes_of(s.c));
  auto* out = packed.data();
  for (int64_t first = 0; first < s.c; first += group) {
    const int64_t channels = std::min(s.c - first, group), lanes = lanes_of(channels);
    for (int t = 0; t < taps; ++t, out += lanes) {
      const scalar_t* in = weight + first * taps + t / s.kernel * s.kernel + order[t % s.kernel];
      for (int64_t c = 0; c < channels; ++c) out[c] = in[c * taps];
    }
  }
  return packed;
}

template <typename scalar_t>
void forward_part(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* filter, const acc_t<scalar_t>* bias, scalar_t* y,
                  const Part& part) {
  using A = acc_t<scalar_t>;
  const Span span = columns_read(s, part.first_column, part.last_column);
  const auto in = view_of(s, x, s.h, s.w, span.first, span.last, part.first_channel, part.channels);
  Ring<scalar_t> rows(in, s.prologue, 0);
  const auto out = view_of(s, y, s.oh, s.ow, part.first_column, part.last_column, part.first_channel, part.channels);
  const bool in_place = out.is_lines();
  ConvolveJob<A> job;
  job.init = bias ? bias + part.first_channel : nullptr;
  job.out = scratch<A>(1, out.columns * out.lanes());
  job.lanes = out.lanes();
  job.in_step = rows.step();
  job.out_step = in_place ? s.c : job.lanes;
  job.offset = part.first_column * s.stride - s.left - span.first;
  job.columns = out.columns;
  job.in_columns = span.last - span.first;
  filter += part.first_channel * s.kernel * s.kernel;
  for (int64_t oy = part.first_row; oy < part.last_row; ++oy) {
    job.rows = 0;
    for (int ky = 0; ky < s.kernel; ++ky) {
      const int64_t iy = oy * s.stride - s.top + ky;
      if (iy < 0 || iy >= s.h) continue;
      job.in[job.rows] = rows.row(part.n, iy);
      job.filter[job.rows++] = filter + ky * s.kernel * job.lanes;
    }
    if (in_place) job.out = out.line(part.n, oy);
    for (int i = 0; i < s.stride; ++i) job.ahead_in[i] = in.ahead(part.n, oy * s.stride - s.top + s.kernel + i, s.stride);
    job.ahead_out = out.ahead(part.n, oy + 1, 1);
    convolve(s.kernel, s.stride, job);
    if (!in_place) store_line(out, part.n, oy, job.out);
  }
}

template <typename scalar_t>
void grad_input_part(const Shape& s, const scalar_t* grad, const scalar_t* x, const acc_t<scalar_t>* filter, scalar_t* grad_x,
                     const Part& part) {
  using A = acc_t<scalar_t>;
  // From the first output that reads the part's first column with its last tap, to the last that reads its last one with the first.
  const Span span = clipped(ceil_div(part.first_column + s.left - s.kernel + 1 + s.stride * s.kernel, s.stride) - s.kernel,
                            (part.last_column - 1 + s.left) / s.stride + 1, s.ow);
  const auto grads = view_of(s, grad, s.oh, s.ow, span.first, span.last, part.first_channel, part.channels);
  Ring<scalar_t> rows(grads, Activation::kNone, 0);
  const auto out = view_of(s, grad_x, s.h, s.w, part.first_column, part.last_column, part.first_channel, part.channels);
  const auto in = view_of(s, x, s.h, s.w, part.first_column, part.last_column, part.first_channel, part.channels);
  const bool in_place = out.is_lines() && s.prologue == Activation::kNone;
  const int64_t lanes = out.lanes(), size = out.columns * lanes;
  A *line = scratch<A>(1, size), *in_line = scratch<A>(2, size);
  ConvolveJob<A> job;
  job.init = nullptr;
  job.lanes = lanes;
  job.in_step = rows.step();
  const int64_t step = in_place ? s.c : lanes;
  job.out_step = step * s.stride;
  job.in_columns = span.last - span.first;
  filter += part.first_channel * s.kernel * s.kernel;
  for (int64_t iy = part.first_row; iy < part.last_row; ++iy) {
    const int q = int((iy + s.top) % s.stride), row_taps = phase_taps(s.kernel, s.stride, q);
    const int64_t last = (iy + s.top) / s.stride;
    if (in_place) line = out.line(part.n, iy);
    job.ahead_in[0] = grads.ahead(part.n, last + 1, 1);
    job.ahead_out = out.ahead(part.n, iy + 1, s.stride);
    job.rows = 0;
    for (int i = 0; i < row_taps; ++i) {
      const int64_t oy = last - (row_taps - 1) + i;
      if (oy < 0 || oy >= s.oh) continue;
      job.in[job.rows] = rows.row(part.n, oy);
      job.filter[job.rows++] = filter + phase_tap(s.kernel, s.stride, q, i) * s.kernel * lanes;
    }
    for (int p = 0; p < s.stride; ++p) {
      const int taps = phase_taps(s.kernel, s.stride, p);
      const int64_t start = phase_start(s.left + part.first_column, s.stride, p);
      job.columns = std::max<int64_t>(0, ceil_div(out.columns - start, s.stride));
      job.offset = (part.first_column + start + s.left) / s.stride - (taps - 1) - span.first;
      job.out = line + start * step;
      convolve(taps, 1, job);
      job.ahead_in[0] = job.ahead_out = {};
      for (int r = 0; r < job.rows; ++r) job.filter[r] += taps * lanes;
    }
    if (s.prologue != Activation::kNone) {
      load_line(in, part.n, iy, in_line);
      dispatch_activation(int64_t(s.prologue), [&]<Activation kPrologue>() { scale_line<kPrologue>(line, in_line, size); });
    }
    if (!in_place) store_line(out, part.n, iy, line);
  }
}

// Rows [first, last) of all images, counted through.
template <typename scalar_t>
void grad_weight_part(const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partial, bool with_bias, const Parts& parts,
                      Span slab, int64_t first_channel) {
  using A = acc_t<scalar_t>;
  const int64_t channels = std::min(s.c - first_channel, parts.group), lanes = lanes_of(channels);
  const int taps = s.kernel * s.kernel;
  A* sums = scratch<A>(2, (taps + 1) * lanes);
  std::fill_n(sums, (taps + 1) * lanes, A(0));
  CorrelateJob<A> job;
  job.bias_sums = with_bias ? sums + taps * lanes : nullptr;
  job.lanes = lanes;
  for (int64_t column = 0; column < s.ow; column += parts.columns) {
    const int64_t last_column = std::min(s.ow, column + parts.columns);
    const Span span = columns_read(s, column, last_column);
    const auto in = view_of(s, x, s.h, s.w, span.first, span.last, first_channel, channels);
    const auto grads = view_of(s, grad, s.oh, s.ow, column, last_column, first_channel, channels);
    Ring<scalar_t> rows(in, s.prologue, 0), grad_rows(grads, Activation::kNone, 1);
    job.grad_step = grad_rows.step();
    job.in_step = rows.step();
    job.columns = grads.columns;
    job.in_columns = span.last - span.first;
    job.offset = column * s.stride - s.left - span.first;
    for (int64_t i = slab.first; i < slab.last; ++i) {
      const int64_t n = i / s.oh, oy = i % s.oh;
      job.grad = grad_rows.row(n, oy);
      for (int k = 0; k < s.stride; ++k) job.ahead_in[k] = in.ahead(n, oy * s.stride - s.top + s.kernel + k, s.stride);
      job.ahead_grad = grads.ahead(n, oy + 1, 1);
      job.rows = 0;
      for (int ky = 0; ky < s.kernel; ++ky) {
        const int64_t iy = oy * s.stride - s.top + ky;
        if (iy < 0 || iy >= s.h) continue;
        job.in[job.rows] = rows.row(n, iy);
        job.sums[job.rows++] = sums + ky * s.kernel * lanes;
      }
      correlate(s.kernel, s.stride, job);
    }
  }
  for (int t = 0; t <= taps; ++t) std::copy_n(sums + t * lanes, channels, partial + t * s.c + first_channel);
}
}  // namespace

template <typename scalar_t>
void launch_forward(Cpu, const Shape& s, const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* y) {
  using A = acc_t<scalar_t>;
  const Parts parts(s, s.oh, s.ow, s.stride);
  const std::vector<A> filter = packed_filter(s, weight, parts.group, false);
  std::vector<A> biases(bias ? lanes_of(s.c) : 0);
  if (bias) std::copy_n(bias, s.c, biases.begin());
  for_each_block(s, parts, s.oh, s.ow,
                 [&](const Part& part) { forward_part(s, x, filter.data(), bias ? biases.data() : nullptr, y, part); });
}

template <typename scalar_t>
void launch_grad_input(Cpu, const Shape& s, const scalar_t* grad, const scalar_t* x, const scalar_t* weight, scalar_t* grad_x) {
  const Parts parts(s, s.h, s.w, 1);
  const std::vector<acc_t<scalar_t>> filter = packed_filter(s, weight, parts.group, true);
  for_each_block(s, parts, s.h, s.w, [&](const Part& part) { grad_input_part(s, grad, x, filter.data(), grad_x, part); });
}

int64_t chunk_count(Cpu, const Shape& s) {
  return std::clamp<int64_t>(s.n * s.oh * s.ow / kMinChunkPositions, 1, std::min(kMaxChunks, s.n * s.oh));
}

template <typename scalar_t>
void launch_grad_weight(Cpu, const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partials, scalar_t* grad_weight,
                        scalar_t* grad_bias) {
  using A = acc_t<scalar_t>;
  const int64_t chunks = chunk_count(Cpu{}, s), rows = s.n * s.oh, step = ceil_div(rows, chunks), taps = s.kernel * s.kernel;
  const Parts parts(s, s.oh, s.ow, s.stride);
  for_each_part(chunks * parts.groups, rows * s.ow * s.c * taps, [&](int64_t part) {
    const int64_t chunk = part / parts.groups;
    grad_weight_part(s, grad, x, partials + chunk * (taps + 1) * s.c, grad_bias != nullptr, parts,
                     clipped(chunk * step, (chunk + 1) * step, rows), part % parts.groups * parts.group);
  });
  std::vector<A> sum(s.c);
  for (int64_t t = 0; t < taps + (grad_bias ? 1 : 0); ++t) {
    std::fill(sum.begin(), sum.end(), A(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* partial = partials + (chunk * (taps + 1) + t) * s.c;
      for (int64_t c = 0; c < s.c; ++c) sum[c] += partial[c];
    }
    for (int64_t c = 0; c < s.c; ++c) (t < taps ? grad_weight[c * taps + t] : grad_bias[c]) = scalar_t(sum[c]);
  }
}

#define EF_DEFINE(scalar_t)                                                                                         \
  template void launch_forward(Cpu, const Shape&, const scalar_t*, const scalar_t*, const scalar_t*, scalar_t*);    \
  template void launch_grad_input(Cpu, const Shape&, const scalar_t*, const scalar_t*, const scalar_t*, scalar_t*); \
  template void launch_grad_weight(Cpu, const Shape&, const scalar_t*, const scalar_t*, acc_t<scalar_t>*, scalar_t*, scalar_t*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::depthwise_conv
