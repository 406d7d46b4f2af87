// OpenMP's run-time functions over std::thread, as far as the kernels need them.
//
// The thread sanitizer does not see how libgomp's threads wait for each other, since libgomp is not
// compiled for it, and would report races everywhere. Threads that are made and joined for each
// parallel region it understands.
#include <pthread.h>

#include <thread>
#include <vector>

namespace {

thread_local int number = 0;
thread_local int members = 1;
thread_local pthread_barrier_t* meeting = nullptr;

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }

int omp_get_num_threads() { return members; }

void GOMP_barrier() {
  if (meeting != nullptr) pthread_barrier_wait(meeting);
}

void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, threads);
  std::vector<std::thread> team;
  for (unsigned k = 0; k < threads; ++k) {
    team.emplace_back([=, &barrier] {
      number = static_cast<int>(k);
      members = static_cast<int>(threads);
      meeting = &barrier;
      work(data);
    });
  }
  for (std::thread& member : team) member.join();
  pthread_barrier_destroy(&barrier);
}

}  // extern "C"
