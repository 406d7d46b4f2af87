#include "engine.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace drivetrain {
namespace {

constexpr int kReadsPerWrite = 3;  // blocks
constexpr int kBusyTries = 10000;  // of 0.1 ms: what the system puts off for a second is an error

std::unique_ptr<Queue> make_queue(Kind kind, int depth, std::string& why) {
  if (kind == kUring) return make_uring_queue(depth, why);
  if (kind == kAio) return make_aio_queue(depth, why);
  return make_blocking_queue();
}

bool make_queues(Kind kind, const Options& options, std::vector<std::unique_ptr<Queue>>& queues,
                 std::string& why) {
  // Blocking calls get their depth from more threads.
  const int number = options.threads * (kind == kThreads ? options.depth : 1);
  queues.clear();
  for (int at = 0; at < number; ++at) {
    queues.push_back(make_queue(kind, options.depth, why));
    if (queues.back() == nullptr) return false;
  }
  return true;
}

// What a test makes of a transfer: half of it, in whole sectors past the cache.
void cut_short(Slot& slot) {
  size_t& length = slot.vector.iov_len;
  length = slot.direct ? length / 1024 * 512 : (length + 1) / 2;
}

int bucket_of(int64_t nanoseconds) {
  const int power = 63 - __builtin_clzll(static_cast<uint64_t>(std::max<int64_t>(nanoseconds, 4)));
  const int quarter = static_cast<int>((nanoseconds >> (power - 2)) & 3);
  return std::min(power * 4 + quarter, kLatencyBuckets - 1);
}

}  // namespace

int64_t alignment() {
  static const int64_t bytes = std::max<int64_t>(4096, sysconf(_SC_PAGESIZE));
  return bytes;
}

std::unique_ptr<Engine> Engine::make(const Options& wanted, std::string& why) {
  Options options = wanted;
  options.block_size = (options.block_size + alignment() - 1) / alignment() * alignment();
  std::vector<std::unique_ptr<Queue>> queues;
  const Kind first = options.kind == kAuto ? kUring : static_cast<Kind>(options.kind);
  const Kind last = options.kind == kAuto ? kThreads : first;
  for (int kind = first; kind <= last; ++kind) {
    std::string reason;
    if (make_queues(static_cast<Kind>(kind), options, queues, reason)) {
      return std::unique_ptr<Engine>(
          new Engine(options, static_cast<Kind>(kind), std::move(queues)));
    }
    why += (why.empty() ? "" : "; ") + reason;
  }
  return nullptr;
}

Engine::Engine(const Options& options, Kind kind, std::vector<std::unique_ptr<Queue>> queues)
    : options_(options), kind_(kind), queues_(std::move(queues)) {
  // Signals are for the threads of the program.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (auto& queue : queues_) workers_.emplace_back([this, &queue] { work(*queue); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Engine::~Engine() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Engine::submit(Request* request) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (request->bytes == 0) {
      request->done = true;
      return;
    }
    (request->writes ? writes_ : reads_).push_back(request);
  }
  // Only as many workers as there are blocks: the others would wake up for nothing.
  const auto workers = static_cast<int64_t>(workers_.size());
  const int64_t blocks = (request->bytes - 1) / options_.block_size + 1;
  for (int64_t woken = std::min(blocks, workers); woken > 0; --woken) work_.notify_one();
}

bool Engine::done(Request* request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return request->done;
}

bool Engine::wait(Request* request, double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return done_.wait_for(lock, std::chrono::duration<double>(seconds),
                        [request] { return request->done; });
}

Latencies Engine::latencies() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return latencies_;
}

void Engine::work(Queue& queue) {
  const int depth = kind_ == kThreads ? 1 : options_.depth;
  std::vector<Slot> slots(depth);
  std::vector<Slot*> free;
  for (Slot& slot : slots) free.push_back(&slot);
  std::vector<Completion> found;
  for (;;) {
    const bool idle = static_cast<int>(free.size()) == depth;
    while (!free.empty() && (options_.overlap_events || idle)) {
      Slot& slot = *free.back();
      if (!take(slot, static_cast<int>(free.size()) == depth)) break;
      free.pop_back();
      queue.push(&slot);
      if (options_.single_submit) queue.submit();
    }
    if (static_cast<int>(free.size()) == depth) return;  // told to stop
    found.clear();
    queue.reap(found);
    for (const Completion& each : found) {
      if (settle(*each.slot, each.result)) {
        free.push_back(each.slot);
      } else {
        queue.push(each.slot);
      }
    }
  }
}

// Where the next piece comes from. Somebody is about to wait for what is read, and seldom for what
// is written, which may not starve all the same.
std::deque<Request*>& Engine::next() {
  if (reads_.empty() || (passed_ >= kReadsPerWrite && !writes_.empty())) {
    passed_ = 0;
    return writes_;
  }
  if (!writes_.empty()) ++passed_;
  return reads_;
}

// The next piece of the oldest read or write. False if there is none; with `wait`, if there is to
// be none any more.
bool Engine::take(Slot& slot, bool wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (wait) work_.wait(lock, [this] { return stopping_ || !reads_.empty() || !writes_.empty(); });
  std::deque<Request*>& waiting = next();
  if (waiting.empty()) return false;
  Request& request = *waiting.front();
  const File& file = *request.file;
  slot.request = &request;
  slot.writes = request.writes;
  slot.memory = request.memory + request.taken;
  slot.offset = request.offset + request.taken;
  const int64_t left = request.bytes - request.taken, over = slot.offset % alignment();
  slot.bytes = std::min(left, options_.block_size);
  slot.direct = false;
  if (file.direct >= 0 && !file.refused) {
    // Through the page cache go what lies before the first whole page and what lies after the last.
    if (over != 0) {
      slot.bytes = std::min(left, alignment() - over);
    } else if (left >= alignment()) {
      slot.bytes = std::min(options_.block_size, left / alignment() * alignment());
      slot.direct = true;
    }
  }
  slot.tries = 0;
  request.taken += slot.bytes;
  ++request.under_way;
  if (request.taken == request.bytes) waiting.pop_front();
  lock.unlock();
  slot.began = std::chrono::steady_clock::now();
  aim(slot);
  if (request.fault < 0 && request.fault.exchange(0) < 0) cut_short(slot);
  return true;
}

// Sets what the system is to be given for the slot.
void Engine::aim(Slot& slot) const {
  const File& file = *slot.request->file;
  slot.descriptor = slot.direct ? file.direct : file.buffered;
  char* memory = slot.memory;
  if (slot.direct && reinterpret_cast<uintptr_t>(memory) % alignment() != 0) {
    if (slot.bounce == nullptr) {
      slot.bounce.reset(
          static_cast<char*>(std::aligned_alloc(alignment(), options_.block_size)));
    }
    memory = slot.bounce.get();
    if (slot.writes) std::memcpy(memory, slot.memory, slot.bytes);
  }
  slot.vector = {memory, static_cast<size_t>(slot.bytes)};
}

// Answers whether the slot is through with its piece; if not, it has to be pushed again.
bool Engine::settle(Slot& slot, int64_t result) {
  Request& request = *slot.request;
  if (const int fault = result > 0 ? request.fault.exchange(0) : 0) result = -fault;
  if (result == -EAGAIN || result == -EINTR) {
    if (++slot.tries > kBusyTries) return finish(slot, static_cast<int>(-result)), true;
    usleep(100);
    return false;
  }
  if (result == -EINVAL && slot.direct) {
    request.file->refused = true;
    slot.direct = false;
    aim(slot);
    return false;
  }
  if (result <= 0) {
    const int nothing = slot.writes ? EIO : kEndOfFile;
    return finish(slot, result < 0 ? static_cast<int>(-result) : nothing), true;
  }
  if (!slot.writes && slot.vector.iov_base != slot.memory) {
    std::memcpy(slot.memory, slot.vector.iov_base, result);
  }
  if (result >= slot.bytes) return finish(slot, 0), true;
  // Past the cache a rest has to begin at a page again; what is transferred twice does no harm.
  const int64_t moved = slot.direct ? result / alignment() * alignment() : result;
  if (moved == 0) slot.direct = false;
  slot.tries = 0;
  slot.memory += moved;
  slot.offset += moved;
  slot.bytes -= moved;
  aim(slot);
  return false;
}

void Engine::finish(Slot& slot, int error) {
  const auto spent = std::chrono::steady_clock::now() - slot.began;
  const int64_t nanoseconds = std::chrono::nanoseconds(spent).count();
  Request& request = *slot.request;
  const std::lock_guard<std::mutex> lock(mutex_);
  ++latencies_.blocks;
  latencies_.total += nanoseconds;
  ++latencies_.counts[bucket_of(nanoseconds)];
  if (error != 0 && request.error == 0) {
    request.error = error;
    request.error_offset = slot.offset;
    request.error_bytes = slot.bytes;
    if (request.taken < request.bytes) {
      request.taken = request.bytes;  // nobody is to begin the rest
      std::deque<Request*>& waiting = request.writes ? writes_ : reads_;
      waiting.erase(std::find(waiting.begin(), waiting.end(), &request));
    }
  }
  if (--request.under_way == 0 && request.taken == request.bytes) {
    request.done = true;
    done_.notify_all();
  }
}

}  // namespace drivetrain
