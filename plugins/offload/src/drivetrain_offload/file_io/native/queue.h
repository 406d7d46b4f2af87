// One thread's queue of reads and writes to the system: io_uring, kernel AIO, or blocking calls.
#pragma once

#include <sys/uio.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace drivetrain {

struct Request;

// A piece of a request that one slot of a queue works on; moves on as bytes are transferred.
struct Slot {
  Request* request = nullptr;
  char* memory = nullptr;  // the caller's
  int64_t offset = 0;      // in the file
  int64_t bytes = 0;       // still to transfer
  bool direct = false;     // past the page cache
  int tries = 0;           // times in a row that the system was busy
  std::chrono::steady_clock::time_point began;
  iovec vector{};          // what the system is given: `memory`, or the slot's bounce buffer
  int descriptor = -1;
  bool writes = false;
  std::unique_ptr<char, void (*)(void*)> bounce{nullptr, std::free};  // a block
};

struct Completion {
  Slot* slot;
  int64_t result;  // bytes, or a negative errno
};

// Not thread-safe: every worker has its own.
class Queue {
 public:
  virtual ~Queue() = default;
  // Takes a slot in; at most `depth` are in at once.
  virtual void push(Slot* slot) = 0;
  // Hands over what was pushed, without waiting.
  virtual void submit() = 0;
  // Hands over what was pushed, waits until something is complete, and appends it to `found`.
  virtual void reap(std::vector<Completion>& found) = 0;
};

// Numbers shared with settings.py.
enum Kind { kAuto = 0, kUring = 1, kAio = 2, kThreads = 3 };

// Null if the system does not offer it; `why` then says so.
std::unique_ptr<Queue> make_uring_queue(int depth, std::string& why);
std::unique_ptr<Queue> make_aio_queue(int depth, std::string& why);
std::unique_ptr<Queue> make_blocking_queue();

}  // namespace drivetrain
