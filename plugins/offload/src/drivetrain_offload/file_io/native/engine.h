// Workers that move requests between memory and files, in blocks.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "queue.h"

namespace drivetrain {

// Transfers past the page cache begin at multiples of this, in the file and in memory, and are as
// long. A page, so that no page is ever moved past the cache and through it in one request.
int64_t alignment();

// What a read reports when the file ends too early; no errno is negative.
constexpr int kEndOfFile = -1;

// Layout shared with native_engine.py.
struct Options {
  int64_t block_size;
  int32_t kind, depth, threads, single_submit, overlap_events;
};

// Two descriptors of one file. `direct` is -1 where the file system cannot.
struct File {
  const int direct, buffered;
  std::atomic<bool> refused{false};  // O_DIRECT was accepted at first and then was not
};

// A read or write that a caller asked for. Its state is guarded by the engine's mutex.
struct Request {
  File* const file;
  char* const memory;
  const int64_t offset, bytes;
  const bool writes;
  std::atomic<int> fault;  // what a test makes of its first block: an errno, -1 for a short transfer
  int64_t taken = 0;  // bytes handed to workers
  int under_way = 0;  // pieces
  bool done = false;
  int error = 0;
  int64_t error_offset = 0, error_bytes = 0;
};

// Layout shared with native_engine.py.
struct Result {
  int32_t error, refused;
  int64_t offset, bytes;
};

// Latencies of blocks, in nanoseconds; layout shared with native_engine.py.
constexpr int kLatencyBuckets = 256;
struct Latencies {
  int64_t blocks, total;
  int64_t counts[kLatencyBuckets];  // bucket b begins at 2^(b / 4) * (1 + (b % 4) / 4)
};

class Engine {
 public:
  // Makes the queues of all threads; null if the system refuses, and `why` says so.
  static std::unique_ptr<Engine> make(const Options& options, std::string& why);
  ~Engine();

  Kind kind() const { return kind_; }
  void submit(Request* request);
  bool done(Request* request);
  // Waits at most `seconds`; answers whether the request is done.
  bool wait(Request* request, double seconds);
  Latencies latencies();

 private:
  Engine(const Options& options, Kind kind, std::vector<std::unique_ptr<Queue>> queues);

  void work(Queue& queue);
  bool take(Slot& slot, bool wait);
  std::deque<Request*>& next();
  bool settle(Slot& slot, int64_t result);
  void finish(Slot& slot, int error);
  void aim(Slot& slot) const;

  const Options options_;
  const Kind kind_;
  std::vector<std::unique_ptr<Queue>> queues_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  // With bytes that no worker has taken.
  std::deque<Request*> reads_, writes_;
  int passed_ = 0;  // blocks of reads that were taken while writes waited, since the last write
  Latencies latencies_{};
  bool stopping_ = false;
};

}  // namespace drivetrain
