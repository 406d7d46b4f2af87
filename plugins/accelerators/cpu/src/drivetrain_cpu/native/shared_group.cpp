#include "shared_group.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstring>

#include "waiting.h"

namespace drivetrain {
namespace {

constexpr long kNapNanoseconds = 100'000'000;
// Long enough for a peer that runs on another core, about 20 microseconds.
constexpr int kSpins = 1000;
// Where a core would have nothing else to do: to wake a sleeper costs more than this.
constexpr int kPatientSpins = 10000;
// In a crowd the peer may need this core.
constexpr int kSpinsWhenCrowded = 20;
constexpr double kLongSeconds = 2;

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Sleeps while `word` holds `value`, at most one nap.
void nap(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec limit{0, kNapNanoseconds};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &limit, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Counters wrap; the nearer side of the circle counts.
bool reached(uint32_t counter, uint32_t target) {
  return static_cast<int32_t>(counter - target) >= 0;
}

}  // namespace

Group::Group(int rank, int size, void* const* segments, int64_t slot_bytes, const int* processes,
             Crowd crowd, double timeout_seconds)
    : rank_(rank),
      size_(size),
      slot_bytes_(slot_bytes),
      timeout_(timeout_seconds),
      spins_(crowd == kCrowded ? kSpinsWhenCrowded : kSpins),
      patient_spins_(crowd == kApart ? kPatientSpins : spins_) {
  for (int k = 0; k < size; ++k) {
    bases_[k] = static_cast<char*>(segments[k]);
    processes_[k] = processes[k];
  }
}

void Group::announce(const Descriptor& descriptor) {
  control(rank_).descriptors[parity()] = descriptor;
}

Outcome Group::compare() {
  const Descriptor& own = control(rank_).descriptors[parity()];
  Outcome outcome;
  for (int k = 0; k < size_ && outcome.fault == kNone; ++k) {
    const Descriptor& other = control(k).descriptors[parity()];
    const bool same = own.collective == other.collective && own.dtype == other.dtype &&
                      own.op == other.op && own.source == other.source && own.count == other.count;
    if (!same) outcome = {kDisagrees, k};
  }
  ++collectives_;
  return outcome;
}

Outcome Group::meet(bool patient) {
  Control& own = control(rank_);
  ++steps_;
  // Sequentially consistent, like the sleeper's count: either this rank sees that somebody sleeps,
  // or the sleeper sees the new value.
  own.arrived.store(steps_);
  if (own.sleepers.load() != 0) wake(own.arrived);
  Outcome outcome;
  for (int k = 0; k < size_; ++k) {
    if (k != rank_ && !wait_for(k, patient ? patient_spins_ : spins_, outcome)) break;
  }
  return outcome;
}

bool Group::wait_for(int peer, int spins, Outcome& outcome) {
  Control& other = control(peer);
  for (int spin = 0; spin < spins; ++spin) {
    if (reached(other.arrived.load(std::memory_order_acquire), steps_)) return true;
    relax();
  }
  const double began = now();
  double next_question = kLongSeconds;
  for (;;) {
    other.sleepers.fetch_add(1);
    const uint32_t seen = other.arrived.load();
    if (!reached(seen, steps_)) nap(other.arrived, seen);
    other.sleepers.fetch_sub(1);
    if (reached(other.arrived.load(std::memory_order_acquire), steps_)) return true;
    const double waited = now() - began;
    outcome = look_around(waited);
    if (outcome.fault == kTimedOut) outcome.peer = peer;
    if (outcome.fault == kNone && question_ != nullptr && waited > next_question) {
      next_question = waited + kLongSeconds;
      if (question_() != 0) outcome = {kBrokenOff, peer};
    }
    if (outcome.fault != kNone) return false;
  }
}

Outcome Group::look_around(double waited) const {
  for (int k = 0; k < size_; ++k) {
    if (k == rank_) continue;
    pollfd process{processes_[k], POLLIN, 0};
    const bool left = control(k).departed.load() != 0, died = poll(&process, 1, 0) == 1;
    // Looked at last: whoever arrived and then went has arrived.
    const bool missing = !reached(control(k).arrived.load(), steps_);
    if (missing && (left || died)) return {left ? kLeft : kDied, k};
  }
  return {waited > timeout_ ? kTimedOut : kNone, -1};
}

Outcome Group::post(int to, const Message& message) {
  Box& box = control(rank_).boxes[to];
  const uint32_t number = box.posted.load();
  const Outcome outcome =
      wait_until(box.taken, box.taken_sleepers, number + 1 - kMessages, to, spins_);
  if (outcome.fault != kNone) return outcome;
  box.messages[number % kMessages] = message;
  box.posted.store(number + 1);
  if (box.posted_sleepers.load() != 0) wake(box.posted);
  return outcome;
}

Outcome Group::await(int from, uint32_t number, Message& message) {
  Box& box = control(from).boxes[rank_];
  const Outcome outcome =
      wait_until(box.posted, box.posted_sleepers, number + 1, from, patient_spins_);
  if (outcome.fault == kNone) message = box.messages[number % kMessages];
  return outcome;
}

void Group::take(int from) {
  Box& box = control(from).boxes[rank_];
  box.taken.fetch_add(1);
  if (box.taken_sleepers.load() != 0) wake(box.taken);
}

// As `wait_for`, of one counter that one rank raises: the others do not matter for a message.
Outcome Group::wait_until(std::atomic<uint32_t>& counter, std::atomic<uint32_t>& sleepers,
                          uint32_t target, int peer, int spins) const {
  for (int spin = 0; spin < spins; ++spin) {
    if (reached(counter.load(std::memory_order_acquire), target)) return {};
    relax();
  }
  const double began = now();
  double next_question = kLongSeconds;
  for (;;) {
    sleepers.fetch_add(1);
    const uint32_t seen = counter.load();
    if (!reached(seen, target)) nap(counter, seen);
    sleepers.fetch_sub(1);
    if (reached(counter.load(std::memory_order_acquire), target)) return {};
    pollfd process{processes_[peer], POLLIN, 0};
    const bool left = control(peer).departed.load() != 0, died = poll(&process, 1, 0) == 1;
    // Looked at last: whoever came and then went has come.
    if (reached(counter.load(std::memory_order_acquire), target)) return {};
    if (left || died) return {left ? kLeft : kDied, peer};
    const double waited = now() - began;
    if (waited > timeout_) return {kTimedOut, peer};
    if (question_ != nullptr && waited > next_question) {
      next_question = waited + kLongSeconds;
      if (question_() != 0) return {kBrokenOff, peer};
    }
  }
}

void Group::leave() {
  Control& own = control(rank_);
  own.departed.store(1);
  wake(own.arrived);
}

}  // namespace drivetrain
