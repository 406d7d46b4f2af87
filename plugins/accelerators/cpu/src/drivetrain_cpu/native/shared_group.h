// Ranks of one host that meet in shared memory: who is there, who has arrived, who has gone.
//
// Every rank owns one segment, mapped by all: a control block and two staging slots. A rank
// announces a step by raising its own counter; others wait for that counter, first spinning, then
// sleeping in a futex. Nothing is locked, so a rank that dies leaves nothing locked; those that
// sleep look every tenth of a second whether the others are still alive, and those that have waited
// for long ask whether there is still something to wait for.
#pragma once

#include <atomic>
#include <cstdint>

namespace drivetrain {

constexpr int kMaxRanks = 64;
constexpr int64_t kControlBytes = 45056;
// Messages of a sender that a receiver has not taken yet.
constexpr uint32_t kMessages = 16;

enum Collective : uint32_t { kAllReduce, kReduceScatter, kAllGather, kBroadcast, kAllToAll, kBarrier };

// What a rank is about to do; the others check that they are about to do the same.
struct Descriptor {
  uint32_t collective, dtype, op, source;
  int64_t count;
  // Registered memory: segment number (or -1) and byte offset of input and output.
  int32_t input_segment, output_segment;
  int64_t input_offset, output_offset;
};

// Where a message lies: in a file of the sender's, `capacity` bytes large. Layout shared with
// shared_mail.py.
struct Message {
  int64_t bytes, capacity, file;
};

// Messages from one rank to one other, in their order; in the segment of the sender.
struct Box {
  alignas(64) std::atomic<uint32_t> posted;
  std::atomic<uint32_t> posted_sleepers;
  alignas(64) std::atomic<uint32_t> taken;
  std::atomic<uint32_t> taken_sleepers;
  alignas(64) Message messages[kMessages];
};

// Start of a rank's segment. The counters have cache lines of their own.
struct Control {
  alignas(64) std::atomic<uint32_t> arrived;
  alignas(64) std::atomic<uint32_t> sleepers;
  alignas(64) std::atomic<uint32_t> departed;
  // Two of each, used in turn: a rank may be one collective ahead of those that still read.
  alignas(64) Descriptor descriptors[2];
  int64_t sizes[2][kMaxRanks];
  Box boxes[kMaxRanks];
};
static_assert(sizeof(Control) <= kControlBytes, "the control block has outgrown its pages");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared counters must not take locks");

// These two are shared with shared_group.py.
// How ranks share the cores that they run on: each has its own, they share enough, or too few.
enum Crowd : int { kApart = 0, kTogether = 1, kCrowded = 2 };

enum Fault : int { kNone = 0, kDied = 1, kLeft = 2, kDisagrees = 3, kTimedOut = 4, kBrokenOff = 5 };

// Whether a wait is to be broken off; called by the thread that waits.
using Question = int (*)();

struct Outcome {
  int fault = kNone;
  int peer = -1;
};

class Group {
 public:
  // `segments[k]`: where rank k's segment is mapped here. `processes[k]`: a pidfd of rank k.
  Group(int rank, int size, void* const* segments, int64_t slot_bytes, const int* processes,
        Crowd crowd, double timeout_seconds);

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t slot_bytes() const { return slot_bytes_; }

  // A staging slot of a rank; `turn` alternates.
  char* slot(int rank, uint32_t turn) const {
    return bases_[rank] + kControlBytes + (turn & 1) * slot_bytes_;
  }
  char* next_slot(int rank) const { return slot(rank, turns_); }
  void turn() { ++turns_; }

  Control& control(int rank) const { return *reinterpret_cast<Control*>(bases_[rank]); }
  uint32_t parity() const { return collectives_ & 1; }

  // Publishes what comes next; call before the first meeting of a collective.
  void announce(const Descriptor& descriptor);
  // Whether all ranks announced the same; call after the first meeting. Ends the announcement.
  Outcome compare();
  // Returns when all ranks have called it as often. `patient`: this thread has nothing else to do
  // and nor has its core, so it may spin for longer before it sleeps.
  Outcome meet(bool patient = false);
  // Puts a message into the box for rank `to`, once that has room.
  Outcome post(int to, const Message& message);
  // Waits, patiently, for message `number` from rank `from`.
  Outcome await(int from, uint32_t number, Message& message);
  // Says that the next message from rank `from` has been copied, so its memory is free.
  void take(int from);
  // How many messages to rank `to` have been taken.
  uint32_t taken(int to) const { return control(rank_).boxes[to].taken.load(); }
  // Tells the others that this rank will not come again.
  void leave();
  // Has a wait ask `question` when it has lasted two seconds, and every two seconds from then on.
  void ask(Question question) { question_ = question; }

 private:
  bool wait_for(int peer, int spins, Outcome& outcome);
  Outcome wait_until(std::atomic<uint32_t>& counter, std::atomic<uint32_t>& sleepers,
                     uint32_t target, int peer, int spins) const;
  Outcome look_around(double waited) const;

  int rank_, size_;
  char* bases_[kMaxRanks];
  int processes_[kMaxRanks];
  int64_t slot_bytes_;
  double timeout_;
  int spins_, patient_spins_;
  Question question_ = nullptr;
  uint32_t steps_ = 0, turns_ = 0, collectives_ = 0;
};

}  // namespace drivetrain
