// Lists of tensors as kernel arguments: many tensors, few launches, no copy of a table.
#pragma once

#include "values.h"

namespace drivetrain {

// A kernel's arguments may take 4 KiB.
constexpr int kTensors = 96;
// Elements that one block of threads takes at a time.
constexpr int64_t kChunk = 16384;

__host__ __device__ inline int64_t chunks_of(int64_t count) {
  return (count + kChunk - 1) / kChunk;
}

// Up to kTensors tensors of a list, and where their chunks begin in the order of all chunks.
struct Tensors {
  void* memory[kTensors];
  int64_t counts[kTensors], offsets[kTensors];  // offset of each in the flat tensor
  int32_t dtypes[kTensors], first_chunks[kTensors];
  int32_t number, chunks;
};

// A piece of one tensor of the list.
struct Chunk {
  int tensor;
  int64_t start, count;
};

__device__ inline Chunk chunk_at(const Tensors& tensors, int chunk) {
  int low = 0, high = tensors.number - 1;  // the last tensor that begins at or before `chunk`
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (tensors.first_chunks[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t start = (chunk - tensors.first_chunks[low]) * kChunk;
  const int64_t rest = tensors.counts[low] - start;
  return {low, start, rest < kChunk ? rest : kChunk};
}

// Calls body(tensors) for as many lists of at most kTensors as there are; stops at an error.
template <typename Body>
int for_each_list(void* const* memory, const int32_t* dtypes, const int64_t* counts, int64_t number,
                  const Body& body) {
  int64_t offset = 0;
  for (int64_t t = 0; t < number;) {
    Tensors list{};
    for (; t < number && list.number < kTensors; ++t) {
      if (counts[t] == 0) continue;
      const int own = list.number++;
      list.memory[own] = memory[t];
      list.counts[own] = counts[t];
      list.offsets[own] = offset;
      list.dtypes[own] = dtypes[t];
      list.first_chunks[own] = list.chunks;
      list.chunks += static_cast<int32_t>(chunks_of(counts[t]));
      offset += counts[t];
    }
    const int status = list.number == 0 ? 0 : body(list);
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace drivetrain
