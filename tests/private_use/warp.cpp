// A device of torch's PrivateUse1 kind: its memory is the host's, and every operator without a kernel
// here runs on the CPU and has its results copied back. Tests run the conformance kit on it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>

namespace {

constexpr auto kWarp = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKey(c10::DispatchKey::PrivateUse1);

// Sizes of the live blocks of one kind of memory, by address.
struct Blocks {
  std::mutex mutex;
  std::map<void*, int64_t> sizes;
  int64_t now = 0, peak = 0, limit = std::numeric_limits<int64_t>::max();

  void* make(size_t bytes) {
    TORCH_CHECK_WITH(OutOfMemoryError, now + static_cast<int64_t>(bytes) <= limit,
                     "the device has no ", bytes, " bytes left");
    void* data = c10::alloc_cpu(bytes);
    if (data == nullptr) return data;
    const std::lock_guard<std::mutex> lock(mutex);
    sizes[data] = static_cast<int64_t>(bytes);
    now += static_cast<int64_t>(bytes);
    peak = std::max(peak, now);
    return data;
  }

  void release(void* data) {
    if (data == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex);
    now -= sizes[data];
    sizes.erase(data);
    c10::free_cpu(data);
  }

  bool holds(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    return sizes.count(const_cast<void*>(data)) > 0;
  }
};

// Never destroyed: tensors that live until the process ends are released later.
template <c10::DeviceType type>
Blocks& memory() {
  static Blocks& blocks = *new Blocks;
  return blocks;
}

template <c10::DeviceType type>
struct Allocator final : c10::Allocator {
  static void release(void* data) { memory<type>().release(data); }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = memory<type>().make(bytes);
    return {data, data, &release, c10::Device(type, type == kWarp ? 0 : -1)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

const c10::Device kDevice(kWarp, 0);

// There is one device with one stream. Work is done when an operator returns, so that events have
// nothing to wait for.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kWarp> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kDevice); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

Allocator<kWarp> allocator;
Allocator<c10::kCPU> pinned_allocator;
REGISTER_ALLOCATOR(kWarp, &allocator);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Random numbers are the CPU's, whose generator draws them in the fallback.
struct WarpHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return memory<c10::kCPU>().holds(data); }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr data = allocator.allocate(bytes);
    const size_t kept = std::min(bytes, storage.nbytes());
    if (kept > 0) std::memcpy(data.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

WarpHooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                 std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>,
                 std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKey, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device>, std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKey, type);
}

// The same memory as the CPU sees it.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(c10::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) { return on_host(tensor).item(); }

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size,
                         std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::set_(tensor, storage, offset, size, stride);
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::cpu::as_strided);
  library.impl("view", at::native::view);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { KERNEL_PRIVATEUSEONE(linear, lower_precision_fp) }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t warp_allocated() { return memory<kWarp>().now; }
EXPORT int64_t warp_peak() { return memory<kWarp>().peak; }
EXPORT void warp_limit(int64_t bytes) { memory<kWarp>().limit = bytes; }
EXPORT void warp_reset_peak() { memory<kWarp>().peak = memory<kWarp>().now; }
