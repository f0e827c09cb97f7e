// Cuts the work into parts that depend on the shape only, hands them to the layout's code on several threads, and adds the weight
// gradient's parts in order: the results do not depend on the threads.
#include "depthwise_conv_cpu.h"

#include "../common/parallel.h"

namespace ef::depthwise_conv {
namespace {
constexpr int64_t kScratchBytes = 256 << 10;
constexpr int64_t kStripBytes = 128 << 10;
constexpr int64_t kGrainMultiplies = 1 << 16;
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinChunkPositions = 512;  // far more than the taps that adding a chunk costs

// The size of a part, such that the rows it works on stay in the second-level cache. Where rows go through scratch, a part has all
// columns of a group of channels, and many rows, of which it prepares kernel - 1 more than it makes; where they are read in place it has
// whole pixels, in a strip of columns, and a thread goes down the strip. In nchw a part is a few planes.
struct Parts {
  int64_t rows, columns, group_size, blocks, strips, groups;
  Parts(const Shape& s, int64_t height, int64_t width, bool in_place) : rows(32), columns(width), group_size(16) {
    const int64_t row_bytes = s.kernel * s.stride * int64_t(sizeof(float));  // per column and channel
    if (s.channels_last && in_place) {
      rows = 4;
      columns = ceil_div(width, ceil_div(width, std::max<int64_t>(16, kStripBytes / (row_bytes * s.c))));
      group_size = s.c;
    } else if (s.channels_last) {
      const int64_t most = std::clamp<int64_t>(kScratchBytes / (2 * row_bytes * width) / 16 * 16, 16, 256);
      group_size = ceil_div(ceil_div(s.c, ceil_div(s.c, most)), 16) * 16;
    }
    blocks = ceil_div(height, rows);
    strips = ceil_div(width, columns);
    groups = ceil_div(s.c, group_size);
  }
};
template <typename scalar_t>
constexpr bool kIsAccumulator = std::is_same_v<scalar_t, acc_t<scalar_t>>;

template <class F>
void for_each_part(int64_t parts, int64_t multiplies, const F& f) {
  const int64_t grain = std::clamp<int64_t>(kGrainMultiplies * parts / std::max<int64_t>(1, multiplies), 1, parts);
  parallel_for(parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part);
  });
}

// f(block) over all parts of n images of height x width; consecutive ones are below each other.
template <class F>
void for_each_block(const Shape& s, int64_t height, int64_t width, bool in_place, const F& f) {
  const Parts parts(s, height, width, in_place);
  const int64_t multiplies = s.n * s.c * s.oh * s.ow * s.kernel * s.kernel;
  for_each_part(s.n * parts.groups * parts.strips * parts.blocks, multiplies, [&](int64_t part) {
    const int64_t row = part % parts.blocks * parts.rows, column = part / parts.blocks % parts.strips * parts.columns;
    const int64_t n_and_group = part / parts.blocks / parts.strips, channel = n_and_group % parts.groups * parts.group_size;
    f(Block{n_and_group / parts.groups, row, std::min(height, row + parts.rows), column, std::min(width, column + parts.columns), channel,
            std::min(s.c, channel + parts.group_size)});
  });
}

template <class F>
void with_layout(const Shape& s, const F& f) {
  s.channels_last ? f(Nhwc{}) : f(Nchw{});
}
}  // namespace

template <typename scalar_t>
void launch_forward(Cpu, const Shape& s, const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* y) {
  using A = acc_t<scalar_t>;
  const std::vector<A> biases = bias ? std::vector<A>(bias, bias + s.c) : std::vector<A>();
  with_layout(s, [&]<class Layout>(Layout) {
    const std::vector<A> filter = Layout::pack_filter(s, weight, false);
    for_each_block(s, s.oh, s.ow, kIsAccumulator<scalar_t> && s.prologue == Activation::kNone,
                   [&](const Block& block) { Layout::forward(s, x, filter.data(), bias ? biases.data() : nullptr, y, block); });
  });
}

template <typename scalar_t>
void launch_grad_input(Cpu, const Shape& s, const scalar_t* grad, const scalar_t* x, const scalar_t* weight, scalar_t* grad_x) {
  with_layout(s, [&]<class Layout>(Layout) {
    const std::vector<acc_t<scalar_t>> filter = Layout::pack_filter(s, weight, true);
    for_each_block(s, s.h, s.w, kIsAccumulator<scalar_t>,
                   [&](const Block& block) { Layout::grad_input(s, grad, x, filter.data(), grad_x, block); });
  });
}

int64_t chunk_count(Cpu, const Shape& s) {
  return std::clamp<int64_t>(s.n * s.oh * s.ow / kMinChunkPositions, 1, std::min(kMaxChunks, s.n * s.oh));
}

template <typename scalar_t>
void launch_grad_weight(Cpu, const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partials, scalar_t* grad_weight,
                        scalar_t* grad_bias) {
  using A = acc_t<scalar_t>;
  const int64_t chunks = chunk_count(Cpu{}, s), rows = s.n * s.oh, step = ceil_div(rows, chunks), taps = s.kernel * s.kernel;
  const Parts parts(s, s.oh, s.ow, kIsAccumulator<scalar_t> && s.prologue == Activation::kNone);
  with_layout(s, [&]<class Layout>(Layout) {
    for_each_part(chunks * parts.groups, rows * s.ow * s.c * taps, [&](int64_t part) {
      const int64_t first_channel = part % parts.groups * parts.group_size, chunk = part / parts.groups;
      Layout::grad_weight(s, grad, x, partials + chunk * (taps + 1) * s.c, grad_bias != nullptr,
                          Slab{std::min(rows, chunk * step), std::min(rows, (chunk + 1) * step), parts.columns, first_channel,
                               std::min(s.c, first_channel + parts.group_size)});
    });
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
