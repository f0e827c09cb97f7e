// Cuts the work into blocks that depend on the shapes only, does them on several threads row by row, and adds the weight gradient's
// chunks in order: the results do not depend on the threads. A block of the forward:
//
//     x, any layout and dtype           ring of k staged rows             a tile                        y
//     columns x channels of a block     [column][lane], acc_t, prologue   8 columns x 1 vector
//                                       +------------------+
//     row iy     |############| ------> | row iy           | --+
//     row iy + 1 |############| ------> | row iy + 1       | --+--> sums of k x k products ------> | row oy |
//     row iy + 2 |############| ------> | row iy + 2       | --+    in registers
//                                       +------------------+
//     row iy + 3 |............|         replaces row iy, which no later row of y reads
#include "../common/parallel.h"
#include "depthwise_conv_rows.h"

namespace ef::depthwise_conv {
namespace {
constexpr int64_t kRingBytes = 24 << 10;   // of the staged rows that a result reads: they stay in the first-level cache
constexpr int64_t kRows = 16;              // of a block, which reads kernel - 1 more
constexpr int64_t kGroup = kLaneMultiple;  // planes of NCHW: few streams of memory, each long
constexpr int64_t kMinColumns = 16;
constexpr int64_t kGrainMultiplies = 1 << 16;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkPositions = 512;  // far more than the taps that adding a chunk costs

// How maps are cut into blocks of kRows rows x some columns x a group of channels: how many there are in each direction; `reach` columns
// are read for each computed. Channels last keeps whole pixels together, so that memory is read in long pieces.
struct Blocks {
  int64_t columns, group, down, across, groups;
  Blocks(const Shape& s, int64_t height, int64_t width, int reach) {
    group = s.channels_last ? lanes_of(s.c) : std::min(kGroup, lanes_of(s.c));
    groups = ceil_div(s.c, group);
    const int64_t max_columns = std::max(kMinColumns, kRingBytes / (s.kernel * reach * group * int64_t(sizeof(float))));
    columns = ceil_div(ceil_div(width, ceil_div(width, max_columns)), kTileColumns) * kTileColumns;
    across = ceil_div(width, columns);
    down = ceil_div(height, kRows);
  }
};

struct Block {
  int64_t n, first_row, last_row, first_column, last_column, first_channel, channels;
};

// f(i, piece) over the pieces of all levels, counts[i] of them in level i.
template <typename scalar_t, class F>
void for_each_piece(const Levels<scalar_t>& levels, const std::vector<int64_t>& counts, const F& f) {
  int64_t pieces = 0, multiplies = 1;
  for (int i = 0; i < levels.count; ++i) {
    const Shape& s = levels.level[i].shape;
    pieces += counts[i];
    multiplies += s.n * s.c * s.oh * s.ow * s.kernel * s.kernel;
  }
  parallel_for(pieces, std::clamp<int64_t>(kGrainMultiplies * pieces / multiplies, 1, pieces), [&](int64_t begin, int64_t end) {
    int i = 0;
    int64_t first = 0;
    for (int64_t piece = begin; piece < end; ++piece) {
      while (piece >= first + counts[i]) first += counts[i++];
      f(i, piece - first);
    }
  });
}

// f(level, block) over all blocks of all levels, of x or of y; consecutive ones are below each other.
template <typename scalar_t, class F>
void for_each_block(const Levels<scalar_t>& levels, bool of_x, const F& f) {
  std::vector<Blocks> blocks;
  std::vector<int64_t> counts;
  for (int i = 0; i < levels.count; ++i) {
    const Shape& s = levels.level[i].shape;
    const Blocks& p = blocks.emplace_back(s, of_x ? s.h : s.oh, of_x ? s.w : s.ow, of_x ? 1 : s.stride);
    counts.push_back(s.n * p.groups * p.across * p.down);
  }
  for_each_piece(levels, counts, [&](int level, int64_t i) {
    const Shape& s = levels.level[level].shape;
    const Blocks& p = blocks[level];
    const int64_t row = i % p.down * kRows, column = i / p.down % p.across * p.columns;
    const int64_t n_and_group = i / p.down / p.across, channel = n_and_group % p.groups * p.group;
    f(levels.level[level], Block{n_and_group / p.groups, row, std::min(of_x ? s.h : s.oh, row + kRows), column,
                                 std::min(of_x ? s.w : s.ow, column + p.columns), channel, std::min(s.c - channel, p.group)});
  });
}

// Of a tensor like x or y with rows of `width`: these columns and the block's channels.
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
std::vector<acc_t<scalar_t>> packed_filter(const Shape& s, Parameter<scalar_t> weight, int64_t group, bool gradient) {
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
      const int64_t tap = t / s.kernel * s.kernel + order[t % s.kernel];
      for (int64_t c = 0; c < channels; ++c) out[c] = weight[(first + c) * taps + tap];
    }
  }
  return packed;
}

// Rows of results made at once: two where all rows that they read, from `first` on, are there.
template <typename A>
int results_at_once(const Shape& s, int64_t left, int64_t first, int64_t rows) {
  return can_pair<A>(s.kernel, s.stride) && left >= 2 && first >= 0 && first + s.kernel < rows ? 2 : 1;
}

template <typename scalar_t>
void forward_block(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* filter, const acc_t<scalar_t>* bias, scalar_t* y,
                   const Block& block) {
  using A = acc_t<scalar_t>;
  const Span span = columns_read(s, block.first_column, block.last_column);
  const auto in = view_of(s, x, s.h, s.w, span.first, span.last, block.first_channel, block.channels);
  Ring<scalar_t> rows(in, s.prologue, 0);
  const auto out = view_of(s, y, s.oh, s.ow, block.first_column, block.last_column, block.first_channel, block.channels);
  const bool in_place = out.is_staged();
  const int64_t size = out.columns * out.lanes();
  A* scratch_rows = scratch<A>(1, 2 * size);
  ConvolveJob<A> job;
  job.init = bias ? bias + block.first_channel : nullptr;
  job.lanes = out.lanes();
  job.in_step = rows.step();
  job.out_step = in_place ? s.c : job.lanes;
  job.offset = block.first_column * s.stride - s.left - span.first;
  job.columns = out.columns;
  job.in_columns = span.last - span.first;
  filter += block.first_channel * s.kernel * s.kernel;
  for (int64_t oy = block.first_row; oy < block.last_row;) {
    const int64_t first = oy * s.stride - s.top;
    const int results = results_at_once<A>(s, block.last_row - oy, first, s.h);
    job.rows = 0;
    for (int ky = 0; ky < s.kernel; ++ky) {
      if (first + ky < 0 || first + ky >= s.h) continue;
      job.in[job.rows] = rows.row(block.n, first + ky);
      job.filter[job.rows++] = filter + ky * s.kernel * job.lanes;
    }
    if (results == 2) job.in[job.rows] = rows.row(block.n, first + s.kernel);
    job.out = in_place ? out.staged(block.n, oy) : scratch_rows;
    job.out_below = results == 1 ? nullptr : in_place ? out.staged(block.n, oy + 1) : scratch_rows + size;
    for (int i = 0; i < std::max(results, s.stride); ++i)
      job.prefetch_in[i] = in.prefetch(block.n, first + s.kernel + results - 1 + i, s.stride);
    job.prefetch_out = out.prefetch(block.n, oy + 1, 1);
    convolve(s.kernel, s.stride, job);
    for (int i = 0; i < results && !in_place; ++i) unstage(out, block.n, oy + i, scratch_rows + i * size);
    oy += results;
  }
}

template <typename scalar_t>
void grad_input_block(const Shape& s, const scalar_t* grad, const scalar_t* x, const acc_t<scalar_t>* filter, scalar_t* grad_x,
                      const Block& block) {
  using A = acc_t<scalar_t>;
  // From the first output that reads the block's first column with its last tap, to the last that reads its last one with the first.
  const Span span = clipped(ceil_div(block.first_column + s.left - s.kernel + 1 + s.stride * s.kernel, s.stride) - s.kernel,
                            (block.last_column - 1 + s.left) / s.stride + 1, s.ow);
  const auto grads = view_of(s, grad, s.oh, s.ow, span.first, span.last, block.first_channel, block.channels);
  Ring<scalar_t> rows(grads, Activation::kNone, 0);
  const auto out = view_of(s, grad_x, s.h, s.w, block.first_column, block.last_column, block.first_channel, block.channels);
  const auto in = view_of(s, x, s.h, s.w, block.first_column, block.last_column, block.first_channel, block.channels);
  const bool in_place = out.is_staged() && s.prologue == Activation::kNone;
  const int64_t lanes = out.lanes(), size = out.columns * lanes;
  A *scratch_rows = scratch<A>(1, 2 * size), *in_row = scratch<A>(2, size);
  ConvolveJob<A> job;
  job.init = nullptr;
  job.lanes = lanes;
  job.in_step = rows.step();
  const int64_t step = in_place ? s.c : lanes;
  job.out_step = step * s.stride;
  job.in_columns = span.last - span.first;
  filter += block.first_channel * s.kernel * s.kernel;
  for (int64_t iy = block.first_row; iy < block.last_row;) {
    const int q = int((iy + s.top) % s.stride), row_taps = phase_taps(s.kernel, s.stride, q);
    const int64_t last = (iy + s.top) / s.stride, first = last - (row_taps - 1);
    const int results = results_at_once<A>(s, block.last_row - iy, first, s.oh);
    A* out_rows[2];
    for (int i = 0; i < results; ++i) {
      out_rows[i] = in_place ? out.staged(block.n, iy + i) : scratch_rows + i * size;
      job.prefetch_in[i] = grads.prefetch(block.n, last + results + i, 1);
    }
    job.prefetch_out = out.prefetch(block.n, iy + 1, s.stride);
    job.rows = 0;
    for (int i = 0; i < row_taps; ++i) {
      if (first + i < 0 || first + i >= s.oh) continue;
      job.in[job.rows] = rows.row(block.n, first + i);
      job.filter[job.rows++] = filter + phase_tap(s.kernel, s.stride, q, i) * s.kernel * lanes;
    }
    if (results == 2) job.in[job.rows] = rows.row(block.n, last + 1);
    for (int p = 0; p < s.stride; ++p) {
      const int taps = phase_taps(s.kernel, s.stride, p);
      const int64_t start = phase_start(s.left + block.first_column, s.stride, p);
      job.columns = std::max<int64_t>(0, ceil_div(out.columns - start, s.stride));
      job.offset = (block.first_column + start + s.left) / s.stride - (taps - 1) - span.first;
      job.out = out_rows[0] + start * step;
      job.out_below = results == 2 ? out_rows[1] : nullptr;
      convolve(taps, 1, job);
      job.prefetch_in[0] = job.prefetch_out = {};
      for (int r = 0; r < job.rows; ++r) job.filter[r] += taps * lanes;
    }
    for (int i = 0; i < results; ++i, ++iy) {
      if (s.prologue != Activation::kNone) {
        stage(in, block.n, iy, in_row);
        dispatch_activation(int64_t(s.prologue), [&]<Activation kPrologue>() { unactivate_row<kPrologue>(out_rows[i], in_row, size); });
      }
      if (!in_place) unstage(out, block.n, iy, out_rows[i]);
    }
  }
}

// Rows [first, last) of all images, counted through.
template <typename scalar_t>
void grad_weight_block(const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partial, bool with_bias,
                       const Blocks& blocks, Span chunk, int64_t first_channel) {
  using A = acc_t<scalar_t>;
  const int64_t channels = std::min(s.c - first_channel, blocks.group), lanes = lanes_of(channels);
  const int taps = s.kernel * s.kernel;
  A* sums = scratch<A>(2, (taps + 1) * lanes);
  std::fill_n(sums, (taps + 1) * lanes, A(0));
  CorrelateJob<A> job;
  job.bias_sums = with_bias ? sums + taps * lanes : nullptr;
  job.lanes = lanes;
  for (int64_t column = 0; column < s.ow; column += blocks.columns) {
    const int64_t last_column = std::min(s.ow, column + blocks.columns);
    const Span span = columns_read(s, column, last_column);
    const auto in = view_of(s, x, s.h, s.w, span.first, span.last, first_channel, channels);
    const auto grads = view_of(s, grad, s.oh, s.ow, column, last_column, first_channel, channels);
    Ring<scalar_t> rows(in, s.prologue, 0), grad_rows(grads, Activation::kNone, 1);
    job.grad_step = grad_rows.step();
    job.in_step = rows.step();
    job.columns = grads.columns;
    job.in_columns = span.last - span.first;
    job.offset = column * s.stride - s.left - span.first;
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const int64_t n = i / s.oh, oy = i % s.oh;
      job.grad = grad_rows.row(n, oy);
      for (int k = 0; k < s.stride; ++k) job.prefetch_in[k] = in.prefetch(n, oy * s.stride - s.top + s.kernel + k, s.stride);
      job.prefetch_grad = grads.prefetch(n, oy + 1, 1);
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
void launch_forward(Cpu, const Levels<scalar_t>& levels, Parameter<scalar_t> weight, Parameter<scalar_t> bias) {
  using A = acc_t<scalar_t>;
  const Shape& any = levels.level[0].shape;
  const std::vector<A> filter = packed_filter(any, weight, Blocks(any, any.oh, any.ow, any.stride).group, false);
  std::vector<A> biases(bias.data ? lanes_of(any.c) : 0);
  for (int64_t c = 0; bias.data && c < any.c; ++c) biases[c] = bias[c];
  for_each_block(levels, false, [&](const Level<scalar_t>& level, const Block& block) {
    forward_block(level.shape, level.x, filter.data(), bias.data ? biases.data() : nullptr, level.result, block);
  });
}

template <typename scalar_t>
void launch_grad_input(Cpu, const Levels<scalar_t>& levels, Parameter<scalar_t> weight) {
  const Shape& any = levels.level[0].shape;
  const std::vector<acc_t<scalar_t>> filter = packed_filter(any, weight, Blocks(any, any.h, any.w, 1).group, true);
  for_each_block(levels, true, [&](const Level<scalar_t>& level, const Block& block) {
    grad_input_block(level.shape, level.grad, level.x, filter.data(), level.result, block);
  });
}

int64_t chunk_count(Cpu, const Shape& s) {
  return std::clamp<int64_t>(s.n * s.oh * s.ow / kMinChunkPositions, 1, std::min(kMaxChunks, s.n * s.oh));
}

template <typename scalar_t>
void launch_grad_weight(Cpu, const Levels<scalar_t>& levels, acc_t<scalar_t>* partials, ParameterGradient<scalar_t> grad_weight,
                        ParameterGradient<scalar_t> grad_bias) {
  using A = acc_t<scalar_t>;
  const int64_t channels = levels.level[0].shape.c, taps = int64_t(levels.level[0].shape.kernel) * levels.level[0].shape.kernel;
  std::vector<Blocks> blocks;
  std::vector<int64_t> counts, first_chunk{0};
  for (int i = 0; i < levels.count; ++i) {
    const Shape& s = levels.level[i].shape;
    const int64_t chunks = chunk_count(Cpu{}, s);
    blocks.emplace_back(s, s.oh, s.ow, s.stride);
    counts.push_back(chunks * blocks[i].groups);
    first_chunk.push_back(first_chunk[i] + chunks);
  }
  const int64_t chunks = first_chunk.back();
  for_each_piece(levels, counts, [&](int i, int64_t piece) {
    const Level<scalar_t>& level = levels.level[i];
    const int64_t rows = level.shape.n * level.shape.oh, step = ceil_div(rows, first_chunk[i + 1] - first_chunk[i]);
    const int64_t chunk = piece / blocks[i].groups;
    grad_weight_block(level.shape, level.grad, level.x, partials + (first_chunk[i] + chunk) * (taps + 1) * channels,
                      grad_bias.data != nullptr, blocks[i], clipped(chunk * step, (chunk + 1) * step, rows),
                      piece % blocks[i].groups * blocks[i].group);
  });
  std::vector<A> sum(channels);
  for (int64_t t = 0; t < taps + (grad_bias.data ? 1 : 0); ++t) {
    std::fill(sum.begin(), sum.end(), A(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* partial = partials + (chunk * (taps + 1) + t) * channels;
      for (int64_t c = 0; c < channels; ++c) sum[c] += partial[c];
    }
    for (int64_t c = 0; c < channels; ++c) t < taps ? grad_weight.set(c * taps + t, sum[c]) : grad_bias.set(c, sum[c]);
  }
}

#define EF_DEFINE(scalar_t)                                                                                     \
  template void launch_forward(Cpu, const Levels<scalar_t>&, Parameter<scalar_t>, Parameter<scalar_t>);         \
  template void launch_grad_input(Cpu, const Levels<scalar_t>&, Parameter<scalar_t>);                           \
  template void launch_grad_weight(Cpu, const Levels<scalar_t>&, acc_t<scalar_t>*, ParameterGradient<scalar_t>, \
                                   ParameterGradient<scalar_t>);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::depthwise_conv
