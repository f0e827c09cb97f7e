// The output is walked in tiles of about kTile elements: whole rows where they are short, else pieces of one row. A tile's
// inputs are resampled into small buffers (or read in place), so that every loop in fusion_rows.h is plain, and runs in the cache.
// Backward, first pass: units of parent rows (see Parents), the same whatever the number of threads; each keeps its part of the weights'
// gradient, added in order at the end. Second pass: rows of the inputs that gather from grad_sum.
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "fusion_pool.h"
#include "fusion_rows.h"

namespace ef::fusion {
namespace {
constexpr int64_t kTile = 1024, kUnit = 8192;

template <class F>
void dispatch_count(int count, const F& f) {
  count == 2 ? f.template operator()<2>() : count == 3 ? f.template operator()<3>() : f.template operator()<4>();
}

using Columns = std::vector<int32_t>;  // for each output column, the column of a nearest input

template <typename scalar_t>
class Walker {
  using A = acc_t<scalar_t>;

 public:
  explicit Walker(const Problem<scalar_t>& problem) : p_(problem), weights_(normalized_weights(p_.weights, p_.count, p_.method, p_.eps)) {
    for (int i = 0; i < p_.count; ++i) {
      if (p_.inputs[i].resample != Resample::kNearest) continue;
      columns_[i].resize(p_.w);
      for (int64_t x = 0; x < p_.w; ++x) columns_[i][x] = int32_t(nearest_source(x, p_.inputs[i].w, p_.w));
    }
  }
  const NormalizedWeights<A>& weights() const { return weights_; }

  // Adds the gradients of `m` output columns from x on to those of the nearest input i they are read from.
  template <typename T>
  void add_to_parents(int i, const T* children, int64_t x, int64_t m, A* parents) const {
    if (doubled(i)) return add_pairs_to_parents(children, m / 2, parents + x / 2);
    fusion::add_to_parents(children, columns_[i].data() + x, m, p_.c, parents);
  }

  // Calls f(first row, first column, rows, columns) for tiles that cover the output rows [begin, end).
  template <class F>
  void for_each_tile(int64_t begin, int64_t end, const F& f) const {
    if (p_.w * p_.c <= kTile) {
      const int64_t step = kTile / (p_.w * p_.c);
      for (int64_t row = begin; row < end; row += step) f(row, int64_t(0), std::min(step, end - row), p_.w);
      return;
    }
    const int64_t step = std::max<int64_t>(1, kTile / p_.c);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t x = 0; x < p_.w; x += step) f(row, x, int64_t(1), std::min(step, p_.w - x));
  }

  // Buffers of one thread.
  struct Buffers {
    std::vector<A> inputs[kMaxFusionInputs], grad;
    explicit Buffers(const Walker& walker) : grad(walker.tile_size()) {
      for (int i = 0; i < walker.p_.count; ++i) inputs[i].resize(walker.tile_size());
    }
  };

  // The resampled input i over a tile, kept where `pooled` says so.
  const A* resampled(int i, int64_t row, int64_t x, int64_t rows, int64_t columns, Buffers& buffers,
                     const Pooled<scalar_t>& pooled = {}) const {
    const Input<scalar_t>& in = p_.inputs[i];
    A* out = buffers.inputs[i].data();
    scalar_t* maxima = pooled.maxima[i];
    const int64_t at = (row * p_.w + x) * p_.c, m = columns * p_.c;
    if (in.resample == Resample::kNone) {
      if constexpr (std::is_same_v<scalar_t, A>) return in.x + at;
      convert(in.x + at, rows * m, out);
      return out;
    }
    if constexpr (std::is_same_v<scalar_t, A>)
      if (maxima) out = maxima + at;
    uint8_t* taps = maxima ? pooled.taps[i] + at : nullptr;
    for (int64_t r = 0, height; r < rows; r += height) {
      const int64_t image = (row + r) / p_.h, y = (row + r) % p_.h;
      height = std::min(rows - r, p_.h - y);  // rows of one image
      const scalar_t* source = in.x + image * in.h * in.w * p_.c;
      if (in.resample == Resample::kMaxPool && p_.c == 1) {
        const auto pool = maxima ? pool_rows<true, scalar_t> : pool_rows<false, scalar_t>;
        pool(source, in.h, in.w, y, y + height, x, columns, out + r * m, maxima ? taps + r * m : nullptr);
        continue;
      }
      for (int64_t k = 0; k < height; ++k) {
        A* to = out + (r + k) * m;
        if (in.resample == Resample::kNearest) {
          const scalar_t* from = source + nearest_source(y + k, in.h, p_.h) * in.w * p_.c;
          doubled(i) ? doubled_row(from + x / 2, m / 2, to) : nearest_row(from, columns_[i].data() + x, columns, p_.c, to);
        } else {
          const auto pool = maxima ? pool_row<true, scalar_t> : pool_row<false, scalar_t>;
          pool(source, in.h, in.w, p_.c, y + k, x, columns, to, maxima ? taps + (r + k) * m : nullptr);
        }
      }
    }
    if (!maxima) return out;
    if constexpr (!std::is_same_v<scalar_t, A>) convert(out, rows * m, maxima + at);
    return out;
  }

  // Calls f.template operator()<activation, number of inputs>().
  template <class F>
  void dispatch(const F& f) const {
    dispatch_activation(int64_t(p_.activation), [&]<Activation kActivation>() {
      dispatch_count(p_.count, [&]<int kCount>() { f.template operator()<kActivation, kCount>(); });
    });
  }

 private:
  int64_t tile_size() const { return std::max(kTile, p_.c); }
  // Whether each column of a nearest input of one channel is read by two; tiles then start at the first of two.
  bool doubled(int i) const { return p_.c == 1 && p_.w == 2 * p_.inputs[i].w; }

  const Problem<scalar_t>& p_;
  const NormalizedWeights<A> weights_;
  Columns columns_[kMaxFusionInputs];
};

template <typename scalar_t>
int64_t parent_rows_per_unit(const Problem<scalar_t>& p) {
  const Parents parents = Parents::of(p);
  const int64_t elements = std::max<int64_t>(1, ceil_div(p.h * p.w * p.c, parents.h));  // of the output, in one row of parents
  return std::max<int64_t>(1, kUnit / elements);
}

// The first output row under the parent row `row` of n * parents.h.
template <typename scalar_t>
int64_t first_output_row(const Problem<scalar_t>& p, const Parents& parents, int64_t row) {
  return row / parents.h * p.h + first_child(row % parents.h, parents.h, p.h);
}

// First pass over the parent rows [begin, end): gradients of the inputs with no resampling and of the parents' own, grad_sum; the sums of
// grad_sum times input go to `sums`.
template <typename scalar_t>
void backward_unit(const Problem<scalar_t>& p, const Backward<scalar_t>& work, const Walker<scalar_t>& walker, const Parents& parents,
                   int64_t begin, int64_t end, typename Walker<scalar_t>::Buffers& buffers, std::vector<acc_t<scalar_t>>& parent_sums,
                   acc_t<scalar_t>* sums) {
  using A = acc_t<scalar_t>;
  const A* weights = walker.weights().v;
  int owner = -1;
  for (int i = 0; i < p.count; ++i)
    if (work.grad_inputs[i] && parents.own(p.inputs[i])) owner = i;
  if (owner >= 0) parent_sums.assign((end - begin) * parents.w * p.c, A(0));
  const bool reads_inputs = work.grad_weights || p.activation != Activation::kNone;

  walker.for_each_tile(
      first_output_row(p, parents, begin), first_output_row(p, parents, end), [&](int64_t row, int64_t x, int64_t rows, int64_t columns) {
        const int64_t at = (row * p.w + x) * p.c, m = rows * columns * p.c;
        Rows<A> inputs{};
        for (int i = 0; i < p.count; ++i)
          if (reads_inputs) inputs.of[i] = walker.resampled(i, row, x, rows, columns, buffers);
        A* grad = buffers.grad.data();
        if constexpr (std::is_same_v<scalar_t, A>)
          if (work.grad_sum) grad = work.grad_sum + at;
        if (p.activation == Activation::kNone) {
          convert(work.grad + at, m, grad);
        } else {
          walker.dispatch([&]<Activation kActivation, int kCount>() {
            unfuse<kActivation, kCount>(inputs, walker.weights(), work.grad + at, m, grad);
          });
        }
        if constexpr (!std::is_same_v<scalar_t, A>)
          if (work.grad_sum) convert(grad, m, work.grad_sum + at);
        if (sums) dispatch_count(p.count, [&]<int kCount>() { add_products<kCount>(inputs, grad, m, sums); });
        for (int i = 0; i < p.count; ++i)
          if (work.grad_inputs[i] && p.inputs[i].resample == Resample::kNone) scale(grad, weights[i], m, work.grad_inputs[i] + at);
        for (int64_t r = 0; owner >= 0 && r < rows; ++r) {
          const int64_t image = (row + r) / p.h, y = (row + r) % p.h;
          const int64_t parent_row = image * parents.h + nearest_source(y, parents.h, p.h) - begin;
          walker.add_to_parents(owner, grad + r * columns * p.c, x, columns, parent_sums.data() + parent_row * parents.w * p.c);
        }
      });
  for (int i = 0; i < p.count; ++i)
    if (work.grad_inputs[i] && parents.own(p.inputs[i]))
      scale(parent_sums.data(), weights[i], int64_t(parent_sums.size()), work.grad_inputs[i] + begin * parents.w * p.c);
}

// Second pass for the nearest input i, which is not of the parents' size.
template <typename scalar_t>
void backward_nearest(const Problem<scalar_t>& p, const scalar_t* grad_sum, const Walker<scalar_t>& walker, int i, scalar_t* grad_input) {
  const Input<scalar_t>& in = p.inputs[i];
  const int64_t size = in.w * p.c;
  parallel_for(p.n * in.h, std::max<int64_t>(1, kUnit / (size + 1)), [&](int64_t begin, int64_t end) {
    std::vector<acc_t<scalar_t>> sums(size);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sums.begin(), sums.end(), 0);
      const int64_t first = row / in.h * p.h, y = row % in.h;
      for (int64_t child = first + first_child(y, in.h, p.h); child < first + first_child(y + 1, in.h, p.h); ++child)
        walker.add_to_parents(i, grad_sum + child * p.w * p.c, 0, p.w, sums.data());
      scale(sums.data(), walker.weights().v[i], size, grad_input + row * size);
    }
  });
}

template <typename scalar_t>
void backward_max_pool(const Problem<scalar_t>& p, const scalar_t* grad_sum, const Unpool<scalar_t>& in, acc_t<scalar_t> weight) {
  const int64_t size = in.w * p.c;
  if (p.c == 1) {
    parallel_for(p.n * p.h, std::max<int64_t>(1, kUnit / (2 * size)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin, image; row < end; row = (image + 1) * p.h) {
        image = row / p.h;
        const int64_t at = image * p.h * p.w, first = image * p.h;
        unpool_rows(grad_sum + at, in.taps + at, row - first, std::min(end - first, p.h), p.w, in.h, in.w, weight,
                    in.grad_input + image * in.h * in.w);
      }
    });
    return;
  }
  parallel_for(p.n * in.h, std::max<int64_t>(1, kUnit / (size + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Memberships rows(row % in.h + pool_before(in.h));
      const scalar_t* grads[2];
      const uint8_t* row_taps[2];
      for (int i = 0; i < rows.count; ++i) {
        const int64_t at = (row / in.h * p.h + rows.windows[i]) * p.w * p.c;
        grads[i] = grad_sum + at;
        row_taps[i] = in.taps + at;
      }
      const auto unpool = rows.count == 1 ? unpool_row<1, scalar_t> : unpool_row<2, scalar_t>;
      unpool(grads, row_taps, rows.taps, in.w, p.w, p.c, weight, in.grad_input + row * size);
    }
  });
}
}  // namespace

template <typename scalar_t>
int64_t partial_count(Cpu, const Problem<scalar_t>& p) {
  return ceil_div(p.n * Parents::of(p).h, parent_rows_per_unit(p));
}

template <typename scalar_t>
void launch_forward(Cpu, const Problem<scalar_t>& p, const Pooled<scalar_t>& pooled, scalar_t* out) {
  const Walker<scalar_t> walker(p);
  parallel_for(p.n * p.h, std::max<int64_t>(1, kUnit / (p.w * p.c)), [&](int64_t begin, int64_t end) {
    typename Walker<scalar_t>::Buffers buffers(walker);
    walker.for_each_tile(begin, end, [&](int64_t row, int64_t x, int64_t rows, int64_t columns) {
      Rows<acc_t<scalar_t>> inputs{};
      for (int i = 0; i < p.count; ++i) inputs.of[i] = walker.resampled(i, row, x, rows, columns, buffers, pooled);
      walker.dispatch([&]<Activation kActivation, int kCount>() {
        fuse<kActivation, kCount>(inputs, walker.weights(), rows * columns * p.c, out + (row * p.w + x) * p.c);
      });
    });
  });
}

template <typename scalar_t>
void launch_backward(Cpu device, const Problem<scalar_t>& p, const Backward<scalar_t>& work) {
  const Walker<scalar_t> walker(p);
  const Parents parents = Parents::of(p);
  const int64_t rows = p.n * parents.h, step = parent_rows_per_unit(p);
  if (work.partials) std::fill_n(work.partials, partial_count(device, p) * p.count, 0);
  parallel_for(ceil_div(rows, step), 1, [&](int64_t begin, int64_t end) {
    typename Walker<scalar_t>::Buffers buffers(walker);
    std::vector<acc_t<scalar_t>> parent_sums;
    for (int64_t unit = begin; unit < end; ++unit)
      backward_unit(p, work, walker, parents, unit * step, std::min(rows, (unit + 1) * step), buffers, parent_sums,
                    work.partials ? work.partials + unit * p.count : nullptr);
  });
  const scalar_t* grad_sum = work.grad_sum ? work.grad_sum : work.grad;
  for (int i = 0; i < p.count; ++i) {
    const Input<scalar_t>& in = p.inputs[i];
    if (work.unpools[i].grad_input) backward_max_pool(p, grad_sum, work.unpools[i], walker.weights().v[i]);
    if (work.grad_inputs[i] && in.resample == Resample::kNearest && !parents.own(in))
      backward_nearest(p, grad_sum, walker, i, work.grad_inputs[i]);
  }
  if (!work.grad_weights) return;
  acc_t<scalar_t> totals[kMaxFusionInputs];
  for (int i = 0; i < p.count; ++i) {
    double total = 0;
    for (int64_t unit = 0; unit < partial_count(device, p); ++unit) total += work.partials[unit * p.count + i];
    totals[i] = acc_t<scalar_t>(total);
  }
  weight_gradients(p.weights, p.count, p.method, p.eps, totals);
  std::copy_n(totals, p.count, work.grad_weights);
}

#define EF_DEFINE(scalar_t)                                                                                  \
  template void launch_forward<scalar_t>(Cpu, const Problem<scalar_t>&, const Pooled<scalar_t>&, scalar_t*); \
  template void launch_backward<scalar_t>(Cpu, const Problem<scalar_t>&, const Backward<scalar_t>&);         \
  template int64_t partial_count<scalar_t>(Cpu, const Problem<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::fusion
