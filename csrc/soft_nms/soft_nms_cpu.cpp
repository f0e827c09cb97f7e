// A box decays only boxes of its class. So each class of an image has a list of its own with its best box known, and a heap tells the
// class whose best is the best of all: a step costs one pass over one class. A list is packets of kLanes boxes in index order, one
// array per coordinate; a packet that the taken box does not touch, or whose boxes are all out, keeps its best. Images run in parallel.
#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <vector>

#include "../common/parallel.h"
#include "../common/platform.h"
#include "soft_nms.h"
#include "soft_nms_math.h"

namespace ef::soft_nms {
namespace {
constexpr int64_t kLanes = 16;

template <typename A>
struct Packet {
  A x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes], score[kLanes];
  A best;  // the largest score
};

// The best box of a class: the place of its score in the list, and its index in the image.
template <typename A>
struct Best {
  A score;
  int64_t place, index, list;
  bool operator<(const Best& other) const { return score < other.score || (score == other.score && index > other.index); }
};

template <typename A>
struct List {
  std::vector<Packet<A>> packets;
  std::vector<int64_t> indices;  // of the boxes, ascending
};

// The first of the highest scores.
template <typename A>
Best<A> best_of(const List<A>& list, int64_t number) {
  const Packet<A>* best = list.packets.data();
  for (const Packet<A>& packet : list.packets) {
    if (packet.best > best->best) best = &packet;
  }
  const int64_t place = (best - list.packets.data()) * kLanes + (std::find(best->score, best->score + kLanes, best->best) - best->score);
  return {best->best, place, best->best > out_score<A>() ? list.indices[place] : -1, number};
}

// Decays all boxes of a list that the box at `place` overlaps; that one is out.
template <bool kGaussian, typename A>
EF_CPU_CLONES void take(Packet<A>* packets, int64_t count, int64_t place, const Decay<A>& decay) {
  Packet<A>& home = packets[place / kLanes];
  const int64_t lane = place % kLanes;
  const Box<A> box{home.x1[lane], home.y1[lane], home.x2[lane], home.y2[lane], home.area[lane]};
  home.score[lane] = out_score<A>();
  for (int64_t p = 0; p < count; ++p) {
    Packet<A>& packet = packets[p];
    if (!(packet.best > out_score<A>())) continue;
    A inter[kLanes];
    int touched = &packet == &home;  // its best is no longer there
#pragma omp simd reduction(| : touched)
    for (int64_t k = 0; k < kLanes; ++k) {
      inter[k] = intersection(box, Box<A>{packet.x1[k], packet.y1[k], packet.x2[k], packet.y2[k], A(0)});
      touched |= may_decay(inter[k], decay);
    }
    if (!touched) continue;
    A best = out_score<A>();
#pragma omp simd reduction(max : best)
    for (int64_t k = 0; k < kLanes; ++k) {
      const A iou = rounded_quotient(inter[k], (box.area + packet.area[k]) - inter[k]);
      const A score = decayed_score<kGaussian>(packet.score[k], iou, decay);
      packet.score[k] = score;
      best = score > best ? score : best;
    }
    packet.best = best;
  }
}

// One list per class, of the boxes that take part.
template <typename scalar_t>
std::vector<List<acc_t<scalar_t>>> lists_of(const Problem<scalar_t>& in, int64_t image, const Decay<acc_t<scalar_t>>& decay) {
  using A = acc_t<scalar_t>;
  const scalar_t *boxes = in.boxes + image * in.n * 4, *scores = in.scores + image * in.n;
  const int64_t* labels = in.labels + image * in.n;
  std::vector<int64_t> order;
  for (int64_t i = 0; i < in.n; ++i) {
    if (A(scores[i]) > decay.score_threshold) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b] || (labels[a] == labels[b] && a < b); });
  std::vector<List<A>> lists;
  for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    while (end < order.size() && labels[order[end]] == labels[order[begin]]) ++end;
    List<A>& list = lists.emplace_back();
    list.indices.assign(order.begin() + begin, order.begin() + end);
    list.packets.resize(ceil_div(end - begin, kLanes));
    for (size_t k = 0; k < list.packets.size() * kLanes; ++k) {
      Packet<A>& packet = list.packets[k / kLanes];
      const int64_t lane = k % kLanes, i = k < list.indices.size() ? list.indices[k] : -1;
      const scalar_t* b = boxes + i * 4;
      const Box<A> box = i < 0 ? Box<A>{} : box_of(A(b[0]), A(b[1]), A(b[2]), A(b[3]));
      packet.x1[lane] = box.x1;
      packet.y1[lane] = box.y1;
      packet.x2[lane] = box.x2;
      packet.y2[lane] = box.y2;
      packet.area[lane] = box.area;
      packet.score[lane] = i < 0 ? out_score<A>() : A(scores[i]);
      packet.best = lane == 0 ? packet.score[0] : std::max(packet.best, packet.score[lane]);
    }
  }
  return lists;
}

template <typename scalar_t>
void detect_in_image(const Problem<scalar_t>& in, int64_t image, const Decay<acc_t<scalar_t>>& decay, const Detections<scalar_t>& out) {
  using A = acc_t<scalar_t>;
  auto lists = lists_of(in, image, decay);
  std::priority_queue<Best<A>> heads;
  for (size_t number = 0; number < lists.size(); ++number) heads.push(best_of(lists[number], number));
  const int64_t first = image * in.max_detections, end = first + in.max_detections;
  int64_t row = first;
  while (row < end && !heads.empty()) {
    const Best<A> best = heads.top();
    heads.pop();
    const int64_t i = image * in.n + best.index;
    out.set(row++, in.boxes + i * 4, static_cast<scalar_t>(best.score), in.labels[i], best.index);
    auto& list = lists[best.list];
    (in.gaussian ? take<true, A> : take<false, A>)(list.packets.data(), list.packets.size(), best.place, decay);
    const Best<A> next = best_of(list, best.list);
    if (next.index >= 0) heads.push(next);
  }
  out.counts[image] = row - first;
  for (; row < end; ++row) out.clear(row);
}
}  // namespace

template <typename scalar_t>
int64_t workspace_bytes(Cpu, int64_t, int64_t) {
  return 0;
}

template <typename scalar_t>
void launch(Cpu, const Problem<scalar_t>& in, void*, const Detections<scalar_t>& out) {
  const auto decay = Decay<acc_t<scalar_t>>::of(in.gaussian, in.sigma, in.iou_threshold, in.score_threshold);
  parallel_for(in.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) detect_in_image(in, image, decay, out);
  });
}

#define EF_DEFINE(scalar_t)                                          \
  template int64_t workspace_bytes<scalar_t>(Cpu, int64_t, int64_t); \
  template void launch<scalar_t>(Cpu, const Problem<scalar_t>&, void*, const Detections<scalar_t>&);
EF_FOR_EACH_FLOATING(EF_DEFINE)
#undef EF_DEFINE
}  // namespace ef::soft_nms
