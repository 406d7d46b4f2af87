// Copies between storage dtypes: one tensor, or many into and out of a flat one.
#include "tensors.h"

namespace drivetrain {
namespace {

struct CastTask {
  void* target;
  const void* source;
  const float* scale_tensor;
  uint64_t seed;
  int32_t target_dtype, source_dtype, scaled;
  float scale;
  Cut cut;
};

__device__ inline float scaled(float value, const CastTask& task, float factor) {
  return task.scaled ? value * factor : value;
}

template <int kWidth>
__device__ inline void cast_vector(const CastTask& task, float factor, int64_t at) {
  float values[kWidth];
  load<kWidth>(task.source, task.source_dtype, at, values);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = scaled(values[i], task, factor);
  store<kWidth>(task.target, task.target_dtype, at, values);
}

__device__ inline float factor_of(const CastTask& task) {
  return task.scale_tensor == nullptr ? task.scale : task.scale * *task.scale_tensor;
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads) cast_kernel(CastTask task) {
  const float factor = factor_of(task);
  for (int64_t i = thread_index(); i < task.cut.vectors; i += thread_stride()) {
    cast_vector<kWidth>(task, factor, task.cut.vector(i));
  }
  for (int64_t i = thread_index(); i < task.cut.singles(); i += thread_stride()) {
    cast_vector<1>(task, factor, task.cut.single(i));
  }
}

// As update_randomly_kernel: a thread takes the four elements whose random words it makes.
__global__ void __launch_bounds__(kThreads) cast_randomly_kernel(CastTask task) {
  const float factor = factor_of(task);
  const int64_t count = task.cut.count, lanes = (count + 63) / 64 * 16;
  for (int64_t lane = thread_index(); lane < lanes; lane += thread_stride()) {
    uint32_t words[4];
    philox(lane, 0, task.seed, words);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t at = lane / 16 * 64 + 16 * w + lane % 16;
      if (at >= count) break;
      float value;
      load<1>(task.source, task.source_dtype, at, &value);
      const float product = scaled(value, task, factor);
      store_randomly(task.target, task.target_dtype, at, product, words[w]);
    }
  }
}

// -- many tensors --------------------------------------------------------------------------------

struct PackTask {
  Tensors tensors;
  void* flat;
  int32_t flat_dtype, unpack;
};

template <int kWidth>
__device__ inline void move_vector(const void* source, int source_dtype, int64_t source_at,
                                   void* target, int target_dtype, int64_t target_at) {
  if (source_dtype == target_dtype) {  // bits as they are, whatever NaN they spell
    uint32_t codes[kWidth];
    const Raw<kWidth> raw = fetch<kWidth>(source, source_dtype, source_at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      codes[i] = source_dtype == kFloat32 ? raw.words[i]
                                          : (raw.words[i / 2] >> (16 * (i % 2))) & 0xffff;
    }
    store_codes<kWidth>(target, target_dtype, target_at, codes);
    return;
  }
  float values[kWidth];
  load<kWidth>(source, source_dtype, source_at, values);
  store<kWidth>(target, target_dtype, target_at, values);
}

template <int kWidth>
__device__ inline void move_chunk(const PackTask& task, const Chunk& chunk) {
  void* own = task.tensors.memory[chunk.tensor];
  const int dtype = task.tensors.dtypes[chunk.tensor];
  const int64_t at = task.tensors.offsets[chunk.tensor] + chunk.start;
  const void* source = task.unpack ? task.flat : own;
  void* target = task.unpack ? own : task.flat;
  const int64_t from = task.unpack ? at : chunk.start, to = task.unpack ? chunk.start : at;
  const int source_dtype = task.unpack ? task.flat_dtype : dtype;
  const int target_dtype = task.unpack ? dtype : task.flat_dtype;
  Cutter cutter(kWidth);
  cutter.add(source, source_dtype, from);
  cutter.add(target, target_dtype, to);
  const Cut cut = cutter.cut(chunk.count);
  for (int64_t i = threadIdx.x; i < cut.vectors; i += kThreads) {
    const int64_t k = cut.vector(i);
    move_vector<kWidth>(source, source_dtype, from + k, target, target_dtype, to + k);
  }
  for (int64_t i = threadIdx.x; i < cut.singles(); i += kThreads) {
    const int64_t k = cut.single(i);
    move_vector<1>(source, source_dtype, from + k, target, target_dtype, to + k);
  }
}

__global__ void __launch_bounds__(kThreads) pack_kernel(PackTask task) {
  for (int index = blockIdx.x; index < task.tensors.chunks; index += gridDim.x) {
    const Chunk chunk = chunk_at(task.tensors, index);
    const bool narrow =
        task.flat_dtype != kFloat32 && task.tensors.dtypes[chunk.tensor] != kFloat32;
    if (narrow) {
      move_chunk<8>(task, chunk);
    } else {
      move_chunk<4>(task, chunk);
    }
  }
}

int pack(void* flat, int flat_dtype, void* const* tensors, const int32_t* dtypes,
         const int64_t* counts, int64_t number, int unpack, void* stream) {
  return for_each_list(tensors, dtypes, counts, number, [&](const Tensors& list) {
    const int64_t most = most_blocks();
    const int64_t blocks = list.chunks < most ? list.chunks : most;
    return launch_blocks(pack_kernel, PackTask{list, flat, flat_dtype, unpack}, blocks, stream);
  });
}

}  // namespace

// target = round(source * scale); `scaled` says whether to multiply at all.
DRIVETRAIN_API int dt_cast_copy(void* target, int target_dtype, const void* source,
                                int source_dtype, int64_t count, int scaled, float scale,
                                const float* scale_tensor, int stochastic, uint64_t seed,
                                void* stream) {
  const bool narrow = target_dtype != kFloat32 && source_dtype != kFloat32;
  Cutter cutter(narrow ? 8 : 4);
  cutter.add(target, target_dtype);
  cutter.add(source, source_dtype);
  const CastTask task{target, source, scale_tensor, seed,  target_dtype, source_dtype,
                      scaled, scale,  cutter.cut(count)};
  if (stochastic) return launch(cast_randomly_kernel, task, (count + 63) / 64 * 16, stream);
  const int64_t singles = task.cut.singles();
  const int64_t items = task.cut.vectors > singles ? task.cut.vectors : singles;
  return launch(narrow ? cast_kernel<8> : cast_kernel<4>, task, items, stream);
}

// Copies `number` tensors one after the other into `flat`.
DRIVETRAIN_API int dt_flatten(void* flat, int flat_dtype, void* const* tensors,
                              const int32_t* dtypes, const int64_t* counts, int64_t number,
                              void* stream) {
  return pack(flat, flat_dtype, tensors, dtypes, counts, number, 0, stream);
}

// Fills `number` tensors from `flat`.
DRIVETRAIN_API int dt_unflatten(void* flat, int flat_dtype, void* const* tensors,
                                const int32_t* dtypes, const int64_t* counts, int64_t number,
                                void* stream) {
  return pack(flat, flat_dtype, tensors, dtypes, counts, number, 1, stream);
}

}  // namespace drivetrain
