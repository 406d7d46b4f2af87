// Calls that were recorded, one after another, by one team of threads: what Python's part of a call
// costs is paid once, and so is waking the threads.
#include "dtypes.h"
#include "team.h"

namespace drivetrain {
namespace {

// Layout shared with program.py.
struct Call {
  int (*function)(const void*);
  const void* arguments;
};

int one_after_another(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int status = calls[i].function(calls[i].arguments);
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace

// 0, or the status of the call that failed, after which none is made.
DRIVETRAIN_API int dt_run(const Call* calls, int64_t count, int threads) {
  int status = 0;
  Team::with(threads, [&] { status = one_after_another(calls, count); });
  return status;
}

}  // namespace drivetrain
