// A row is cut into chunks of a fixed size, the unit of work. The loops over a chunk run over `width` lanes at a time, each lane with the
// sum, or the gate, of its channel beside it: as many pixels as fill the vectors. So one set of loops serves both layouts and any
// number of channels. The scaling goes backwards, as the last chunks of what was summed are still in the cache.
#include <algorithm>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "../common/vector.h"
#include "squeeze_excite_gates.h"

namespace ef::squeeze_excite {
namespace {
constexpr int64_t kPart = 1 << 15;
constexpr int64_t kLanes = 64;

struct Chunks {
  int64_t width, size, count;  // lanes; elements of a chunk; chunks of a row
  explicit Chunks(const Shape& s) {
    int64_t pixels = 1;  // that fill whole vectors
    while (pixels * s.channels < 4 * kLanes && (pixels * s.channels < kLanes || pixels * s.channels % 16)) ++pixels;
    width = std::min(pixels, s.pixels) * s.channels;
    size = width * std::max<int64_t>(1, kPart / width);
    count = ceil_div(s.row(), size);
  }
  int64_t grain(const Shape& s) const { return std::max<int64_t>(1, kPart / std::min(size, s.row())); }
  int64_t offset(const Shape& s, int64_t i) const { return i / count * s.row() + i % count * size; }
  int64_t elements(const Shape& s, int64_t i) const { return std::min(size, s.row() - i % count * size); }
};

// Calls f(begin, end) for all chunks of all rows.
template <class F>
void for_all_chunks(const Shape& s, const Chunks& chunks, const F& f) {
  parallel_for(s.rows * chunks.count, chunks.grain(s), f);
}

template <bool kProducts, typename scalar_t>
EF_CPU_CLONES void add(const scalar_t* __restrict x, const scalar_t* __restrict grad, int64_t count, int64_t width,
                       acc_t<scalar_t>* __restrict sum) {
  using A = acc_t<scalar_t>;
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    const scalar_t* __restrict row = x + i, * __restrict factor = grad + (kProducts ? i : 0);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      A a = A(row[j]), b = A(row[width + j]), c = A(row[2 * width + j]), d = A(row[3 * width + j]);
      if constexpr (kProducts) {
        a *= A(factor[j]);
        b *= A(factor[width + j]);
        c *= A(factor[2 * width + j]);
        d *= A(factor[3 * width + j]);
      }
      sum[j] += (a + b) + (c + d);
    }
  }
  for (; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      A value = A(x[i + j]);
      if constexpr (kProducts) value *= A(grad[i + j]);
      sum[j] += value;
    }
  }
}

// To every lane the value of its channel.
template <typename A>
void repeat(const A* values, int64_t channels, int64_t width, A* lanes) {
  for (int64_t j = 0; j < width; j += channels) std::copy_n(values, channels, lanes + j);
}

template <typename A>
EF_CPU_CLONES void add_chunks(const A* __restrict partials, int64_t chunks, int64_t channels, A* __restrict sums) {
  for (int64_t first = 0; first < channels; first += kLanes) {
    const int64_t lanes = std::min(kLanes, channels - first);
    double totals[kLanes];
    std::fill_n(totals, lanes, 0.0);
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t j = 0; j < lanes; ++j) totals[j] += partials[i * channels + first + j];
    for (int64_t j = 0; j < lanes; ++j) sums[first + j] = A(totals[j]);
  }
}

// From the sums to the means, or to the gradients of the gates.
template <typename A>
EF_CPU_CLONES void finish(A* __restrict sums, const A* __restrict gate, int64_t count, A factor) {
  if (gate) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sums[i] = grad_gate(sums[i], gate[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) sums[i] *= factor;
  }
}

template <typename A>
EF_CPU_CLONES void prepare(const A* __restrict gate, const A* __restrict grad_mean, int64_t count, A factor, A* __restrict scale,
                           A* __restrict shift) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) scale[i] = sigmoid(gate[i]);
  if (!grad_mean) return;
  for (int64_t i = 0; i < count; ++i) shift[i] = grad_mean[i] * factor;
}

template <bool kShift, typename scalar_t, class Of>
EF_CPU_CLONES void scale_chunk(const scalar_t* __restrict x, int64_t count, int64_t width, Of scale, Of shift, scalar_t* __restrict y) {
  using A = acc_t<scalar_t>;
  for (int64_t i = 0; i < count; i += width) {
    const int64_t lanes = std::min(width, count - i);
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) y[i + j] = scalar_t(scaled<kShift>(A(x[i + j]), scale[j], kShift ? shift[j] : A(0)));
  }
}

template <bool kProducts, typename scalar_t>
void reduce(const Shape& s, const Chunks& chunks, const Reduction<scalar_t>& in, acc_t<scalar_t>* sums) {
  using A = acc_t<scalar_t>;
  for_all_chunks(s, chunks, [&](int64_t begin, int64_t end) {
    A* sum = scratch<A>(0, chunks.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = chunks.offset(s, i);
      std::fill_n(sum, chunks.width, A(0));
      add<kProducts>(in.x + offset, kProducts ? in.grad + offset : nullptr, chunks.elements(s, i), chunks.width, sum);
      fold(sum, chunks.width, s.channels, s.channels == 1, sums + i * s.channels);
    }
  });
}

template <bool kShift, typename scalar_t>
void scale(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* of_rows, const acc_t<scalar_t>* shift_of_rows, scalar_t* y) {
  using A = acc_t<scalar_t>;
  const Chunks chunks(s);
  for_all_chunks(s, chunks, [&](int64_t begin, int64_t end) {
    const bool alone = chunks.width == s.channels;  // lanes need not be repeated
    A* lanes = scratch<A>(1, 2 * chunks.width);
    int64_t last_row = -1;
    const auto run = [&](int64_t i) {
      const int64_t row = i / chunks.count, first = row * s.channels, offset = chunks.offset(s, i), count = chunks.elements(s, i);
      if (s.channels == 1) {
        const Same<A> scale{of_rows[row]}, shift{kShift ? shift_of_rows[row] : A(0)};
        return scale_chunk<kShift>(x + offset, count, count, scale, shift, y + offset);
      }
      if (!alone && row != last_row) {
        repeat(of_rows + first, s.channels, chunks.width, lanes);
        if (kShift) repeat(shift_of_rows + first, s.channels, chunks.width, lanes + chunks.width);
        last_row = row;
      }
      const A* scale = alone ? of_rows + first : lanes;
      const A* shift = !kShift ? nullptr : alone ? shift_of_rows + first : lanes + chunks.width;
      scale_chunk<kShift>(x + offset, count, chunks.width, scale, shift, y + offset);
    };
    // Small planes go backwards by groups: planes of a kilobyte each in descending order would lose the prefetcher.
    for (int64_t group_end = end, group = chunks.grain(s); group_end > begin; group_end -= group) {
      for (int64_t i = std::max(begin, group_end - group); i < group_end; ++i) run(i);
    }
  });
}
}  // namespace

int64_t chunk_count(Cpu, const Shape& s) { return Chunks(s).count; }

template <typename scalar_t>
void launch_reduce(Cpu, const Shape& s, const Reduction<scalar_t>& in) {
  using A = acc_t<scalar_t>;
  const Chunks chunks(s);
  const bool whole = chunks.count == 1;  // then a chunk's sums are those of its row
  A* sums = whole ? in.result : in.partials;
  in.grad ? reduce<true>(s, chunks, in, sums) : reduce<false>(s, chunks, in, sums);
  const int64_t of_row = chunks.count * s.channels;
  parallel_for(whole ? 0 : s.rows, std::max<int64_t>(1, kPart / of_row), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_chunks(sums + row * of_row, chunks.count, s.channels, in.result + row * s.channels);
  });
  finish(in.result, in.gate, s.gates(), A(1.0 / double(s.pixels)));
}

template <typename scalar_t>
void launch_scale(Cpu, const Shape& s, const scalar_t* x, const acc_t<scalar_t>* gate, const acc_t<scalar_t>* grad_mean, scalar_t* y) {
  using A = acc_t<scalar_t>;
  A *of_rows = scratch<A>(0, 2 * s.gates()), *shift_of_rows = of_rows + s.gates();
  prepare(gate, grad_mean, s.gates(), A(1.0 / double(s.pixels)), of_rows, shift_of_rows);
  grad_mean ? scale<true>(s, x, of_rows, shift_of_rows, y) : scale<false>(s, x, of_rows, shift_of_rows, y);
}

#define EF_DEFINE(T)                                                      \
  template void launch_reduce<T>(Cpu, const Shape&, const Reduction<T>&); \
  template void launch_scale<T>(Cpu, const Shape&, const T*, const acc_t<T>*, const acc_t<T>*, T*);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
template void launch_gates<float>(Cpu, const Weights<float>&, Activation, const Gates<float>&);
template void launch_gates<double>(Cpu, const Weights<double>&, Activation, const Gates<double>&);
template void launch_gates_backward<float>(Cpu, const Weights<float>&, Activation, const Gates<float>&, const GateGradients<float>&);
template void launch_gates_backward<double>(Cpu, const Weights<double>&, Activation, const Gates<double>&, const GateGradients<double>&);
}  // namespace ef::squeeze_excite
