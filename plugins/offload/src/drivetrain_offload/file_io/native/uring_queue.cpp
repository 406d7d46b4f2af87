// io_uring by its system calls, so that nothing needs liburing to build or to run.
#include <cerrno>
#include <cstring>

#include "queue.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(IORING_OFF_SQES) && defined(__NR_io_uring_setup)

namespace drivetrain {
namespace {

// Memory shared with the kernel.
class Mapping {
 public:
  Mapping(int descriptor, size_t size, uint64_t what) : size_(size) {
    data_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor,
                 static_cast<off_t>(what));
    // A child must not move the parent's ring.
    if (valid()) madvise(data_, size, MADV_DONTFORK);
  }
  ~Mapping() {
    if (valid()) munmap(data_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool valid() const { return data_ != MAP_FAILED; }
  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset);
  }

 private:
  void* data_;
  size_t size_;
};

class UringQueue : public Queue {
 public:
  // `descriptor` is a ring's; closed by the destructor.
  UringQueue(int descriptor, const io_uring_params& params)
      : descriptor_(descriptor),
        submissions_(descriptor, params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                     IORING_OFF_SQ_RING),
        completions_(descriptor, params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe),
                     IORING_OFF_CQ_RING),
        entries_(descriptor, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES) {
    if (!valid()) return;
    tail_ = submissions_.at<uint32_t>(params.sq_off.tail);
    mask_ = *submissions_.at<uint32_t>(params.sq_off.ring_mask);
    array_ = submissions_.at<uint32_t>(params.sq_off.array);
    done_head_ = completions_.at<uint32_t>(params.cq_off.head);
    done_tail_ = completions_.at<uint32_t>(params.cq_off.tail);
    done_mask_ = *completions_.at<uint32_t>(params.cq_off.ring_mask);
    done_ = completions_.at<io_uring_cqe>(params.cq_off.cqes);
  }

  ~UringQueue() override { close(descriptor_); }

  bool valid() const {
    return submissions_.valid() && completions_.valid() && entries_.valid();
  }

  // Whether the ring works: some sandboxes allow making one and forbid using it.
  int try_out() {
    append(IORING_OP_NOP, nullptr);
    std::vector<Completion> found;
    reap(found);
    return found.empty() || found[0].result < 0 ? -1 : 0;
  }

  void push(Slot* slot) override {
    append(slot->writes ? IORING_OP_WRITEV : IORING_OP_READV, slot);
  }

  void submit() override {
    while (!waiting_.empty() && enter(0)) {
    }
  }

  void reap(std::vector<Completion>& found) override {
    const size_t before = found.size();
    collect(found);
    // What is complete already needs no system call, unless there is something to hand over.
    while (found.size() == before || !waiting_.empty()) {
      const bool sound = enter(found.size() == before ? 1 : 0);
      collect(found);
      if (!sound) return fail(found);
    }
  }

 private:
  void append(int operation, Slot* slot) {
    const uint32_t tail = *tail_, index = tail & mask_;
    io_uring_sqe* const entry = entries_.at<io_uring_sqe>(0) + index;
    std::memset(entry, 0, sizeof(*entry));
    entry->opcode = static_cast<uint8_t>(operation);
    entry->fd = -1;
    if (slot != nullptr) {
      entry->fd = slot->descriptor;
      entry->off = static_cast<uint64_t>(slot->offset);
      entry->addr = reinterpret_cast<uint64_t>(&slot->vector);
      entry->len = 1;
    }
    entry->user_data = reinterpret_cast<uint64_t>(slot);
    array_[index] = index;
    __atomic_store_n(tail_, tail + 1, __ATOMIC_RELEASE);
    waiting_.push_back(slot);
  }

  // False if the ring is broken; errno_ then says how.
  bool enter(unsigned least) {
    const unsigned flags = least > 0 ? IORING_ENTER_GETEVENTS : 0;
    const long count = syscall(__NR_io_uring_enter, descriptor_,
                               static_cast<unsigned>(waiting_.size()), least, flags, nullptr, 0);
    if (count >= 0) {
      waiting_.erase(waiting_.begin(), waiting_.begin() + count);
      return true;
    }
    errno_ = errno;
    if (errno_ == EAGAIN || errno_ == EBUSY) usleep(100);  // the kernel is out of memory for now
    return errno_ == EINTR || errno_ == EAGAIN || errno_ == EBUSY;
  }

  void collect(std::vector<Completion>& found) {
    uint32_t head = *done_head_;
    const uint32_t tail = __atomic_load_n(done_tail_, __ATOMIC_ACQUIRE);
    for (; head != tail; ++head) {
      const io_uring_cqe& entry = done_[head & done_mask_];
      found.push_back({reinterpret_cast<Slot*>(entry.user_data), entry.res});
    }
    __atomic_store_n(done_head_, head, __ATOMIC_RELEASE);
  }

  // A ring that takes nothing any more fails what it was never handed. What is under way still
  // completes, and has to be waited for: it moves the memory of callers.
  void fail(std::vector<Completion>& found) {
    for (Slot* slot : waiting_) found.push_back({slot, -errno_});
    __atomic_store_n(tail_, *tail_ - static_cast<uint32_t>(waiting_.size()), __ATOMIC_RELEASE);
    waiting_.clear();
    if (found.empty()) usleep(1000);
  }

  const int descriptor_;
  int errno_ = 0;
  Mapping submissions_, completions_, entries_;
  uint32_t *tail_ = nullptr, *array_ = nullptr, *done_head_ = nullptr, *done_tail_ = nullptr;
  uint32_t mask_ = 0, done_mask_ = 0;
  io_uring_cqe* done_ = nullptr;
  std::vector<Slot*> waiting_;  // pushed, not handed over
};

}  // namespace

std::unique_ptr<Queue> make_uring_queue(int depth, std::string& why) {
  io_uring_params params{};
  const long descriptor = syscall(__NR_io_uring_setup, static_cast<unsigned>(depth), &params);
  if (descriptor < 0) {
    why = std::string("io_uring_setup: ") + std::strerror(errno);
    return nullptr;
  }
  auto queue = std::make_unique<UringQueue>(static_cast<int>(descriptor), params);
  if (!queue->valid() || queue->try_out() != 0) {
    why = std::string("io_uring cannot be used: ") + std::strerror(errno);
    return nullptr;
  }
  return queue;
}

}  // namespace drivetrain

#else

namespace drivetrain {

std::unique_ptr<Queue> make_uring_queue(int, std::string& why) {
  why = "this system has no io_uring";
  return nullptr;
}

}  // namespace drivetrain

#endif
