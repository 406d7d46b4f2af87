// Collectives between ranks of one host.
//
// Memory that all ranks have registered is read and written where it lies. Anything else passes
// through the staging slots in pieces that stay in the cache. There are two slots: whoever fills one
// has met everybody since the other ranks read what was in it before, so each piece costs one
// meeting (two where results are exchanged as well).
//
// Sums are made in order of rank, in float32 for the low-precision dtypes, so all ranks get the
// same bits.
#include <climits>
#include <new>
#include <numeric>

#include "shared_group.h"
#include "tiles.h"

namespace drivetrain {
namespace {

constexpr int kInt8 = 3;  // after the float dtypes of tiles.h
enum Operation : uint32_t { kSum = 0, kMax = 1, kMin = 2 };

int64_t width_of(uint32_t dtype) { return dtype == kInt8 ? 1 : size_of(static_cast<int>(dtype)); }

// Layout shared with shared_group.py.
struct Request {
  uint32_t collective, dtype, op, source;
  const char* input;
  char* output;
  int64_t count;
  int32_t input_segment, output_segment;
  int64_t input_offset, output_offset;
  // Where each rank's registered input and output are mapped here; null without registration.
  char* const* const* segments;
  // All-to-all: bytes for and from each rank.
  const int64_t* sent;
  const int64_t* received;
  // Whether the thread that runs it has nothing else to do.
  uint32_t patient;
};

// -- arithmetic --------------------------------------------------------------------------------

template <uint32_t kOp, typename T>
inline T combined(T a, T b) {
  if (kOp == kMax) return b > a || b != b ? b : a;
  if (kOp == kMin) return b < a || b != b ? b : a;
  return static_cast<T>(a + b);
}

// Two arrays of float32, without a scratch tile; the output may be either.
template <uint32_t kOp>
void reduce_pair(float* output, const float* one, const float* other, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) output[i] = combined<kOp>(one[i], other[i]);
}

template <uint32_t kOp>
void reduce_floats(char* output, const char* const* inputs, int number, int dtype, int64_t count) {
  Tile sum, scratch;
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t here = std::min(kTile, count - start);
    const float* first = view(inputs[0], dtype, start, here, sum);
    for (int k = 1; k < number; ++k) {
      const float* next = view(inputs[k], dtype, start, here, scratch);
#pragma omp simd
      for (int64_t i = 0; i < here; ++i) sum.data[i] = combined<kOp>(first[i], next[i]);
      first = sum.data;
    }
    narrow(first, output, dtype, start, here);
  }
}

template <uint32_t kOp>
void reduce_bytes(char* output, const char* const* inputs, int number, int64_t count) {
  int8_t* to = reinterpret_cast<int8_t*>(output);
  const int8_t* first = reinterpret_cast<const int8_t*>(inputs[0]);
  for (int k = 1; k < number; ++k) {
    const int8_t* next = reinterpret_cast<const int8_t*>(inputs[k]);
    for (int64_t i = 0; i < count; ++i) to[i] = combined<kOp>(first[i], next[i]);
    first = to;
  }
}

// Reduces `number` arrays of `count` elements; the output may be one of them.
template <uint32_t kOp>
void reduce(char* output, const char* const* inputs, int number, uint32_t dtype, int64_t count) {
  if (dtype == kFloat32 && number == 2) {
    reduce_pair<kOp>(reinterpret_cast<float*>(output), reinterpret_cast<const float*>(inputs[0]),
                     reinterpret_cast<const float*>(inputs[1]), count);
    return;
  }
  if (dtype != kInt8) {
    reduce_floats<kOp>(output, inputs, number, static_cast<int>(dtype), count);
    return;
  }
  // Bytes are added in place, so the output must not be overwritten before it is read.
  alignas(64) char sum[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t here = std::min(kTile, count - start);
    const char* pieces[kMaxRanks];
    for (int k = 0; k < number; ++k) pieces[k] = inputs[k] + start;
    reduce_bytes<kOp>(sum, pieces, number, here);
    std::memcpy(output + start, sum, here);
  }
}

void reduce(char* output, const char* const* inputs, int number, const Request& r, int64_t count) {
  if (r.op == kSum) reduce<kSum>(output, inputs, number, r.dtype, count);
  if (r.op == kMax) reduce<kMax>(output, inputs, number, r.dtype, count);
  if (r.op == kMin) reduce<kMin>(output, inputs, number, r.dtype, count);
}

// -- one collective ------------------------------------------------------------------------------

class Run {
 public:
  Run(Group& group, const Request& request)
      : group_(group),
        r_(request),
        size_(group.size()),
        rank_(group.rank()),
        width_(width_of(request.dtype)) {}

  Outcome operator()() {
    group_.announce({r_.collective, r_.dtype, r_.op, r_.source, r_.count, r_.input_segment,
                     r_.output_segment, r_.input_offset, r_.output_offset});
    if (r_.collective == kAllToAll) {
      std::copy(r_.sent, r_.sent + size_, group_.control(rank_).sizes[group_.parity()]);
    }
    parity_ = group_.parity();
    switch (r_.collective) {
      case kAllReduce:
        all_reduce();
        break;
      case kReduceScatter:
        reduce_scatter();
        break;
      case kAllGather:
        all_gather();
        break;
      case kBroadcast:
        broadcast();
        break;
      case kAllToAll:
        all_to_all();
        break;
      default:
        meet();
    }
    return outcome_;
  }

 private:
  // Waits for everybody; at the first time also checks that everybody does the same.
  bool meet() {
    outcome_ = group_.meet(r_.patient != 0);
    if (outcome_.fault == kNone && first_) outcome_ = group_.compare();
    first_ = false;
    return outcome_.fault == kNone;
  }

  const Descriptor& announced(int k) const { return group_.control(k).descriptors[parity_]; }

  // Whether every rank registered its input (output); known after the first meeting.
  bool all_registered(bool input) const {
    for (int k = 0; k < size_; ++k) {
      const Descriptor& d = announced(k);
      const int32_t segment = input ? d.input_segment : d.output_segment;
      if (segment < 0 || r_.segments == nullptr) return false;
      if (segment != (input ? r_.input_segment : r_.output_segment)) return false;
    }
    return true;
  }

  char* registered_input(int k) const {
    return r_.segments[r_.input_segment][k] + announced(k).input_offset;
  }
  char* registered_output(int k) const {
    return r_.segments[r_.output_segment][k] + announced(k).output_offset;
  }
  // Whether memory is worth looking for: registration is known only after a meeting, which for
  // small messages costs more than copying them. All ranks decide alike, so they meet as often.
  bool large(int64_t count) const { return count * width_ > kSmall; }

  // [begin, end) of what `rank` reduces out of `count` elements; in whole cache lines.
  int64_t edge(int rank, int64_t count) const {
    if (rank >= size_) return count;
    const int64_t share = ((count + size_ - 1) / size_ + 63) / 64 * 64;
    return std::min(count, rank * share);
  }

  void all_reduce() {
    const int64_t piece = std::max<int64_t>(1, group_.slot_bytes() / width_);
    const bool small = size_ == 2 || !large(r_.count);
    int64_t start = 0;
    if (large(r_.count)) {
      if (!meet()) return;
      if (all_registered(true)) return all_reduce_registered();
    }
    do {
      const int64_t here = std::min(piece, r_.count - start);
      small ? all_reduce_direct(start, here) : all_reduce_shared(start, here);
      start += here;
    } while (outcome_.fault == kNone && start < r_.count);
  }

  // Everybody reduces everything: one meeting.
  void all_reduce_direct(int64_t start, int64_t count) {
    char* own = r_.output + start * width_;
    std::memcpy(group_.next_slot(rank_), own, count * width_);
    if (!meet()) return;
    const char* inputs[kMaxRanks];
    for (int k = 0; k < size_; ++k) inputs[k] = k == rank_ ? own : group_.next_slot(k);
    reduce(own, inputs, size_, r_, count);
    group_.turn();
  }

  // Everybody reduces a share in place and collects the others': two meetings.
  void all_reduce_shared(int64_t start, int64_t count) {
    char* own = r_.output + start * width_;
    std::memcpy(group_.next_slot(rank_), own, count * width_);
    if (!meet()) return;
    const int64_t begin = edge(rank_, count), end = edge(rank_ + 1, count);
    const char* inputs[kMaxRanks];
    for (int k = 0; k < size_; ++k) inputs[k] = group_.next_slot(k) + begin * width_;
    reduce(group_.next_slot(rank_) + begin * width_, inputs, size_, r_, end - begin);
    if (!meet()) return;
    for (int k = 0; k < size_; ++k) {
      const int64_t from = edge(k, count) * width_, bytes = edge(k + 1, count) * width_ - from;
      std::memcpy(own + from, group_.next_slot(k) + from, bytes);
    }
    group_.turn();
  }

  // Everybody reduces a share and writes it to all.
  void all_reduce_registered() {
    const int64_t begin = edge(rank_, r_.count), end = edge(rank_ + 1, r_.count);
    const int64_t piece = kTile * 16;
    for (int64_t start = begin; start < end; start += piece) {
      const int64_t here = std::min(piece, end - start);
      const char* inputs[kMaxRanks];
      for (int k = 0; k < size_; ++k) inputs[k] = registered_input(k) + start * width_;
      char* own = registered_input(rank_) + start * width_;
      reduce(own, inputs, size_, r_, here);
      for (int k = 0; k < size_; ++k) {
        if (k != rank_) std::memcpy(registered_input(k) + start * width_, own, here * width_);
      }
    }
    meet();
  }

  // `count` elements for each rank.
  void reduce_scatter() {
    if (large(r_.count)) {
      if (!meet()) return;
      if (all_registered(true)) {
        const char* inputs[kMaxRanks];
        for (int k = 0; k < size_; ++k) inputs[k] = registered_input(k) + rank_ * r_.count * width_;
        reduce(r_.output, inputs, size_, r_, r_.count);
        meet();
        return;
      }
    }
    const int64_t piece = share();
    int64_t start = 0;
    do {
      const int64_t here = std::min(piece, r_.count - start);
      char* slot = group_.next_slot(rank_);
      for (int k = 0; k < size_; ++k) {
        if (k == rank_) continue;
        std::memcpy(slot + k * piece * width_, r_.input + (k * r_.count + start) * width_,
                    here * width_);
      }
      if (!meet()) return;
      const char* inputs[kMaxRanks];
      for (int k = 0; k < size_; ++k) {
        inputs[k] = k == rank_ ? r_.input + (k * r_.count + start) * width_
                               : group_.next_slot(k) + rank_ * piece * width_;
      }
      reduce(r_.output + start * width_, inputs, size_, r_, here);
      group_.turn();
      start += here;
    } while (start < r_.count);
  }

  // Here and below, `count` is in bytes.
  void all_gather() {
    if (large(r_.count)) {
      if (!meet()) return;
      if (all_registered(true)) {
        for (int step = 0; step < size_; ++step) {
          // Each rank starts with another one, so that they do not all read the same memory.
          const int k = (rank_ + step) % size_;
          move(r_.output + k * r_.count, registered_input(k), r_.count);
        }
        meet();
        return;
      }
      if (all_registered(false)) {
        for (int step = 0; step < size_; ++step) {
          const int k = (rank_ + step) % size_;
          move(registered_output(k) + rank_ * r_.count, r_.input, r_.count);
        }
        meet();
        return;
      }
    }
    const int64_t piece = group_.slot_bytes();
    int64_t start = 0;
    do {
      const int64_t here = std::min(piece, r_.count - start);
      std::memcpy(group_.next_slot(rank_), r_.input + start, here);
      if (!meet()) return;
      for (int step = 0; step < size_; ++step) {
        const int k = (rank_ + step) % size_;
        const char* from = k == rank_ ? r_.input + start : group_.next_slot(k);
        move(r_.output + k * r_.count + start, from, here);
      }
      group_.turn();
      start += here;
    } while (start < r_.count);
  }

  void broadcast() {
    const int source = static_cast<int>(r_.source);
    if (large(r_.count)) {
      if (!meet()) return;
      if (all_registered(true)) {
        if (rank_ != source) std::memcpy(r_.output, registered_input(source), r_.count);
        meet();
        return;
      }
    }
    const int64_t piece = group_.slot_bytes();
    int64_t start = 0;
    do {
      const int64_t here = std::min(piece, r_.count - start);
      if (rank_ == source) std::memcpy(group_.next_slot(rank_), r_.output + start, here);
      if (!meet()) return;
      if (rank_ != source) std::memcpy(r_.output + start, group_.next_slot(source), here);
      group_.turn();
      start += here;
    } while (start < r_.count);
  }

  // Who sends much from registered memory leaves its slot empty at first, hoping that all do, and
  // then all read each other's memory. Everybody sees who hopes, and that it was in vain.
  void all_to_all() {
    const int64_t piece = share();
    int64_t most = 0, start = 0;
    if (!hopes(rank_)) stage(piece, start);
    if (!meet() || !sizes_agree(most)) return;
    int hoping = 0;
    for (int k = 0; k < size_; ++k) hoping += hopes(k);
    if (hoping == size_ && all_registered(true)) return all_to_all_registered();
    if (hopes(rank_)) stage(piece, start);
    if (hoping > 0 && !meet()) return;
    for (;;) {
      receive(piece, start);
      group_.turn();
      start += piece;
      if (start >= most) return;
      stage(piece, start);
      if (!meet()) return;
    }
  }

  const int64_t* sizes_of(int k) const { return group_.control(k).sizes[parity_]; }

  bool hopes(int k) const {
    const int64_t* sizes = sizes_of(k);
    const int64_t bytes = std::accumulate(sizes, sizes + size_, int64_t{0});
    return announced(k).input_segment >= 0 && large(bytes);
  }

  void all_to_all_registered() {
    for (int step = 0; step < size_; ++step) {
      const int k = (rank_ + step) % size_;
      const int64_t* sizes = sizes_of(k);
      const char* from = registered_input(k) + std::accumulate(sizes, sizes + rank_, int64_t{0});
      char* to = r_.output + std::accumulate(r_.received, r_.received + k, int64_t{0});
      std::memcpy(to, from, r_.received[k]);
    }
    meet();
  }

  // Puts the part of each message from `start` on into the slot, except the rank's own.
  void stage(int64_t piece, int64_t start) {
    const char* from = r_.input;
    for (int k = 0; k < size_; from += r_.sent[k++]) {
      const int64_t here = std::min(piece, r_.sent[k] - start);
      if (k != rank_ && here > 0) {
        std::memcpy(group_.next_slot(rank_) + k * piece, from + start, here);
      }
    }
  }

  // Whether each rank sends what this one expects; `most` becomes the largest message of all.
  bool sizes_agree(int64_t& most) {
    for (int k = 0; k < size_; ++k) {
      const int64_t* sizes = sizes_of(k);
      if (sizes[rank_] != r_.received[k]) outcome_ = {kDisagrees, k};
      most = std::max(most, *std::max_element(sizes, sizes + size_));
    }
    return outcome_.fault == kNone;
  }

  void receive(int64_t piece, int64_t start) {
    char* to = r_.output;
    const char* own = r_.input;
    for (int k = 0; k < rank_; ++k) own += r_.sent[k];
    for (int k = 0; k < size_; to += r_.received[k++]) {
      const int64_t here = std::min(piece, r_.received[k] - start);
      if (here <= 0) continue;
      std::memcpy(to + start, k == rank_ ? own + start : group_.next_slot(k) + rank_ * piece, here);
    }
  }

  static void move(char* to, const char* from, int64_t bytes) {
    if (to != from) std::memcpy(to, from, bytes);
  }

  // Elements (bytes where width is 1) of a slot for each rank, in whole cache lines.
  int64_t share() const { return group_.slot_bytes() / size_ / 64 * 64 / width_; }

  static constexpr int64_t kSmall = 16384;  // bytes

  Group& group_;
  const Request& r_;
  const int size_, rank_;
  const int64_t width_;
  uint32_t parity_ = 0;
  bool first_ = true;
  Outcome outcome_;
};

}  // namespace

DRIVETRAIN_API int dt_group_control_bytes() { return static_cast<int>(kControlBytes); }

DRIVETRAIN_API Group* dt_group_create(int rank, int size, void* const* segments, int64_t slot_bytes,
                                      const int* processes, int crowd, double timeout_seconds) {
  return new (std::nothrow) Group(rank, size, segments, slot_bytes, processes,
                                  static_cast<Crowd>(crowd), timeout_seconds);
}

DRIVETRAIN_API void dt_group_leave(Group* group) { group->leave(); }

DRIVETRAIN_API void dt_group_ask(Group* group, Question question) { group->ask(question); }

// These return 0, or the fault of the other rank.
DRIVETRAIN_API int dt_group_post(Group* group, int to, const Message* message) {
  return group->post(to, *message).fault;
}
DRIVETRAIN_API int dt_group_await(Group* group, int from, uint32_t number, Message* message) {
  return group->await(from, number, *message).fault;
}

DRIVETRAIN_API void dt_group_take(Group* group, int from) { group->take(from); }

DRIVETRAIN_API uint32_t dt_group_taken(Group* group, int to) { return group->taken(to); }

DRIVETRAIN_API void dt_group_destroy(Group* group) { delete group; }

// 0, or the fault with the position of the rank at fault in *peer.
DRIVETRAIN_API int dt_group_run(Group* group, const Request* request, int* peer) {
  const Outcome outcome = Run(*group, *request)();
  *peer = outcome.peer;
  return outcome.fault;
}

}  // namespace drivetrain
