// One pass over the logits: a list holds the best found so far, twice as many as wanted; whenever it is full the better half stays, and
// the worst of that half is a bar for all that follows. Blocks of logits below the bar are skipped by a loop that vectorizes; few of
// the others remain after the first thousands. An image of a small batch is cut into pieces, whose lists are joined. Which logits come
// out does not depend on the order of the pass, as no two are equal in the order of is_before.
#include <algorithm>
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "decode_detections.h"

namespace ef::decode_detections {
namespace {
constexpr int64_t kBlock = 64;
constexpr int64_t kTasks = 8;                // pieces of a batch at least, where they are large
constexpr int64_t kSmallestPiece = 1 << 17;  // logits

// Start of the first block of x[begin .. end) in which something is not below the bar; `end` where there is none.
template <typename scalar_t>
EF_CPU_CLONES int64_t next_block(const scalar_t* x, int64_t begin, int64_t end, acc_t<scalar_t> bar) {
  using A = acc_t<scalar_t>;
  for (; begin + kBlock <= end; begin += kBlock) {
    int reaches = 0;
#pragma omp simd reduction(| : reaches)
    for (int64_t k = 0; k < kBlock; ++k) reaches |= !(A(x[begin + k]) < bar);
    if (reaches) return begin;
  }
  for (int64_t i = begin; i < end; ++i)
    if (!(A(x[i]) < bar)) return begin;
  return end;
}

template <typename T>
class Best {
 public:
  explicit Best(int64_t wanted) : wanted_(wanted) { list_.reserve(2 * wanted); }

  // Logits x[0 .. n), whose places in the order are first, first + step, ...
  template <typename scalar_t>
  void add(const scalar_t* x, int64_t n, int64_t first, int64_t step) {
    for (int64_t i = next_block(x, 0, n, bar_); i < n; i = next_block(x, i, n, bar_)) {
      for (const int64_t end = std::min(n, i + kBlock); i < end; ++i) {
        const T value = T(x[i]);
        if (value < bar_) continue;
        add({key_of(value), first + i * step});
      }
    }
  }
  void add(const Candidate<T>& candidate) {
    if (is_full_ && !is_before(candidate, worst_)) return;
    list_.push_back(candidate);
    if (int64_t(list_.size()) == 2 * wanted_) shrink();
  }
  void add(const Best& other) {
    for (const Candidate<T>& candidate : other.list_) add(candidate);
  }
  const std::vector<Candidate<T>>& sorted() {
    if (int64_t(list_.size()) > wanted_) shrink();
    std::sort(list_.begin(), list_.end(), Before{});
    return list_;
  }

 private:
  struct Before {  // a type, so that sorting inlines it
    bool operator()(const Candidate<T>& a, const Candidate<T>& b) const { return is_before(a, b); }
  };
  void shrink() {
    const auto last = list_.begin() + (wanted_ - 1);
    std::nth_element(list_.begin(), last, list_.end(), Before{});
    list_.resize(wanted_);
    worst_ = list_.back();
    bar_ = value_of<T>(worst_.key);  // NaN where NaN alone are enough: then no value is below it
    is_full_ = true;
  }

  int64_t wanted_;
  std::vector<Candidate<T>> list_;
  Candidate<T> worst_{};
  T bar_ = -std::numeric_limits<T>::infinity();
  bool is_full_ = false;
};

// The logits of the cells of piece `piece` of `pieces` of an image.
template <typename scalar_t>
void add_piece(const Problem<scalar_t>& in, int64_t image, int64_t piece, int64_t pieces, Best<acc_t<scalar_t>>& best) {
  const int64_t channels = in.channels();
  for (int l = 0; l < in.level_count; ++l) {
    const Level<scalar_t>& level = in.levels[l];
    const scalar_t* x = level.logits + image * level.cells * channels;
    const int64_t begin = level.cells * piece / pieces, count = level.cells * (piece + 1) / pieces - begin;
    const int64_t first = (level.first_cell + begin) * channels;
    if (level.logits_channels_last) {
      best.add(x + begin * channels, count * channels, first, 1);
    } else {
      for (int64_t c = 0; c < channels; ++c) best.add(x + c * level.cells + begin, count, first + c, channels);
    }
  }
}
}  // namespace

template <typename scalar_t>
int64_t state_bytes(Cpu, const Problem<scalar_t>&) {
  return 0;
}
template <typename scalar_t>
int64_t list_bytes(Cpu, const Problem<scalar_t>&) {
  return 0;
}

template <typename scalar_t>
void launch(Cpu, const Problem<scalar_t>& in, void*, void*, const Candidates<acc_t<scalar_t>>& out) {
  using List = Best<acc_t<scalar_t>>;
  const int64_t pieces = std::clamp<int64_t>(in.cells * in.channels() / kSmallestPiece, 1, ceil_div(kTasks, in.batch));
  std::vector<List> lists(in.batch * pieces, List(0));
  parallel_for(in.batch * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      List& list = lists[task] = List(in.candidates);
      add_piece(in, task / pieces, task % pieces, pieces, list);
    }
  });
  parallel_for(in.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      List& best = lists[image * pieces];
      for (int64_t piece = 1; piece < pieces; ++piece) best.add(lists[image * pieces + piece]);
      int64_t rank = 0;
      for (const auto& candidate : best.sorted()) write_candidate(in, image, rank++, candidate, out);
    }
  });
}

#define EF_DEFINE(scalar_t)                                              \
  template int64_t state_bytes<scalar_t>(Cpu, const Problem<scalar_t>&); \
  template int64_t list_bytes<scalar_t>(Cpu, const Problem<scalar_t>&);  \
  template void launch<scalar_t>(Cpu, const Problem<scalar_t>&, void*, void*, const Candidates<acc_t<scalar_t>>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::decode_detections
