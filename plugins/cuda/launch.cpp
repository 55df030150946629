#include "launch.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "checked.h"
#include "require.h"

namespace umv2::cuda {
namespace {

// The driver's bounds of a grid.
constexpr int64_t kMostAlongX = std::numeric_limits<int32_t>::max(), kMostAlongY = 65535;

// Of a side: a pair of them has 31 bits beside its score.
constexpr int64_t kMostKeys = 46340;

constexpr uintptr_t kAlignment = 16;

constexpr int64_t kMostSize = std::numeric_limits<int32_t>::max();

// As umv2_export/gpu/lookup_variants.py has it: programs from which a lookup is not split.
constexpr int64_t kSplitPrograms = 528;

// Modules stay loaded: nodes of one kind share them.
Function loaded(const KernelArchive& archive, const KernelRecord& record) {
  static std::mutex mutex;
  static std::map<std::pair<Context, const KernelRecord*>, Function> functions;
  const Driver& driver = Driver::instance();
  const Context context = driver.current_context();
  const std::lock_guard<std::mutex> lock(mutex);
  Function& function = functions[{context, &record}];
  if (function == nullptr) {
    function = driver.function(driver.load(archive.cubin(record)), record.entry, record.shared_bytes);
  }
  return function;
}

int64_t bounded(int64_t value, int64_t most, const char* what) {
  require(within(value, 0, most), what, " is ", value, ", kernels take up to ", most);
  return value;
}

// Kernels compute with sizes in 32 bits: what they multiply is checked here.
void check_sizes(const LookupCall& call) {
  bounded(call.groups, kMostAlongY, "the number of groups");
  bounded(call.hits, kMostSize, "the number of hits");
  bounded(call.table_rows, kMostSize, "the number of rows");
  bounded(call.rows_per_shard, kMostSize, "rows_per_shard");
  bounded(call.node.pre_value_dim, kMostOfAnAxis, "pre_value_dim");
  bounded(call.node.value_dim, kMostOfAnAxis, "the size of a value");
}

void check_sizes(const TopkCall& call) {
  bounded(call.keys_per_side, kMostKeys, "the number of keys of a side");
  bounded(call.heads, kMostAlongY, "the number of heads");
  bounded(call.node.row_topk, call.keys_per_side, "row_topk");
  bounded(call.node.topk, kMostSize, "topk");
  product_of({call.keys_per_side, call.node.ranks}, "the number of scores of a side", kMostSize);
  product_of({call.node.cores, call.heads, call.node.ranks, call.node.ranks}, "the size of the cores", kMostSize);
}

template <typename Call>
const KernelRecord& chosen(const KernelArchive& archive, const Call& call) {
  check_sizes(call);
  return archive.find(call.node, Driver::instance().compute_capability());
}

// How the hits of a token are shared among programs: LookupVariant.shares of umv2_export/gpu/lookup_variants.py.
struct Splits {
  const KernelRecord *lookup, *sum;
  int64_t count, share;
};

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Nothing where one program a token and group is enough, or where the archive has no kernels for it.
std::optional<Splits> splits(const KernelArchive& archive, const LookupCall& call) {
  const int64_t programs = product_of({call.tokens, call.groups}, "tokens and groups");
  if (programs == 0 || programs >= kSplitPrograms || call.hits == 0) return std::nullopt;
  const ComputeCapability device = Driver::instance().compute_capability();
  LookupTraits node = call.node;
  node.split = true;
  Splits found{archive.look_for(node, device), archive.look_for(SumTraits{node.scores, node.value_dim}, device), 0, 0};
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
    require(reinterpret_cast<uintptr_t>(address) % kAlignment == 0, "a tensor does not start at 16 bytes");
    pointers_.push_back(address);
    places_.push_back(&pointers_.back());
  }
  void size(int64_t value, const char* what) {
    sizes_.push_back(static_cast<int32_t>(bounded(value, kMostSize, what)));
    places_.push_back(&sizes_.back());
  }
  void** places() { return places_.data(); }

 private:
  std::vector<const void*> pointers_;
  std::vector<int32_t> sizes_;
  std::vector<void*> places_;
};

void enqueue(const KernelArchive& archive, const KernelRecord& record, int64_t along_x, int64_t along_y,
             int64_t along_z, Stream stream, Arguments& arguments) {
  const Grid grid{static_cast<unsigned>(bounded(along_x, kMostAlongX, "the number of tokens")),
                  static_cast<unsigned>(along_y), static_cast<unsigned>(along_z)};
  Driver::instance().launch(loaded(archive, record), grid, static_cast<unsigned>(record.threads),
                            static_cast<unsigned>(record.shared_bytes), stream, arguments.places());
}

// Inputs, sizes, output; `share` of a lookup in splits.
void enqueue_lookup(const KernelArchive& archive, const KernelRecord& record, const LookupCall& call, void* output,
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
  enqueue(archive, record, call.tokens, call.groups, splits == nullptr ? 1 : splits->count, stream, arguments);
}

void enqueue_sum(const KernelArchive& archive, const Splits& splits, const LookupCall& call, Stream stream) {
  Arguments arguments(4);
  arguments.pointer(call.scratch);
  arguments.size(splits.count, "the number of splits");
  arguments.size(call.node.value_dim, "the size of a value");
  arguments.pointer(call.output);
  enqueue(archive, *splits.sum, call.tokens, call.groups, 1, stream, arguments);
}

}  // namespace

int64_t most_scratch_bytes(int64_t groups, int64_t value_dim) {
  // tokens * groups * splits < kSplitPrograms + tokens * groups, where tokens * groups < kSplitPrograms.
  if (groups >= kSplitPrograms) return 0;
  return product_of({2 * kSplitPrograms, value_dim, int64_t{sizeof(float)}}, "the size of the sums");
}

int64_t scratch_bytes(const KernelArchive& archive, const LookupCall& call) {
  check_sizes(call);
  const auto found = splits(archive, call);
  if (!found) return 0;
  return product_of({call.tokens, call.groups, found->count, call.node.value_dim, int64_t{sizeof(float)}},
                    "the size of the sums");
}

void prepare(const KernelArchive& archive, const LookupCall& call) {
  loaded(archive, chosen(archive, call));
  if (const auto found = splits(archive, call)) {
    loaded(archive, *found->lookup);
    loaded(archive, *found->sum);
  }
}

void prepare(const KernelArchive& archive, const TopkCall& call) { loaded(archive, chosen(archive, call)); }

void launch(const KernelArchive& archive, const LookupCall& call, Stream stream) {
  if (call.tokens == 0) return;
  const KernelRecord& whole = chosen(archive, call);
  const auto found = call.scratch == nullptr ? std::nullopt : splits(archive, call);
  if (!found) return enqueue_lookup(archive, whole, call, call.output, nullptr, stream);
  enqueue_lookup(archive, *found->lookup, call, call.scratch, &*found, stream);
  enqueue_sum(archive, *found, call, stream);
}

void launch(const KernelArchive& archive, const TopkCall& call, Stream stream) {
  // The driver refuses a grid of no programs.
  if (call.tokens == 0 || call.heads == 0) return;
  const KernelRecord& record = chosen(archive, call);
  Arguments arguments(10);
  for (const void* input : {call.row_scores, call.col_scores, call.u, call.v, call.cores}) arguments.pointer(input);
  arguments.size(call.keys_per_side, "the number of keys of a side");
  arguments.size(call.node.row_topk, "row_topk");
  arguments.size(call.node.topk, "topk");
  arguments.pointer(call.addresses);
  arguments.pointer(call.scores);
  enqueue(archive, record, call.tokens, call.heads, 1, stream, arguments);
}

}  // namespace umv2::cuda
