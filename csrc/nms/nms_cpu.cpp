// A candidate is tested against the kept boxes of its class only: O(n * kept). Kept boxes lie in packets of kLanes, one array per
// coordinate, whose unused lanes are NaN and overlap nothing: the test is a loop of fixed length without branches, and vectorizes.
// nms: classes run in parallel; a large class is cut into tiles, whose test against what is kept so far runs in parallel.
// nms_padded: images run in parallel, each in score order with a list of kept boxes per class, until it has enough.
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "nms.h"
#include "nms_math.h"

namespace ef::nms {
namespace {
constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 1024;  // candidates of a large class tested at once
constexpr int64_t kLargeClass = 4 * kTile;
constexpr int64_t kBoxesPerThread = 1024;  // below that a thread is not worth waking

template <typename A>
struct Packet {
  A x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
};

template <typename A>
EF_HD void append(Packet<A>* packets, int64_t count, const Box<A>& box) {
  Packet<A>& packet = packets[count / kLanes];
  const int64_t lane = count % kLanes;
  if (lane == 0) {
    for (int64_t k = 0; k < kLanes; ++k) {
      packet.x1[k] = packet.y1[k] = packet.x2[k] = packet.y2[k] = A(0);
      packet.area[k] = std::numeric_limits<A>::quiet_NaN();
    }
  }
  packet.x1[lane] = box.x1;
  packet.y1[lane] = box.y1;
  packet.x2[lane] = box.x2;
  packet.y2[lane] = box.y2;
  packet.area[lane] = box.area;
}

template <typename A>
EF_HD bool overlaps_any(const Box<A>& box, const Packet<A>* packets, int64_t count, A threshold) {
  for (int64_t p = 0; p * kLanes < count; ++p) {
    const Packet<A>& kept = packets[p];
    int overlaps = 0;
#pragma omp simd reduction(| : overlaps)
    for (int64_t k = 0; k < kLanes; ++k)
      overlaps |= iou(Box<A>{kept.x1[k], kept.y1[k], kept.x2[k], kept.y2[k], kept.area[k]}, box) > threshold;
    if (overlaps) return true;
  }
  return false;
}

template <typename scalar_t>
EF_HD Box<acc_t<scalar_t>> load_box(const scalar_t* boxes, int64_t i) {
  using A = acc_t<scalar_t>;
  const scalar_t* b = boxes + i * 4;
  return box_of(A(b[0]), A(b[1]), A(b[2]), A(b[3]));
}

// keep[i]: box i overlaps none of the kept ones.
template <typename scalar_t>
EF_CPU_CLONES void test_tile(const scalar_t* boxes, int64_t begin, int64_t end, const Packet<acc_t<scalar_t>>* kept, int64_t count,
                             acc_t<scalar_t> threshold, bool* keep) {
  for (int64_t i = begin; i < end; ++i) keep[i] = !overlaps_any(load_box(boxes, i), kept, count, threshold);
}

// Goes through boxes begin .. end - 1, which overlap none of the first `tested` kept ones unless keep[i] is false already, until `max_kept`
// are kept; returns the new number of kept boxes.
template <typename scalar_t>
EF_CPU_CLONES int64_t resolve(const scalar_t* boxes, int64_t begin, int64_t end, Packet<acc_t<scalar_t>>* kept, int64_t tested,
                              int64_t count, int64_t max_kept, acc_t<scalar_t> threshold, bool* keep) {
  const int64_t first = tested / kLanes;
  for (int64_t i = begin; i < end; ++i) {
    if (!keep[i]) continue;
    if (count >= max_kept) {
      keep[i] = false;
      continue;
    }
    const auto box = load_box(boxes, i);
    keep[i] = !overlaps_any(box, kept + first, count - first * kLanes, threshold);
    if (keep[i]) append(kept, count++, box);
  }
  return count;
}

template <typename scalar_t>
void keep_in_large_class(const Problem<scalar_t>& in, int64_t begin, int64_t end, acc_t<scalar_t> threshold, bool* keep) {
  std::vector<Packet<acc_t<scalar_t>>> kept;
  int64_t count = 0;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    if (count >= in.max_kept) {
      std::fill(keep + tile, keep + end, false);
      break;
    }
    const int64_t tile_end = std::min(end, tile + kTile);
    kept.resize(ceil_div(count + kTile, kLanes));
    parallel_for(tile_end - tile, 64,
                 [&](int64_t a, int64_t b) { test_tile(in.boxes, tile + a, tile + b, kept.data(), count, threshold, keep); });
    count = resolve(in.boxes, tile, tile_end, kept.data(), count, count, in.max_kept, threshold, keep);
  }
}

// Dense numbers for the classes of one image and the place of each class's list of kept boxes.
struct Classes {
  std::vector<int64_t> slot;          // [n], the class number of a box
  std::vector<int64_t> first_packet;  // [classes]

  // Counts the boxes in `order`, which may name one more than once.
  Classes(const int64_t* labels, const int64_t* order, int64_t n, int64_t max_kept) : slot(n) {
    const auto [lowest, highest] = std::minmax_element(labels, labels + n);
    std::vector<int64_t> sizes;
    // Ids may lie further apart than an int64 can tell; the difference of the unsigned values is right.
    const uint64_t range = n ? static_cast<uint64_t>(*highest) - static_cast<uint64_t>(*lowest) : 0;
    if (range <= static_cast<uint64_t>(2 * n + 1024)) {
      sizes.resize(range + 1);
      for (int64_t i = 0; i < n; ++i) slot[i] = labels[i] - *lowest;
    } else {
      std::vector<int64_t> ids(labels, labels + n);
      std::sort(ids.begin(), ids.end());
      ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
      sizes.resize(ids.size());
      for (int64_t i = 0; i < n; ++i) slot[i] = std::lower_bound(ids.begin(), ids.end(), labels[i]) - ids.begin();
    }
    for (int64_t rank = 0; rank < n; ++rank) ++sizes[slot[order[rank]]];
    int64_t packets = 0;
    for (int64_t size : sizes) {
      first_packet.push_back(packets);
      packets += ceil_div(std::min(size, max_kept), kLanes);
    }
    first_packet.push_back(packets);
  }
};

template <typename scalar_t>
EF_CPU_CLONES int64_t detect_in_image(const BatchProblem<scalar_t>& in, int64_t image, const int64_t* slot, const int64_t* first_packet,
                                      Packet<acc_t<scalar_t>>* packets, int64_t* counts, acc_t<scalar_t> threshold,
                                      const Detections<scalar_t>& out) {
  const scalar_t* boxes = in.boxes + image * in.n * 4;
  int64_t found = 0;
  for (int64_t rank = 0; rank < in.n && found < in.max_detections; ++rank) {
    const scalar_t score = in.ranked_scores[image * in.n + rank];
    const double value = static_cast<double>(static_cast<acc_t<scalar_t>>(score));
    if (in.has_score_threshold && !(value > in.score_threshold)) {
      if (value != value) continue;
      break;
    }
    const int64_t i = in.order[image * in.n + rank], c = slot[i];
    const auto box = load_box(boxes, i);
    if (overlaps_any(box, packets + first_packet[c], counts[c], threshold)) continue;
    append(packets + first_packet[c], counts[c]++, box);
    out.set(image * in.max_detections + found++, boxes + i * 4, score, in.labels[image * in.n + i], i);
  }
  return found;
}
}  // namespace

int64_t workspace_size(Cpu, int64_t, int64_t) { return 0; }
int64_t max_padded(Cpu) { return std::numeric_limits<int64_t>::max(); }

template <typename scalar_t>
void launch_keep(Cpu, const Problem<scalar_t>& in, int64_t*, bool* keep) {
  using A = acc_t<scalar_t>;
  const A threshold = threshold_in<A>(in.iou_threshold);
  std::vector<int64_t> bounds;  // of the small classes: begin, end, begin, end, ...
  const int64_t boxes = in.batch * in.n;
  for (int64_t begin = 0, end = 0; begin < boxes; begin = end) {
    end = (begin / in.n + 1) * in.n;  // of the image
    if (in.labels) end = std::upper_bound(in.labels + begin, in.labels + end, in.labels[begin]) - in.labels;
    if (end - begin > kLargeClass) {
      keep_in_large_class(in, begin, end, threshold, keep);
    } else {
      bounds.insert(bounds.end(), {begin, end});
    }
  }
  const int64_t classes = static_cast<int64_t>(bounds.size()) / 2;
  parallel_for(classes, std::max<int64_t>(1, classes * kBoxesPerThread / boxes), [&](int64_t first, int64_t last) {
    std::vector<Packet<A>> kept;
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = bounds[2 * c], end = bounds[2 * c + 1];
      kept.resize(std::max<size_t>(kept.size(), ceil_div(end - begin, kLanes)));
      std::fill(keep + begin, keep + end, true);
      resolve(in.boxes, begin, end, kept.data(), 0, 0, in.max_kept, threshold, keep);
    }
  });
}

template <typename scalar_t>
void launch_padded(Cpu, const BatchProblem<scalar_t>& in, const Detections<scalar_t>& out) {
  using A = acc_t<scalar_t>;
  const A threshold = threshold_in<A>(in.iou_threshold);
  parallel_for(in.batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image) {
      const Classes classes(in.labels + image * in.n, in.order + image * in.n, in.n, in.max_detections);
      std::vector<Packet<A>> packets(classes.first_packet.back());
      std::vector<int64_t> counts(classes.first_packet.size());
      const int64_t found =
          detect_in_image(in, image, classes.slot.data(), classes.first_packet.data(), packets.data(), counts.data(), threshold, out);
      for (int64_t k = found; k < in.max_detections; ++k) out.clear(image * in.max_detections + k);
      out.counts[image] = found;
    }
  });
}

#define EF_DEFINE(scalar_t)                                                            \
  template void launch_keep<scalar_t>(Cpu, const Problem<scalar_t>&, int64_t*, bool*); \
  template void launch_padded<scalar_t>(Cpu, const BatchProblem<scalar_t>&, const Detections<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::nms
