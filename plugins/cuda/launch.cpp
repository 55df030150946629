#include "launch.h"

#include <limits>
#include <map>
#include <mutex>
#include <utility>

namespace umv2::cuda {
namespace {

// The driver's bounds of a grid.
constexpr int64_t kMostAlongX = std::numeric_limits<int32_t>::max(), kMostAlongY = 65535;

// Of a side: a pair of them has 31 bits beside its score.
constexpr int64_t kMostKeys = 46340;

constexpr uintptr_t kAlignment = 16;

// Modules stay loaded: nodes of one kind share them.
Function loaded(const KernelPack& pack, const KernelRecord& record) {
  static std::mutex mutex;
  static std::map<std::pair<Context, const KernelRecord*>, Function> functions;
  const Driver& driver = Driver::instance();
  const Context context = driver.current_context();
  const std::lock_guard<std::mutex> lock(mutex);
  Function& function = functions[{context, &record}];
  if (function == nullptr) {
    function = driver.function(driver.load(pack.cubin(record)), record.entry, record.shared_bytes);
  }
  return function;
}

int64_t within(int64_t value, int64_t most, const char* what) {
  if (value < 0 || value > most) {
    throw Error(std::string(what) + " is " + std::to_string(value) + ", kernels take up to " + std::to_string(most));
  }
  return value;
}

const KernelRecord& chosen(const KernelPack& pack, const LookupCall& call) {
  within(call.groups, kMostAlongY, "the number of groups");
  return pack.find(call.node, Driver::instance().compute_capability());
}

const KernelRecord& chosen(const KernelPack& pack, const TopkCall& call) {
  within(call.keys_per_side, kMostKeys, "the number of keys of a side");
  within(call.heads, kMostAlongY, "the number of heads");
  return pack.find(call.node, Driver::instance().compute_capability());
}

// Addresses of the arguments, as a launch takes them.
class Arguments {
 public:
  explicit Arguments(size_t most) {
    pointers_.reserve(most);
    sizes_.reserve(most);
  }

  void pointer(const void* address) {
    // Kernels were compiled for it; a misaligned load would end the context.
    if (reinterpret_cast<uintptr_t>(address) % kAlignment != 0) throw Error("a tensor does not start at 16 bytes");
    pointers_.push_back(address);
    places_.push_back(&pointers_.back());
  }
  void size(int64_t value, const char* what) {
    sizes_.push_back(static_cast<int32_t>(within(value, std::numeric_limits<int32_t>::max(), what)));
    places_.push_back(&sizes_.back());
  }
  void** places() { return places_.data(); }

 private:
  std::vector<const void*> pointers_;
  std::vector<int32_t> sizes_;
  std::vector<void*> places_;
};

void enqueue(const KernelPack& pack, const KernelRecord& record, int64_t along_x, int64_t along_y, Stream stream,
             Arguments& arguments) {
  const Grid grid{static_cast<unsigned>(within(along_x, kMostAlongX, "the number of tokens")),
                  static_cast<unsigned>(along_y)};
  Driver::instance().launch(loaded(pack, record), grid, static_cast<unsigned>(record.threads),
                            static_cast<unsigned>(record.shared_bytes), stream, arguments.places());
}

}  // namespace

void prepare(const KernelPack& pack, const LookupCall& call) { loaded(pack, chosen(pack, call)); }
void prepare(const KernelPack& pack, const TopkCall& call) { loaded(pack, chosen(pack, call)); }

void launch(const KernelPack& pack, const LookupCall& call, Stream stream) {
  if (call.tokens == 0) return;
  const KernelRecord& record = chosen(pack, call);
  Arguments arguments(static_cast<size_t>(record.shards) + 10);
  arguments.pointer(call.indices);
  arguments.pointer(call.scores);
  if (call.node.grouped) arguments.pointer(call.group);
  if (call.node.pre_values) arguments.pointer(call.query);
  if (call.node.rows == ElementType::kInt8) arguments.pointer(call.row_scales);
  // A kernel of more shards than the node has: no index reaches the others.
  for (int32_t s = 0; s < record.shards; ++s) {
    arguments.pointer(static_cast<size_t>(s) < call.rows.size() ? call.rows[static_cast<size_t>(s)] : call.rows.back());
  }
  arguments.size(call.hits, "the number of hits");
  arguments.size(call.rows_per_shard, "rows_per_shard");
  arguments.size(call.node.pre_value_dim, "pre_value_dim");
  arguments.size(call.node.value_dim, "the size of a value");
  arguments.pointer(call.output);
  enqueue(pack, record, call.tokens, call.groups, stream, arguments);
}

void launch(const KernelPack& pack, const TopkCall& call, Stream stream) {
  if (call.tokens == 0) return;
  const KernelRecord& record = chosen(pack, call);
  Arguments arguments(10);
  for (const void* input : {call.row_scores, call.col_scores, call.u, call.v, call.cores}) arguments.pointer(input);
  arguments.size(call.keys_per_side, "the number of keys of a side");
  arguments.size(call.node.row_topk, "row_topk");
  arguments.size(call.node.topk, "topk");
  arguments.pointer(call.addresses);
  arguments.pointer(call.scores);
  enqueue(pack, record, call.tokens, call.heads, stream, arguments);
}

}  // namespace umv2::cuda
