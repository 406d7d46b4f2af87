// Calls that were recorded, one after another: what Python's part of a call costs is paid once.
#include "dtypes.h"

namespace drivetrain {
namespace {

// Layout shared with program.py.
struct Call {
  int (*function)(const void*);
  const void* arguments;
};

}  // namespace

// 0, or the status of the call that failed, after which none is made.
DRIVETRAIN_API int dt_run(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int status = calls[i].function(calls[i].arguments);
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace drivetrain
