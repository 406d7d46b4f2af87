// The interface to Python: plain C.
#include <cstdio>

#include "engine.h"

#define DRIVETRAIN_API extern "C" __attribute__((visibility("default")))

using drivetrain::Engine;
using drivetrain::File;
using drivetrain::Latencies;
using drivetrain::Options;
using drivetrain::Request;
using drivetrain::Result;

// Null if the system refuses; `why`, `size` bytes long, then says so.
DRIVETRAIN_API Engine* dt_io_engine(const Options* options, char* why, int64_t size) {
  std::string reason;
  try {
    if (auto engine = Engine::make(*options, reason)) return engine.release();
  } catch (const std::exception& error) {  // no memory, or no more threads
    reason = error.what();
  }
  std::snprintf(why, static_cast<size_t>(size), "%s", reason.c_str());
  return nullptr;
}

// Waits for all requests.
DRIVETRAIN_API void dt_io_close(Engine* engine) { delete engine; }

DRIVETRAIN_API int dt_io_kind(const Engine* engine) { return engine->kind(); }

DRIVETRAIN_API void dt_io_latencies(Engine* engine, Latencies* latencies) {
  *latencies = engine->latencies();
}

// `direct` is -1 where there is none. Descriptors stay the caller's.
DRIVETRAIN_API File* dt_io_file(int direct, int buffered) { return new File{direct, buffered}; }

// All requests on it must be done.
DRIVETRAIN_API void dt_io_forget_file(File* file) { delete file; }

DRIVETRAIN_API Request* dt_io_submit(Engine* engine, File* file, int writes, void* memory,
                                     int64_t bytes, int64_t offset, int fault) {
  auto* const request =
      new Request{file, static_cast<char*>(memory), offset, bytes, writes != 0, {fault}};
  engine->submit(request);
  return request;
}

DRIVETRAIN_API int dt_io_done(Engine* engine, Request* request) { return engine->done(request); }

// Answers whether the request is done after at most `seconds`.
DRIVETRAIN_API int dt_io_wait(Engine* engine, Request* request, double seconds) {
  return engine->wait(request, seconds);
}

// What became of a request that is done; the request is gone then.
DRIVETRAIN_API void dt_io_result(Request* request, Result* result) {
  *result = {request->error, request->file->refused, request->error_offset, request->error_bytes};
  delete request;
}
