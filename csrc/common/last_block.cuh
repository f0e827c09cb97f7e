// The end of a kernel that sums over blocks: the last block to come adds what the others left in memory, so that nobody launches a second
// kernel for it. Which block that is does not matter to the sums: it adds all partials, its own too, in an order of their own.
//
//   each block                                       the last one, of `blocks`
//   store_partial     every thread                   fence          the others' partials are there for what comes behind it
//   fence             every thread: its partials     counter = 0    for the next launch, or replay of a graph
//                     are there before the ticket    barrier
//   barrier           all threads' are               load_partial   past the L1 cache, which may hold what lay there before
//   ticket            thread 0, from the counter
//
// A launch has kMaxCounters counters, each for the blocks that share a last one. Whose they are:
// - Launches of one stream follow each other and share theirs: each leaves nought behind. (So it must not begin before the one in front
//   has ended, as programmatic dependent launch lets it.) Streams have different ones, whose launches may run at the same time.
// - A graph replays whenever its owner likes, beside the stream that it was captured from: what a capture launches on a stream has
//   counters of its own, those of a pair (capture, stream).
// - A launch that was killed, or of which the emulation ran a few blocks, leaves a counter at any number. So a counter has the number of
//   its launch in its upper half, and the first ticket of a later launch starts it anew.
// No memory is allocated or cleared for any of it: the counters are zero when the device loads the module.
// Limits: of kQueues streams or captures after one the next has its counters again, which matters if both run at once; so do two
// executable graphs made of one capture. A killed replay would leave what the next one, with the same number, counts on from; but on a
// device nothing outlives a killed kernel: the context is lost, and the module with its counters.
#pragma once
#include <array>
#include <cstring>
#include <map>
#include <mutex>

#include "launch.cuh"
#include "vec.cuh"

namespace ef {
using Counter = unsigned long long;
inline constexpr unsigned kMaxCounters = 128, kQueues = 256;
// What a launch needs to take tickets: kMaxCounters counters from `first` on, and its number.
struct Tickets {
  unsigned first, launch;
};
inline Tickets take_tickets(Cuda device) {
  static std::mutex mutex;
  static std::map<std::array<unsigned long long, 2>, unsigned> queues[2];  // by capture and stream
  static unsigned launches = 0;
  const auto stream = static_cast<cudaStream_t>(device.stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0, id = 0;
  check_cuda("capture of a stream", cudaStreamGetCaptureInfo(stream, &status, &capture));
  check_cuda("id of a stream", cudaStreamGetId(stream, &id));
  const bool is_captured = status != cudaStreamCaptureStatusNone;
  const std::lock_guard lock(mutex);
  auto& own = queues[is_captured];
  const unsigned queue = own.try_emplace({is_captured ? capture : 0, id}, unsigned(own.size() % kQueues)).first->second;
  return {(is_captured * kQueues + queue) * kMaxCounters, ++launches};
}

namespace {                                               // each file that is compiled has counters of its own
__device__ Counter counters[2 * kQueues * kMaxCounters];  // of streams, then of captures

// For all threads of a block of one or two dimensions: whether `blocks` - 1 others have been here before with this counter.
__device__ inline bool is_last_block(const Tickets& tickets, unsigned counter, unsigned blocks) {
  __threadfence();
  __syncthreads();
  if (blocks == 1) return true;
  bool is_last = false;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    Counter* const own = counters + tickets.first + counter;
    atomicMax(own, Counter(tickets.launch) << 32);
    is_last = unsigned(atomicAdd(own, Counter(1))) == blocks - 1;
    __threadfence();
    if (is_last) *own = 0;
  }
  return __syncthreads_or(is_last);
}
}  // namespace

// kSize values for other blocks, 4 or 8 bytes.
template <typename T, int kSize>
using PartialBits = std::conditional_t<sizeof(T) * kSize == 4, unsigned, unsigned long long>;
template <int kSize, typename T>
__device__ void store_partial(T* p, const T (&values)[kSize]) {
  PartialBits<T, kSize> bits;
  static_assert(sizeof(bits) == sizeof(values));
  std::memcpy(&bits, values, sizeof(bits));
  __stcg(reinterpret_cast<PartialBits<T, kSize>*>(p), bits);
}
template <int kSize, typename T>
__device__ Vec<T, kSize> load_partial(const T* p) {
  Vec<T, kSize> values;
  const auto bits = __ldcg(reinterpret_cast<const PartialBits<T, kSize>*>(p));
  static_assert(sizeof(bits) == sizeof(values));
  std::memcpy(&values, &bits, sizeof(bits));
  return values;
}

// Sums over the chunks of a grid (x, chunks), in which blocks of another x have sums of their own. Up to 2 kFan chunks are added by one
// last block. More are as many that one block would be slow: those of a row are added by the last block of the row, and the rows by the
// last of these. A row has kFan chunks, or a multiple, so that there are no more rows than chunks in one.
//   chunk  0 1 2 3 | 4 5 6 7 | 8 9   kFan 4
//   row       0    |    1    |  2    -> all
// `width` neighbors in x end together, where each by itself would take more counters than a launch has.
inline constexpr unsigned kFan = 16;  // whose loads a thread may have under way at once
struct Finish {
  Tickets tickets;
  unsigned fan, rows, width;
};
inline Finish finish_of(Cuda device, dim3 grid) {
  unsigned fan = grid.y <= 2 * kFan ? 2 * kFan : kFan;
  while (fan * fan < grid.y || ceil_div(grid.y, fan) >= kMaxCounters) fan += kFan;
  const unsigned rows = unsigned(ceil_div(grid.y, fan));
  return {take_tickets(device), fan, rows, grid.y == 1 ? 1 : unsigned(ceil_div(grid.x, kMaxCounters / (rows + 1)))};
}

// Partials to be added: of the chunks first, first + stride, ..., `count` of them, of the blocks begin_x to end_x. The sums are the
// result, or take the place of the first chunk's partials.
struct Chunks {
  unsigned first, count, stride, begin_x, end_x;
  bool are_all;
};
// Calls add(Chunks) in the block that has to add some; for all threads of all blocks of the grid, with their partials stored.
template <class Add>
__device__ void add_chunks(const Finish& finish, Add&& add) {
  const unsigned group = blockIdx.x / finish.width, row = blockIdx.y / finish.fan, counter = group * (finish.rows + 1);
  Chunks chunks;
  chunks.begin_x = group * finish.width, chunks.end_x = min(chunks.begin_x + finish.width, gridDim.x);
  chunks.first = row * finish.fan, chunks.count = min(finish.fan, gridDim.y - chunks.first), chunks.stride = 1;
  chunks.are_all = finish.rows == 1;
  if (!is_last_block(finish.tickets, counter + row, (chunks.end_x - chunks.begin_x) * chunks.count)) return;
  while (true) {
    add(chunks);
    if (chunks.are_all || !is_last_block(finish.tickets, counter + finish.rows, finish.rows)) return;
    chunks.first = 0, chunks.count = finish.rows, chunks.stride = finish.fan;
    chunks.are_all = true;
  }
}
}  // namespace ef
