// The little that CUDA and HIP spell differently, and launching a kernel.
//
// Every kernel takes one structure by value and walks its work with a stride, so one launcher
// serves all. DRIVETRAIN_GPU_RUNTIME names a header that stands in for both runtimes: tests run
// the kernels on the host through one.
#pragma once

#include <cstdint>
#include <cstring>

namespace drivetrain {

// Threads of a block.
constexpr int kThreads = 256;
// Lanes that exchange values without a barrier; half a wavefront on some AMD devices.
constexpr int kLanes = 32;

}  // namespace drivetrain

#if defined(DRIVETRAIN_GPU_RUNTIME)
#include DRIVETRAIN_GPU_RUNTIME
#elif defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define DRIVETRAIN_GPU(name) hip##name
#else
#include <cuda_runtime.h>
#define DRIVETRAIN_GPU(name) cuda##name
#endif

#define DRIVETRAIN_API extern "C" __attribute__((visibility("default")))

namespace drivetrain {

#if !defined(DRIVETRAIN_GPU_RUNTIME)

using Stream = DRIVETRAIN_GPU(Stream_t);

// The value of lane `lane ^ mask` among kLanes; all of them must take part.
template <typename Value>
__device__ inline Value exchange(Value value, int mask) {
#if defined(__HIPCC__)
  return __shfl_xor(value, mask, kLanes);
#else
  return __shfl_xor_sync(0xffffffffu, value, mask, kLanes);
#endif
}

// Blocks that keep the current device busy, so that more would only wait.
inline int64_t most_blocks() {
  int device = 0, processors = 0;
  if (DRIVETRAIN_GPU(GetDevice)(&device) != DRIVETRAIN_GPU(Success)) return 1024;
#if defined(__HIPCC__)
  const auto attribute = hipDeviceAttributeMultiprocessorCount;
#else
  const auto attribute = cudaDevAttrMultiProcessorCount;
#endif
  if (DRIVETRAIN_GPU(DeviceGetAttribute)(&processors, attribute, device) !=
      DRIVETRAIN_GPU(Success)) {
    return 1024;
  }
  return 32 * static_cast<int64_t>(processors);
}

// Queues `kernel` on `stream` with `blocks` blocks of kThreads; answers the runtime's status.
template <typename Parameters>
int launch_blocks(void (*kernel)(Parameters), Parameters parameters, int64_t blocks,
                  void* stream) {
  if (blocks == 0) return 0;
  void* arguments[] = {&parameters};
  return static_cast<int>(DRIVETRAIN_GPU(LaunchKernel)(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
      arguments, 0, static_cast<Stream>(stream)));
}

#endif

// Likewise with a thread for each of `items`, or a stride where that would be too many.
template <typename Parameters>
int launch(void (*kernel)(Parameters), Parameters parameters, int64_t items, void* stream) {
  const int64_t wanted = (items + kThreads - 1) / kThreads, most = most_blocks();
  return launch_blocks(kernel, parameters, wanted < most ? wanted : most, stream);
}

__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ inline int64_t thread_stride() {
  return static_cast<int64_t>(gridDim.x) * kThreads;
}

// Sums `value` over the threads of a block, always in the same order; valid in thread 0.
__device__ inline double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  const double total = sums[0];
  __syncthreads();  // the next call may write at once
  return total;
}

}  // namespace drivetrain
