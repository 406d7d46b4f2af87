// Kernel AIO (what libaio wraps) by its system calls.
#include <cerrno>
#include <cstring>

#include "queue.h"

#if defined(__linux__) && __has_include(<linux/aio_abi.h>)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace drivetrain {
namespace {

class AioQueue : public Queue {
 public:
  AioQueue(aio_context_t context, int depth) : context_(context), events_(depth) {
    blocks_.resize(depth);
    for (iocb& each : blocks_) free_.push_back(&each);
  }

  ~AioQueue() override { syscall(__NR_io_destroy, context_); }

  void push(Slot* slot) override {
    iocb* const block = free_.back();
    free_.pop_back();
    *block = iocb{};
    block->aio_data = reinterpret_cast<uint64_t>(slot);
    block->aio_lio_opcode = slot->writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    block->aio_fildes = static_cast<uint32_t>(slot->descriptor);
    block->aio_buf = reinterpret_cast<uint64_t>(slot->vector.iov_base);
    block->aio_nbytes = slot->vector.iov_len;
    block->aio_offset = slot->offset;
    waiting_.push_back(block);
  }

  void submit() override {
    while (!waiting_.empty()) {
      const long count = syscall(__NR_io_submit, context_, waiting_.size(), waiting_.data());
      if (count > 0) {
        waiting_.erase(waiting_.begin(), waiting_.begin() + count);
        under_way_ += count;
      } else if (count < 0 && errno == EAGAIN && under_way_ > 0) {
        return;  // goes on when something is complete
      } else {
        // Only the first one can be at fault; the worker tries EAGAIN and EINTR again.
        refused_.push_back({slot_of(waiting_[0]), count < 0 ? -errno : -EAGAIN});
        free_.push_back(waiting_[0]);
        waiting_.erase(waiting_.begin());
      }
    }
  }

  void reap(std::vector<Completion>& found) override {
    submit();
    found.insert(found.end(), refused_.begin(), refused_.end());
    const long least = refused_.empty() ? 1 : 0;
    refused_.clear();
    if (under_way_ == 0) return;
    const long count =
        syscall(__NR_io_getevents, context_, least, events_.size(), events_.data(), nullptr);
    for (long at = 0; at < count; ++at) {
      iocb* const block = reinterpret_cast<iocb*>(events_[at].obj);
      found.push_back({slot_of(block), events_[at].res});
      free_.push_back(block);
      --under_way_;
    }
  }

 private:
  static Slot* slot_of(const iocb* block) { return reinterpret_cast<Slot*>(block->aio_data); }

  const aio_context_t context_;
  std::vector<io_event> events_;
  std::vector<iocb> blocks_;
  std::vector<iocb*> free_, waiting_;
  std::vector<Completion> refused_;
  long under_way_ = 0;
};

}  // namespace

std::unique_ptr<Queue> make_aio_queue(int depth, std::string& why) {
  aio_context_t context = 0;
  if (syscall(__NR_io_setup, depth, &context) < 0) {
    why = std::string("io_setup: ") + std::strerror(errno);
    if (errno == EAGAIN) why += " (fs.aio-max-nr is used up)";
    return nullptr;
  }
  return std::make_unique<AioQueue>(context, depth);
}

}  // namespace drivetrain

#else

namespace drivetrain {

std::unique_ptr<Queue> make_aio_queue(int, std::string& why) {
  why = "this system has no kernel AIO";
  return nullptr;
}

}  // namespace drivetrain

#endif
