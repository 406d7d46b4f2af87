// pread and pwrite: works everywhere; depth comes from the number of threads.
#include <cerrno>

#include <unistd.h>

#include "queue.h"

namespace drivetrain {
namespace {

class BlockingQueue : public Queue {
 public:
  void push(Slot* slot) override { pushed_.push_back(slot); }

  void submit() override {
    for (Slot* slot : pushed_) done_.push_back({slot, transfer(*slot)});
    pushed_.clear();
  }

  void reap(std::vector<Completion>& found) override {
    submit();
    found.insert(found.end(), done_.begin(), done_.end());
    done_.clear();
  }

 private:
  static int64_t transfer(const Slot& slot) {
    const iovec& part = slot.vector;
    const ssize_t count = slot.writes
                              ? pwrite(slot.descriptor, part.iov_base, part.iov_len, slot.offset)
                              : pread(slot.descriptor, part.iov_base, part.iov_len, slot.offset);
    return count < 0 ? -errno : count;
  }

  std::vector<Slot*> pushed_;
  std::vector<Completion> done_;
};

}  // namespace

std::unique_ptr<Queue> make_blocking_queue() { return std::make_unique<BlockingQueue>(); }

}  // namespace drivetrain
