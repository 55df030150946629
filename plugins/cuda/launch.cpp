#include "launch.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "checked.h"

namespace umv2::cuda {
namespace {

// The driver's bounds of a grid.
constexpr int64_t kMostAlongX = std::numeric_limits<int32_t>::max(), kMostAlongY = 65535;

// Of a side: a pair of them has 31 bits beside its score.
constexpr int64_t kMostKeys = 46340;

constexpr uintptr_t kAlignment = 16;

constexpr int64_t kMostSize = std::numeric_limits<int32_t>::max();

// As umv2_export/gpu/variants.py has it: programs from which a lookup is not split.
constexpr int64_t kSplitPrograms = 528;

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

// Kernels compute with sizes in 32 bits: what they multiply is checked here.
void check_sizes(const LookupCall& call) {
  within(call.groups, kMostAlongY, "the number of groups");
  within(call.hits, kMostSize, "the number of hits");
  within(call.table_rows, kMostSize, "the number of rows");
  within(call.rows_per_shard, kMostSize, "rows_per_shard");
  within(call.node.pre_value_dim, kMostOfAnAxis, "pre_value_dim");
  within(call.node.value_dim, kMostOfAnAxis, "the size of a value");
}

void check_sizes(const TopkCall& call) {
  within(call.keys_per_side, kMostKeys, "the number of keys of a side");
  within(call.heads, kMostAlongY, "the number of heads");
  within(call.node.row_topk, call.keys_per_side, "row_topk");
  within(call.node.topk, kMostSize, "topk");
  product_of({call.keys_per_side, call.node.ranks}, "the number of scores of a side", kMostSize);
  product_of({call.node.cores, call.heads, call.node.ranks, call.node.ranks}, "the size of the cores", kMostSize);
}

template <typename Call>
const KernelRecord& chosen(const KernelPack& pack, const Call& call) {
  check_sizes(call);
  return pack.find(call.node, Driver::instance().compute_capability());
}

// How the hits of a token are shared among programs: LookupVariant.shares of umv2_export/gpu/variants.py.
struct Splits {
  const KernelRecord *lookup, *sum;
  int64_t count, share;
};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Nothing where one program a token and group is enough, or where the pack has no kernels for it.
std::optional<Splits> splits(const KernelPack& pack, const LookupCall& call) {
  const int64_t programs = product_of({call.tokens, call.groups}, "tokens and groups");
  if (programs == 0 || programs >= kSplitPrograms || call.hits == 0) return std::nullopt;
  const ComputeCapability device = Driver::instance().compute_capability();
  LookupTraits node = call.node;
  node.split = true;
  Splits found{pack.look_for(node, device), pack.look_for(SumTraits{node.scores, node.value_dim}, device), 0, 0};
  if (found.lookup == nullptr || found.sum == nullptr) return std::nullopt;
  const int64_t all = blocks(call.hits, found.lookup->block_k);
  found.share = found.lookup->block_k * blocks(all, std::min(blocks(kSplitPrograms, programs), all));
  found.count = blocks(call.hits, found.share);
  if (found.count == 1 || found.share > kMostSize) return std::nullopt;
  return found;
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
    sizes_.push_back(static_cast<int32_t>(within(value, kMostSize, what)));
    places_.push_back(&sizes_.back());
  }
  void** places() { return places_.data(); }

 private:
  std::vector<const void*> pointers_;
  std::vector<int32_t> sizes_;
  std::vector<void*> places_;
};

void enqueue(const KernelPack& pack, const KernelRecord& record, int64_t along_x, int64_t along_y, int64_t along_z,
             Stream stream, Arguments& arguments) {
  const Grid grid{static_cast<unsigned>(within(along_x, kMostAlongX, "the number of tokens")),
                  static_cast<unsigned>(along_y), static_cast<unsigned>(along_z)};
  Driver::instance().launch(loaded(pack, record), grid, static_cast<unsigned>(record.threads),
                            static_cast<unsigned>(record.shared_bytes), stream, arguments.places());
}

// Inputs, sizes, output; `share` of a lookup in splits.
void enqueue_lookup(const KernelPack& pack, const KernelRecord& record, const LookupCall& call, void* output,
                    const Splits* splits, Stream stream) {
  Arguments arguments(static_cast<size_t>(record.shards) + 12);
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
  arguments.size(call.table_rows, "the number of rows");
  arguments.size(call.rows_per_shard, "rows_per_shard");
  arguments.size(call.node.pre_value_dim, "pre_value_dim");
  arguments.size(call.node.value_dim, "the size of a value");
  if (splits != nullptr) arguments.size(splits->share, "the hits of a split");
  arguments.pointer(output);
  enqueue(pack, record, call.tokens, call.groups, splits == nullptr ? 1 : splits->count, stream, arguments);
}

void enqueue_sum(const KernelPack& pack, const Splits& splits, const LookupCall& call, Stream stream) {
  Arguments arguments(4);
  arguments.pointer(call.scratch);
  arguments.size(splits.count, "the number of splits");
  arguments.size(call.node.value_dim, "the size of a value");
  arguments.pointer(call.output);
  enqueue(pack, *splits.sum, call.tokens, call.groups, 1, stream, arguments);
}

}  // namespace

int64_t scratch_bytes(int64_t groups, int64_t value_dim) {
  // tokens * groups * splits < kSplitPrograms + tokens * groups, where tokens * groups < kSplitPrograms.
  if (groups >= kSplitPrograms) return 0;
  return product_of({2 * kSplitPrograms, value_dim, int64_t{sizeof(float)}}, "the size of the sums");
}

void prepare(const KernelPack& pack, const LookupCall& call) {
  loaded(pack, chosen(pack, call));
  if (const auto found = splits(pack, call)) {
    loaded(pack, *found->lookup);
    loaded(pack, *found->sum);
  }
}

void prepare(const KernelPack& pack, const TopkCall& call) { loaded(pack, chosen(pack, call)); }

void launch(const KernelPack& pack, const LookupCall& call, Stream stream) {
  if (call.tokens == 0) return;
  const KernelRecord& whole = chosen(pack, call);
  const auto found = call.scratch == nullptr ? std::nullopt : splits(pack, call);
  if (!found) return enqueue_lookup(pack, whole, call, call.output, nullptr, stream);
  enqueue_lookup(pack, *found->lookup, call, call.scratch, &*found, stream);
  enqueue_sum(pack, *found, call, stream);
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
  enqueue(pack, record, call.tokens, call.heads, 1, stream, arguments);
}

}  // namespace umv2::cuda
