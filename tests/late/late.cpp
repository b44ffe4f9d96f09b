// A device that is as late as a device may be, for tests on machines that have none.
//
// Its memory is the machine's own, at addresses that the host must not touch: who reads a tensor of this device as if
// it lay on the CPU is killed by the system. Copies between pinned memory and the device, and on the device, are kept
// in the queue of their stream until something waits for them. Kernels are the CPU's, run in the order of their stream,
// so that results are equal to the CPU's bit for bit. Memory that is freed is given again to the stream that had it, as
// CUDA's allocator does. Tensors of the CPU are refused beside tensors of the device, as CUDA does. Each time that the
// host waits is counted, under the name of what it waited for.

#include <torch/extension.h>

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto kLate = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
constexpr size_t kArena = size_t(16) << 30; // addresses; memory is taken where it is written to
constexpr size_t kRound = 512;

std::recursive_mutex everything;

// Who holds it may free what Python owns; so who waits for it lets go of Python meanwhile.
class Lock {
 public:
  Lock() {
    if (everything.try_lock()) {
      return;
    }
    std::optional<py::gil_scoped_release> released;
    if (PyGILState_Check()) {
      released.emplace();
    }
    everything.lock();
  }
  ~Lock() {
    everything.unlock();
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
};

// --- waits ----------------------------------------------------------------------------------------------------------

std::map<std::string, int64_t> waits;

void host_waits(const std::string& name) {
  Lock lock;
  waits[name] += 1;
}

// --- streams --------------------------------------------------------------------------------------------------------

struct Queue {
  std::deque<std::function<void()>> work;
  int64_t done = 0; // since the beginning
  int64_t given = 0;
};

std::map<c10::StreamId, Queue> queues; // of all devices: the number of the device is in the id
c10::StreamId streams_made = 0;
thread_local c10::DeviceIndex current_device = 0;
thread_local std::map<c10::DeviceIndex, c10::StreamId> current_streams;

c10::StreamId default_stream(c10::DeviceIndex device) {
  return -1 - device;
}

c10::StreamId current_stream(c10::DeviceIndex device) {
  const auto found = current_streams.find(device);
  return found == current_streams.end() ? default_stream(device) : found->second;
}

void keep(c10::StreamId stream, std::function<void()> work) {
  Lock lock;
  Queue& queue = queues[stream];
  queue.work.push_back(std::move(work));
  queue.given += 1;
}

void run(c10::StreamId stream, int64_t end) {
  Lock lock;
  Queue& queue = queues[stream];
  while (queue.done < end) {
    const auto work = std::move(queue.work.front());
    queue.work.pop_front();
    queue.done += 1;
    work();
  }
}

void run(c10::StreamId stream) {
  Lock lock;
  run(stream, queues[stream].given);
}

// --- memory ---------------------------------------------------------------------------------------------------------

struct Arena {
  char* host;
  char* device;
  size_t used = 0;

  Arena() {
    const int file = memfd_create("late", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, off_t(kArena)) == 0, "no memory for the late device");
    host = map(PROT_READ | PROT_WRITE, MAP_SHARED, file);
    device = map(PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    close(file);
  }

  static char* map(int protection, int flags, int file) {
    void* found = mmap(nullptr, kArena, protection, flags, file, 0);
    TORCH_CHECK(found != MAP_FAILED, "no addresses for the late device");
    return static_cast<char*>(found);
  }

  bool has(const void* pointer) const {
    return pointer >= device && pointer < device + kArena;
  }

  // Where the host reaches what lies at an address of the device.
  char* reach(const void* pointer) const {
    TORCH_INTERNAL_ASSERT(pointer == nullptr || has(pointer));
    return pointer == nullptr ? nullptr : host + (static_cast<const char*>(pointer) - device);
  }
};

Arena& arena() {
  static auto* made = new Arena();
  return *made;
}

struct Block {
  char* start;
  size_t size;
  c10::StreamId stream;
  bool elsewhere = false; // used by another stream, too
};

struct Allocator final : c10::Allocator {
  std::map<std::pair<c10::StreamId, size_t>, std::vector<char*>> freed;

  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kLate, current_device);
    if (bytes == 0) {
      return {nullptr, nullptr, &release, device};
    }
    Lock lock;
    const size_t size = (bytes + kRound - 1) / kRound * kRound;
    const auto stream = current_stream(current_device);
    auto& again = freed[{stream, size}];
    char* start = nullptr;
    if (!again.empty()) {
      start = again.back();
      again.pop_back();
    } else {
      TORCH_CHECK(arena().used + size <= kArena, "late device out of memory");
      start = arena().device + arena().used;
      arena().used += size;
      std::memset(arena().reach(start), 0xAB, size);
    }
    return {start, new Block{start, size, stream}, &release, device};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    run(current_stream(current_device));
    std::memcpy(arena().reach(to), arena().reach(from), bytes);
  }

  static void release(void* context);
};

Allocator& allocator() {
  static auto* made = new Allocator();
  return *made;
}

void Allocator::release(void* context) {
  if (context == nullptr) {
    return;
  }
  Lock lock;
  auto* block = static_cast<Block*>(context);
  if (!block->elsewhere) {
    allocator().freed[{block->stream, block->size}].push_back(block->start);
  }
  delete block;
}

// Pinned memory, which the bus reads while the host goes on.
struct Pinned final : c10::Allocator {
  std::map<const char*, size_t> blocks;

  c10::DataPtr allocate(size_t bytes) override {
    Lock lock;
    void* start = std::aligned_alloc(4096, (bytes + 4096) / 4096 * 4096);
    blocks[static_cast<char*>(start)] = bytes + 1;
    return {start, start, &release, c10::Device(c10::DeviceType::CPU)};
  }

  bool has(const void* pointer) {
    Lock lock;
    auto after = blocks.upper_bound(static_cast<const char*>(pointer));
    return after != blocks.begin() && pointer < (--after)->first + after->second;
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

  static void release(void* start);
};

Pinned& pinned() {
  static auto* made = new Pinned();
  return *made;
}

void Pinned::release(void* start) {
  Lock lock;
  pinned().blocks.erase(static_cast<char*>(start));
  std::free(start);
}

// --- what torch asks of a device ------------------------------------------------------------------------------------

struct Event {
  c10::StreamId stream;
  int64_t end;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kLate;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return {kLate, current_device};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "there is no late device ", device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) {
      current_device = device.index();
    }
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream_of(device, current_stream(index(device)));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(device, default_stream(index(device)));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    Lock lock;
    return stream_of(device, ++streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    Lock lock;
    if (*event == nullptr) {
      *event = new Event();
    }
    *static_cast<Event*>(*event) = {stream.id(), queues[stream.id()].given};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) {
      const auto waited = *static_cast<Event*>(event);
      keep(stream.id(), [waited] { run(waited.stream, waited.end); });
    }
  }
  bool queryEvent(void* event) const override {
    Lock lock;
    return event == nullptr || queues[static_cast<Event*>(event)->stream].done >= static_cast<Event*>(event)->end;
  }
  void synchronizeEvent(void* event) const override {
    host_waits("event");
    if (event != nullptr) {
      run(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->end);
    }
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock;
    return queues[stream.id()].work.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    host_waits("stream");
    run(stream.id());
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    host_waits("device");
    Lock lock;
    for (auto& queue : queues) {
      run(queue.first);
    }
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Lock lock;
    auto* block = static_cast<Block*>(data.get_context());
    block->elsewhere = block->elsewhere || block->stream != stream.id();
  }

 private:
  static c10::DeviceIndex index(c10::Device device) {
    return device.has_index() ? device.index() : current_device;
  }
  static c10::Stream stream_of(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kLate, index(device)), id);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return kDevices;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_device;
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    current_device = device;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  at::Device getDeviceFromPtr(void* pointer) const override {
    TORCH_CHECK(arena().has(pointer), "no address of the late device");
    return {kLate, current_device};
  }
  bool isPinnedPtr(const void* pointer) const override {
    return pinned().has(pointer);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto data = allocator().allocate(bytes);
    allocator().copy_data(data.get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr(std::move(data));
    impl->set_nbytes(bytes);
  }
};

// --- kernels: the CPU's ---------------------------------------------------------------------------------------------

bool is_late(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kLate;
}

// Tensors of the device as tensors of the CPU over the same memory, and the way back.
class Aliases {
 public:
  at::Tensor host(const at::Tensor& tensor) {
    if (!is_late(tensor)) {
      return tensor;
    }
    device = tensor.device();
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    auto& storage = storages[impl];
    if (!storage.first) {
      c10::DataPtr data(arena().reach(impl->data()), c10::Device(c10::DeviceType::CPU));
      storage.first = c10::Storage(
          c10::Storage::use_byte_size_t(), impl->nbytes(), std::move(data), c10::GetCPUAllocator(), /*resizable=*/true);
      storage.second = tensor.storage();
      back[storage.first.unsafeGetStorageImpl()] = impl;
    }
    at::Tensor made = at::empty({0}, at::TensorOptions(tensor.scalar_type()).device(at::kCPU));
    made.set_(storage.first, tensor.storage_offset(), tensor.sizes(), tensor.strides());
    made._set_conj(tensor.is_conj());
    made._set_neg(tensor.is_neg());
    originals[made.unsafeGetTensorImpl()] = {tensor, made};
    return made;
  }

  at::Tensor late(const at::Tensor& tensor) {
    if (!tensor.defined() || !device.has_value() || tensor.device().type() != c10::DeviceType::CPU) {
      return tensor;
    }
    const auto original = originals.find(tensor.unsafeGetTensorImpl());
    if (original != originals.end()) {
      return original->second.first;
    }
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    const auto view = back.find(impl);
    c10::DeviceGuard guard(*device);
    if (view != back.end()) {
      at::Tensor made = at::empty({0}, at::TensorOptions(tensor.scalar_type()).device(*device));
      return made.set_(storages[view->second].second, tensor.storage_offset(), tensor.sizes(), tensor.strides());
    }
    at::Tensor made = at::detail::empty_strided_generic(
        tensor.sizes(), tensor.strides(), &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
        tensor.scalar_type());
    const auto bytes = made.storage().nbytes();
    if (bytes > 0) {
      const auto* from = static_cast<const char*>(tensor.storage().data()) + tensor.storage_offset() * tensor.itemsize();
      std::memcpy(arena().reach(made.storage().data()), from, bytes);
    }
    return made;
  }

  // Give tensors of the device the sizes and values that a kernel gave their aliases.
  void resize() {
    for (const auto& [impl, pair] : originals) {
      const auto& [tensor, alias] = pair;
      if (tensor.sizes() == alias.sizes()) {
        continue;
      }
      tensor.resize_(alias.sizes());
      const auto* data = static_cast<const char*>(alias.storage().data());
      char* place = arena().reach(tensor.storage().data()) + tensor.storage_offset() * tensor.itemsize();
      std::memmove(place, data + alias.storage_offset() * alias.itemsize(), alias.nbytes());
    }
  }

  std::optional<c10::Device> device;

 private:
  std::map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> storages;
  std::map<c10::StorageImpl*, c10::StorageImpl*> back;
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> originals;
};

at::Tensor host_alias(const at::Tensor& tensor) {
  return Aliases().host(tensor);
}

// Kernels whose result has a size that the host must be told.
const std::set<std::string> kWaiting = {
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim", "aten::_unique", "aten::_unique2",
    "aten::bincount", "aten::repeat_interleave", "aten::unique_consecutive", "aten::is_nonzero"};

// Whether there is a mask among indices, of which the host must know how many elements it chooses.
bool has_mask(const c10::IValue& value) {
  bool found = false;
  for (const auto& item : value.toListRef()) {
    found = found || (item.isTensor() && item.toTensor().defined() &&
                      (item.toTensor().scalar_type() == at::kBool || item.toTensor().scalar_type() == at::kByte));
  }
  return found;
}

void kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const bool indexes = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0;
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  Aliases aliases;
  bool refused = false;

  const auto taken = [&](const at::Tensor& tensor) {
    refused = refused || (tensor.defined() && tensor.device().type() == c10::DeviceType::CPU && tensor.dim() > 0);
    return aliases.host(tensor);
  };
  for (size_t at = 0; at < count; ++at) {
    auto& value = (*stack)[begin + at];
    if (value.isTensor()) {
      value = taken(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& tensor : value.toTensorVector()) {
        list.push_back(taken(tensor));
      }
      value = list;
    } else if (value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
      if (indexes && has_mask(value)) {
        host_waits(name);
      }
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& item : value.toListRef()) {
        list.push_back(item.isNone() ? std::optional<at::Tensor>() : taken(item.toTensor()));
      }
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kLate) {
      aliases.device = value.toDevice();
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(!refused || indexes || !aliases.device.has_value(),
      "Expected all tensors to be on the same device, but found late and cpu, in ", name);
  const auto device = aliases.device.value_or(c10::Device(kLate, current_device));
  run(current_stream(device.has_index() ? device.index() : current_device));
  if (kWaiting.count(name) != 0) {
    host_waits(name);
  }
  {
    c10::impl::ExcludeDispatchKeyGuard no_grad(c10::autograd_dispatch_keyset);
    op.callBoxed(stack);
  }
  aliases.resize();
  for (auto at = stack->size() - schema.returns().size(); at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      value = aliases.late(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const auto& tensor : value.toTensorVector()) {
        list.push_back(aliases.late(tensor));
      }
      value = list;
    }
  }
}

// --- what is not a kernel -------------------------------------------------------------------------------------------

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kLate, current_device)));
  return at::detail::empty_generic(
      size, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kLate, current_device)));
  return at::detail::empty_strided_generic(
      size, stride, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format.has_value() && *format != at::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  const auto needed = static_cast<size_t>((self.storage_offset() + self.numel()) * self.itemsize());
  if (needed > self.storage().nbytes()) {
    c10::DeviceGuard guard(self.device());
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  }
  return self;
}

at::Tensor& set_source(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr || (stride.empty() && !size.empty())) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto length = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_source(self, std::move(source), 0, {length}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_source(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  host_waits("item");
  run(current_stream(self.device().index()));
  return host_alias(self).item();
}

void record_stream(at::Tensor& self, at::Stream stream) {
  Guard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  c10::DeviceGuard guard(is_late(target) ? target.device() : self.device());
  const auto stream = current_stream(current_device);
  const bool on_device = is_late(self) && is_late(target);
  at::Tensor source = self;
  if (!is_late(self)) { // the conversion is made before the bus
    source = self.to(target.scalar_type()).expand_as(target);
    source = source.is_same(self) || source.is_contiguous() ? source : source.contiguous();
  }
  const bool is_pinned = !on_device && (is_late(self) ? target : source).is_pinned();
  if (on_device || (non_blocking && is_pinned)) {
    // Pinned memory lives until the copy is made, as under CUDA's allocator; the device's only in its stream's order.
    const auto from = host_alias(source);
    const auto to = host_alias(target);
    keep(stream, [from, to] { to.copy_(from); });
    return target;
  }
  if (is_late(self) || !non_blocking) {
    host_waits(is_late(self) ? "to the host" : "to the device");
  }
  run(stream);
  host_alias(target).copy_(host_alias(source));
  return target;
}

// One step of an LSTM, for which torch has a kernel on accelerators and none on the CPU.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& input_gates, const at::Tensor& hidden_gates, const at::Tensor& cell,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  at::Tensor gates = input_gates + hidden_gates;
  for (const auto& bias : {input_bias, hidden_bias}) {
    gates = bias.has_value() && bias->defined() ? gates + *bias : gates;
  }
  const auto parts = gates.unsafe_chunk(4, 1);
  const auto next = parts[1].sigmoid() * cell + parts[0].sigmoid() * parts[2].tanh();
  return {parts[3].sigmoid() * next.tanh(), next, gates};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(
    const std::optional<at::Tensor>& grad_hidden, const std::optional<at::Tensor>& grad_next, const at::Tensor& cell,
    const at::Tensor& next, const at::Tensor& gates, bool has_bias) {
  const auto parts = gates.unsafe_chunk(4, 1);
  const auto in = parts[0].sigmoid(), forget = parts[1].sigmoid(), fresh = parts[2].tanh(), out = parts[3].sigmoid();
  const auto seen = next.tanh();
  const auto hidden = grad_hidden.has_value() && grad_hidden->defined() ? *grad_hidden : at::zeros_like(next);
  auto grad = hidden * out * (1 - seen * seen);
  grad = grad_next.has_value() && grad_next->defined() ? grad + *grad_next : grad;
  const auto grad_gates = at::cat(
      {grad * fresh * in * (1 - in), grad * cell * forget * (1 - forget), grad * in * (1 - fresh * fresh),
       hidden * seen * out * (1 - out)},
      1);
  return {grad_gates, grad * forget, has_bias ? grad_gates.sum(0) : at::Tensor()};
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  target.resize_(self.sizes());
  return copy_from(self, target, false);
}

} // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("record_stream", &record_stream);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &lstm_cell_backward);
  for (const auto* name : {"convolution", "convolution_backward"}) { // torch knows no kernel of theirs for such devices
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&kernel>());
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kLate, &allocator());
  static auto* hooks = new Hooks();
  at::RegisterPrivateUse1HooksInterface(hooks);
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int device) { Guard().setDevice(c10::Device(kLate, c10::DeviceIndex(device))); });
  m.def("device_count", [] { return int(kDevices); });
  m.def("synchronize", [] { Guard().synchronizeDevice(0); });
  m.def("waits", [] {
    Lock lock;
    return waits;
  });
}
