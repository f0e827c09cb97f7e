// What the two layouts' CPU files share: vectors, scratch memory, and the parts of the work they are handed. Arithmetic is in
// A = acc_t: rows of another type, or with a prologue, are first brought into scratch rows, each once, so that the inner loops see
// plain float (or double) only.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/dtypes.h"
#include "../common/scratch.h"
#include "depthwise_conv.h"
#include "depthwise_conv_math.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes or returns a vector is inlined
#endif

namespace ef::depthwise_conv {
template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(32)));
};
template <typename V, typename A>
inline constexpr int kLanes = sizeof(V) / sizeof(A);

template <typename V, typename A>
EF_HD V load(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename A>
EF_HD void store(A* p, const V& v) {
  std::memcpy(p, &v, sizeof(V));
}

// A part of what is computed: rows and columns of image n, and channels.
struct Block {
  int64_t n, first_row, last_row, first_column, last_column, first_channel, last_channel;
  int64_t channels() const { return last_channel - first_channel; }
};
// Rows over all images, counted through, of all columns; worked on in strips of so many columns.
struct Slab {
  int64_t first_row, last_row, strip_columns, first_channel, last_channel;
  int64_t channels() const { return last_channel - first_channel; }
};

// `filter` is packed by pack_filter(shape, weight, of the gradient?); partial is [kernel * kernel + 1][c].
struct Nhwc {
  template <typename scalar_t>
  static std::vector<acc_t<scalar_t>> pack_filter(const Shape& s, const scalar_t* weight, bool gradient);
  template <typename scalar_t>
  static void forward(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* filter, const acc_t<scalar_t>* bias, scalar_t* y,
                      const Block& block);
  template <typename scalar_t>
  static void grad_input(const Shape& s, const scalar_t* grad, const scalar_t* x, const acc_t<scalar_t>* filter, scalar_t* grad_x,
                         const Block& block);
  template <typename scalar_t>
  static void grad_weight(const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partial, bool with_bias,
                          const Slab& slab);
};
struct Nchw {
  template <typename scalar_t>
  static std::vector<acc_t<scalar_t>> pack_filter(const Shape& s, const scalar_t* weight, bool gradient);
  template <typename scalar_t>
  static void forward(const Shape& s, const scalar_t* x, const acc_t<scalar_t>* filter, const acc_t<scalar_t>* bias, scalar_t* y,
                      const Block& block);
  template <typename scalar_t>
  static void grad_input(const Shape& s, const scalar_t* grad, const scalar_t* x, const acc_t<scalar_t>* filter, scalar_t* grad_x,
                         const Block& block);
  template <typename scalar_t>
  static void grad_weight(const Shape& s, const scalar_t* grad, const scalar_t* x, acc_t<scalar_t>* partial, bool with_bias,
                          const Slab& slab);
};
}  // namespace ef::depthwise_conv
