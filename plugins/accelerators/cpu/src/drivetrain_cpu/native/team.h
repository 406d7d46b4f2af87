// Loops whose items threads take as they come, and a team of threads for many such loops.
//
// A parallel region makes all its threads meet at its beginning and at its end. A decoder's token
// takes hundreds of loops, and each would wait for a thread that has lost its core, though nothing
// may be left to do for it. In a team one thread makes the calls, the others join a loop when they
// get there, and it ends as soon as those that have joined are done.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "waiting.h"

// Of OpenMP 4.5. Not every compiler that takes -fopenmp comes with its header.
extern "C" {
int omp_get_proc_bind();
int omp_get_num_places();
int omp_get_place_num_procs(int place);
void omp_get_place_proc_ids(int place, int* ids);
}

namespace drivetrain {

// The numbers [0, count), which any number of threads take in runs of `run`.
class Items {
 public:
  Items(int64_t count, int64_t run) : count_(count), run_(std::max<int64_t>(1, run)) {}

  // Calls body(item) for the items that are left when this thread comes for more.
  template <typename Body>
  void each(const Body& body) {
    for (;;) {
      const int64_t first = next_.fetch_add(run_, std::memory_order_relaxed);
      if (first >= count_) return;
      const int64_t end = std::min(count_, first + run_);
      for (int64_t item = first; item < end; ++item) body(item);
    }
  }

  bool shared() const { return count_ > run_; }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_, run_;
};

// How many items a thread takes at once: few, so that none is long in a loop that others have left.
inline int64_t run_of(int64_t count, int threads) {
  return std::clamp<int64_t>(count / (threads * 8), 1, 8);
}

// Waits for another thread, which may have lost its core.
class Patience {
 public:
  bool over() const { return turns_ >= kSpins + kYields; }

  void wait() {
    if (over()) {
      // An idle core takes over a thread that waits for another one.
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      return;
    }
    if (++turns_ < kSpins) relax();
    else std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 4000;  // longer than what one thread does alone between two loops
  static constexpr int kYields = 50;
  int turns_ = 0;
};

// Lets this thread use all CPUs on which OpenMP runs threads, where it binds them to some: it bound
// the first thread of the process to a single core, and all others inherit that.
inline void use_all_places() {
#if defined(__linux__)
  if (omp_get_proc_bind() == 0) return;
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> ids(omp_get_place_num_procs(place));
    omp_get_place_proc_ids(place, ids.data());
    for (const int id : ids) CPU_SET(id, &cpus);
  }
  // If the system refuses, the thread stays where it is.
  if (CPU_COUNT(&cpus) > 0) sched_setaffinity(0, sizeof cpus, &cpus);
#endif
}

// Threads that help the one that makes a list of calls.
//
// They are not OpenMP's: those must all come before a region begins and before it ends, and spin for
// milliseconds after each.
class Team {
 public:
  // Runs calls() with the process's team of `threads` threads; alone while another thread has it.
  template <typename Calls>
  static void with(int threads, const Calls& calls) {
    if (threads < 2 || led_ != nullptr) {
      calls();
      return;
    }
    Team& team = of_process();
    const std::unique_lock<std::mutex> leads(team.leading_, std::try_to_lock);
    if (leads) team.lead(threads - 1, calls);
    else calls();
  }

  // Calls work(items), in all threads of the team that this thread leads, if it leads one.
  template <typename Work>
  static void join_in(Items& items, const Work& work) {
    if (led_ != nullptr) led_->run(items, work);
    else work(items);
  }

  // Whether this thread leads others, who are awake.
  static bool led() { return led_ != nullptr; }

 private:
  // Threads inside the loop, whether it is open, and how many there were.
  static constexpr uint64_t kInside = 0x7fff, kOpen = 0x8000, kLoop = 0x10000;

  // One for all kernels, and another after a fork, which leaves the threads behind, and the lock as
  // another thread held it. Never deleted, as its threads end with the process.
  static Team& of_process() {
    Team* team = current_.load(std::memory_order_acquire);
    if (team != nullptr && team->process_ == getpid()) return *team;
    Team* made = new Team;
    if (current_.compare_exchange_strong(team, made, std::memory_order_acq_rel)) return *made;
    delete made;  // another thread came first
    return *team;
  }

  template <typename Calls>
  void lead(int helpers, const Calls& calls) {
    recruit(helpers);
    wanted_.store(helpers);
    if (asleep_.load() > 0) {
      { const std::lock_guard<std::mutex> lock(mutex_); }  // who counts itself asleep, waits by now
      awake_.notify_all();
    }
    led_ = this;
    calls();
    led_ = nullptr;
    wanted_.store(0);
  }

  template <typename Work>
  void run(Items& items, const Work& work) {
    items_ = &items;
    work_ = &work;
    call_ = [](const void* of, Items& some) { (*static_cast<const Work*>(of))(some); };
    state_.fetch_add(kLoop + kOpen, std::memory_order_release);
    work(items);
    state_.fetch_sub(kOpen, std::memory_order_relaxed);
    Patience patience;
    while ((state_.load(std::memory_order_acquire) & kInside) != 0) patience.wait();
  }

  // Fewer than wanted where the system gives no more threads.
  void recruit(int helpers) {
    try {
      for (; recruited_ < helpers; ++recruited_) {
        std::thread([this, number = recruited_] { help(number); }).detach();
      }
    } catch (const std::system_error&) {
    }
  }

  void help(int number) {
    use_all_places();
    uint64_t last = 0;
    Patience patience;
    for (;;) {
      uint64_t state = state_.load(std::memory_order_relaxed);
      const bool wanted = wanted_.load(std::memory_order_relaxed) > number;
      const bool joins = wanted && (state & kOpen) != 0 && state / kLoop != last;
      // Counted inside, so that the leader waits before it takes the loop away.
      if (joins && state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
        last = state / kLoop;
        call_(work_, *items_);
        state_.fetch_sub(1, std::memory_order_release);
        patience = Patience();
      } else if (!wanted && patience.over()) {
        sleep(number);
        patience = Patience();
      } else {
        patience.wait();
      }
    }
  }

  void sleep(int number) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    awake_.wait(lock, [&] { return wanted_.load() > number; });
    --asleep_;
  }

  static inline std::atomic<Team*> current_{nullptr};
  static inline thread_local Team* led_ = nullptr;
  const pid_t process_ = getpid();
  std::mutex leading_;
  alignas(64) std::atomic<uint64_t> state_{0};
  Items* items_ = nullptr;
  const void* work_ = nullptr;
  void (*call_)(const void*, Items&) = nullptr;
  alignas(64) std::atomic<int> wanted_{0};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
  int recruited_ = 0;
};

// Calls work(items) in up to `threads` threads, among which the items are shared out.
template <typename Work>
void share_out(int threads, int64_t count, int64_t run, const Work& work) {
  Items items(count, run);
  if (threads < 2 || !items.shared()) work(items);
  else Team::with(threads, [&] { Team::join_in(items, work); });
}

// Calls body(item) for each of `count` items, by up to `threads` threads.
template <typename Body>
void for_each_item(int threads, int64_t count, int64_t run, const Body& body) {
  share_out(threads, count, run, [&](Items& items) { items.each(body); });
}

}  // namespace drivetrain
