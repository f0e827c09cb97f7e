// Anchors lie in groups of kGroup consecutive ones, one array per coordinate, with their bounds. A box computes its largest possible
// IoU with every group, visits the most promising group, and from then on only groups that may still hold an anchor that matters: one
// above the threshold, or one better than the best so far. Few are left, as neighbors in the list are neighbors in the image.
// Images run in parallel. Both loops, over groups and over the anchors of one, vectorize.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../common/parallel.h"
#include "anchor_matching.h"

namespace ef::anchor_matching {
namespace {
constexpr int64_t kGroup = 64;
constexpr int64_t kSpan = 16;                // groups whose bounds are looked at together
constexpr int64_t kWorkPerThread = 1 << 14;  // anchors written, below which a thread is not worth waking

template <typename T>
struct Packet {
  T x1[kGroup], y1[kGroup], x2[kGroup], y2[kGroup], area[kGroup];
  EF_HD Box<T> at(int64_t k) const { return {x1[k], y1[k], x2[k], y2[k], area[k]}; }
};

template <typename T>
struct Anchors {
  int64_t groups;  // in use; the arrays are filled up to a multiple of kSpan with groups that overlap nothing
  std::vector<Packet<T>> packets;
  std::vector<T> x1, y1, x2, y2, smallest, largest;

  explicit Anchors(int64_t count) : groups(ceil_div(count, kGroup)), packets(groups) {
    const int64_t padded = ceil_div(groups, kSpan) * kSpan;
    for (auto* bound : {&x1, &y1, &x2, &y2, &smallest, &largest}) bound->resize(padded);
  }
};

template <typename T>
EF_HD Box<T> load_box(const T* boxes, int64_t i) {
  const T* b = boxes + i * 4;
  return box_of(b[0], b[1], b[2], b[3]);
}

template <typename T>
void fill_group(const T* source, int64_t count, int64_t g, Anchors<T>& anchors) {
  Group<T> group = empty_group<T>();
  Packet<T>& packet = anchors.packets[g];
  for (int64_t k = 0; k < kGroup; ++k) {
    const int64_t i = g * kGroup + k;
    const Box<T> anchor = i < count ? load_box(source, i) : Box<T>{};
    if (i < count) group = join(group_of(anchor), group);
    packet.x1[k] = anchor.x1;
    packet.y1[k] = anchor.y1;
    packet.x2[k] = anchor.x2;
    packet.y2[k] = anchor.y2;
    packet.area[k] = anchor.area;
  }
  anchors.x1[g] = group.hull.x1;
  anchors.y1[g] = group.hull.y1;
  anchors.x2[g] = group.hull.x2;
  anchors.y2[g] = group.hull.y2;
  anchors.smallest[g] = group.hull.area;
  anchors.largest[g] = group.largest;
}

// What an image's boxes have found so far. `match` is worth something only where `iou` is above 0.
template <typename T>
struct Found {
  std::vector<T> iou;                  // [groups * kGroup], highest IoU of an anchor; infinite where a box forced it
  std::vector<int32_t> match;          // [groups * kGroup], the box that has it
  std::vector<unsigned char> touched;  // [groups], whether the group holds anything
  std::vector<T> bounds;               // [groups, padded], of the box at hand
  std::vector<int64_t> forced;         // [boxes], anchors to be forced

  explicit Found(const Anchors<T>& anchors)
      : iou(anchors.groups * kGroup), match(anchors.groups * kGroup), touched(anchors.groups), bounds(anchors.x1.size()) {}
};

// The best anchor of a box: its IoU and its group.
template <typename T>
struct Best {
  T iou = 0;
  int64_t group = 0;
};

// Shows the anchors of a group to box `index`.
template <typename T>
EF_HD void visit(const Packet<T>& anchors, const Box<T>& box, int64_t g, int32_t index, Found<T>& found, Best<T>& best) {
  T* __restrict highest_iou = found.iou.data() + g * kGroup;
  int32_t* __restrict match = found.match.data() + g * kGroup;
  T highest = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t k = 0; k < kGroup; ++k) {
    const T v = iou(anchors.at(k), box);
    const bool is_better = v > highest_iou[k];
    highest_iou[k] = is_better ? v : highest_iou[k];
    match[k] = is_better ? index : match[k];
    highest = v > highest ? v : highest;
  }
  found.touched[g] = 1;
  if (highest > best.iou || (highest == best.iou && g < best.group)) best = {highest, g};
}

// Shows box `index` all anchors for which it may be the best box, or which may be the best for it where `wants_best`.
template <typename T>
EF_CPU_CLONES Best<T> match_box(const Anchors<T>& anchors, const Box<T>& box, int32_t index, T negative, bool wants_best, Found<T>& found) {
  const T* __restrict x1 = anchors.x1.data(), * __restrict y1 = anchors.y1.data(), * __restrict x2 = anchors.x2.data(),
                      * __restrict y2 = anchors.y2.data(), * __restrict smallest = anchors.smallest.data(),
                      * __restrict largest = anchors.largest.data();
  T* __restrict bounds = found.bounds.data();
  const int64_t padded = static_cast<int64_t>(found.bounds.size());
  T highest = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t g = 0; g < padded; ++g) {
    const T bound = iou_bound(Group<T>{{x1[g], y1[g], x2[g], y2[g], smallest[g]}, largest[g]}, box);
    bounds[g] = bound;
    highest = bound > highest ? bound : highest;
  }
  // A group that overlaps the box nowhere is never worth a visit.
  constexpr T kLeast = std::numeric_limits<T>::denorm_min();
  Best<T> best;
  int64_t first = -1;
  if (wants_best && highest > T(0)) {
    first = std::find(bounds, bounds + anchors.groups, highest) - bounds;
    visit(anchors.packets[first], box, first, index, found, best);
  }
  for (int64_t span = 0; span < padded; span += kSpan) {
    T limit = wants_best ? larger(smaller(best.iou, negative), kLeast) : negative;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t g = span; g < span + kSpan; ++g) any |= may_reach(bounds[g], limit);
    if (!any) continue;
    for (int64_t g = span; g < std::min(span + kSpan, anchors.groups); ++g) {
      if (g == first || !may_reach(bounds[g], limit)) continue;
      visit(anchors.packets[g], box, g, index, found, best);
      if (wants_best) limit = larger(smaller(best.iou, negative), kLeast);
    }
  }
  return best;
}

// Appends the first anchor, or every anchor, whose IoU with the box is `best`.
template <typename T>
EF_CPU_CLONES void find_best(const Anchors<T>& anchors, const Box<T>& box, T best, int64_t first_group, bool all, const T* bounds,
                             std::vector<int64_t>& result) {
  for (int64_t g = first_group; g < anchors.groups; ++g) {
    if (!may_reach(bounds[g], best)) continue;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t k = 0; k < kGroup; ++k) any |= iou(anchors.packets[g].at(k), box) == best;
    if (!any) continue;
    for (int64_t k = 0; k < kGroup; ++k) {
      if (iou(anchors.packets[g].at(k), box) != best) continue;
      result.push_back(g * kGroup + k);
      if (!all) return;
    }
  }
}

template <typename T>
struct Image {
  const T* boxes;
  const int64_t* labels;
  int64_t rows;
  const bool* objects;  // which rows are
};

// The box an anchor overlaps most, whether it visited it or not.
template <typename T>
EF_CPU_CLONES int32_t best_box(const Image<T>& image, const Box<T>& anchor) {
  T highest = -1;
  int32_t match = 0;
  for (int64_t i = 0; i < image.rows; ++i) {
    if (!image.objects[i]) continue;
    const T v = iou(anchor, load_box(image.boxes, i));
    const T overlap = v > T(0) ? v : T(0);
    if (overlap > highest) {
      highest = overlap;
      match = static_cast<int32_t>(i);
    }
  }
  return match;
}

template <typename T>
void match_image(const Problem<T>& in, const Anchors<T>& anchors, const Image<T>& image, Found<T>& found) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  found.forced.clear();
  bool all_tie = false;  // a box that overlaps no anchor ties with all of them
  for (int64_t i = 0; i < image.rows; ++i) {
    if (!image.objects[i]) {
      if (in.force == ForcedMatch::kFirst) found.forced.push_back(-1);
      continue;
    }
    const Box<T> box = load_box(image.boxes, i);
    const Best<T> best = match_box(anchors, box, static_cast<int32_t>(i), in.negative, in.force != ForcedMatch::kNone, found);
    if (in.force == ForcedMatch::kFirst) {
      const size_t before = found.forced.size();
      if (best.iou > T(0)) find_best(anchors, box, best.iou, best.group, false, found.bounds.data(), found.forced);
      if (found.forced.size() == before) found.forced.push_back(0);
    } else if (in.force == ForcedMatch::kTies) {
      if (best.iou > T(0)) {
        find_best(anchors, box, best.iou, best.group, true, found.bounds.data(), found.forced);
      } else {
        all_tie = true;
      }
    }
  }
  if (all_tie) {
    found.forced.resize(in.count);
    std::iota(found.forced.begin(), found.forced.end(), int64_t(0));
  }
  // From the last to the first: the first box to claim an anchor is the last to write it.
  for (int64_t n = static_cast<int64_t>(found.forced.size()) - 1; n >= 0; --n) {
    const int64_t a = found.forced[n];
    if (a < 0 || (in.force == ForcedMatch::kTies && found.iou[a] == kInfinity)) continue;
    found.match[a] = in.force == ForcedMatch::kTies ? best_box(image, load_box(in.anchors, a)) : static_cast<int32_t>(n);
    found.iou[a] = kInfinity;
    found.touched[a / kGroup] = 1;
  }
}

// Writes the targets of an image and leaves `found` as it was before it.
template <typename T>
int64_t write_image(const Problem<T>& in, const Image<T>& image, Found<T>& found, int64_t* __restrict labels, T* __restrict deltas) {
  int64_t positives = 0;
  for (int64_t begin = 0; begin < in.count; begin += kGroup) {
    const int64_t end = std::min(in.count, begin + kGroup);
    std::fill(labels + begin, labels + end, int64_t(-1));
    std::fill(deltas + begin * 4, deltas + end * 4, T(0));
    if (!found.touched[begin / kGroup]) continue;
    for (int64_t a = begin; a < end; ++a) {
      if (!(found.iou[a] >= in.negative)) continue;
      labels[a] = -2;
      if (!(found.iou[a] >= in.positive)) continue;
      const int32_t row = found.match[a];
      labels[a] = image.labels[row];
      encode(in.coder, load_box(image.boxes, row), load_box(in.anchors, a), deltas + a * 4);
      ++positives;
    }
    std::fill(found.iou.begin() + begin, found.iou.begin() + begin + kGroup, T(0));
    found.touched[begin / kGroup] = 0;
  }
  return positives;
}
}  // namespace

int64_t workspace_size(Cpu, int64_t, int64_t) { return 0; }

template <typename T>
void launch_match(Cpu, const Problem<T>& problem, int64_t*, const Targets<T>& out) {
  Anchors<T> anchors(problem.count);
  parallel_for(anchors.groups, kWorkPerThread / kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) fill_group(problem.anchors, problem.count, g, anchors);
  });
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (problem.count + kGroup * problem.max_boxes));
  parallel_for(problem.batch, grain, [&](int64_t begin, int64_t end) {
    Found<T> found(anchors);
    const auto objects = std::make_unique<bool[]>(problem.max_boxes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t rows = problem.rows(i);
      for (int64_t row = 0; row < rows; ++row) objects[row] = problem.is_object(i, row);
      const Image<T> image{problem.boxes + i * problem.max_boxes * 4, problem.labels + i * problem.max_boxes, rows, objects.get()};
      match_image(problem, anchors, image, found);
      out.positives[i] = write_image(problem, image, found, out.labels + i * problem.count, out.deltas + i * problem.count * 4);
    }
  });
}

#define EF_DEFINE(T) template void launch_match<T>(Cpu, const Problem<T>&, int64_t*, const Targets<T>&);
EF_DEFINE(float)
EF_DEFINE(double)
#undef EF_DEFINE
}  // namespace ef::anchor_matching
