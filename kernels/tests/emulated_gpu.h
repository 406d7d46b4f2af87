// Runs GPU kernels on the host: each thread of a block is a fiber, and blocks run one by one.
//
// Threads of a block go from one meeting point (barrier or exchange) to the next in turn, as far as
// kernels demand of a device. What depends on timing cannot be seen here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define DRIVETRAIN_GPU(name) emulated##name

using emulatedError_t = int;
inline const char* emulatedGetErrorString(int status) { return status ? "broken" : "no error"; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace drivetrain {

constexpr size_t kStack = 64 * 1024;

// The threads of the block that runs. Contexts start them; jumps, which cost no system call, then
// lead from one to the other.
struct Fibers {
  ucontext_t contexts[kThreads];
  jmp_buf scheduler, places[kThreads];
  bool started[kThreads], done[kThreads];
  uint64_t slots[2][kThreads];
  unsigned exchanges[kThreads];
  std::vector<char> stacks = std::vector<char>(kStack * kThreads);
  void (*run)(void*);
  void* task;
};
inline Fibers fibers;

inline void meet() {
  const unsigned self = threadIdx.x;
  if (_setjmp(fibers.places[self]) == 0) _longjmp(fibers.scheduler, 1);
  threadIdx.x = self;
}

template <typename Value>
Value exchange(Value value, int mask) {
  const unsigned self = threadIdx.x;
  // Slots take turns: who writes again has passed a meeting that came after the last reading.
  uint64_t* slots = fibers.slots[fibers.exchanges[self]++ % 2];
  std::memcpy(&slots[self], &value, sizeof value);
  meet();
  Value other;
  std::memcpy(&other, &slots[self ^ mask], sizeof other);
  return other;
}

inline int64_t most_blocks() { return 3; }  // few, so that every kernel has to stride

inline void enter() {
  const unsigned self = threadIdx.x;
  fibers.run(fibers.task);
  fibers.done[self] = true;
  _longjmp(fibers.scheduler, 1);
}

// Runs thread `self` up to its next meeting point.
inline void resume(unsigned self) {
  threadIdx.x = self;
  if (_setjmp(fibers.scheduler) != 0) return;
  if (fibers.started[self]) _longjmp(fibers.places[self], 1);
  fibers.started[self] = true;
  setcontext(&fibers.contexts[self]);
}

inline void run_block() {
  for (int t = 0; t < kThreads; ++t) {
    ucontext_t& context = fibers.contexts[t];
    getcontext(&context);
    context.uc_stack.ss_sp = fibers.stacks.data() + t * kStack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, enter, 0);
    fibers.started[t] = fibers.done[t] = false;
    fibers.exchanges[t] = 0;
  }
  for (int left = kThreads; left > 0;) {
    for (int t = 0; t < kThreads; ++t) {
      if (fibers.done[t]) continue;
      resume(t);
      left -= fibers.done[t];
    }
  }
}

template <typename Parameters>
int launch_blocks(void (*kernel)(Parameters), Parameters parameters, int64_t blocks, void*) {
  struct Task {
    void (*kernel)(Parameters);
    Parameters* parameters;
  } task{kernel, &parameters};
  fibers.task = &task;
  fibers.run = [](void* memory) {
    Task* own = static_cast<Task*>(memory);
    own->kernel(*own->parameters);
  };
  gridDim.x = static_cast<unsigned>(blocks);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block();
  return 0;
}

}  // namespace drivetrain

#define __syncthreads() drivetrain::meet()
