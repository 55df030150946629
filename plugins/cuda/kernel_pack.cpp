#include "kernel_pack.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <tuple>

#ifdef UMV2_KERNEL_PACK
// The file itself becomes part of the library, aligned so that the cubins in it are.
__asm__(
    ".section .rodata\n"
    ".balign 64\n"
    "umv2_kernel_pack_begin:\n"
    ".incbin \"" UMV2_KERNEL_PACK "\"\n"
    "umv2_kernel_pack_end:\n"
    ".byte 0\n"
    ".previous\n");
extern "C" const uint8_t umv2_kernel_pack_begin[], umv2_kernel_pack_end[];
#endif

namespace umv2::cuda {
namespace {

constexpr char kMagic[] = "UMV2KERN";
constexpr uint32_t kFormatVersion = 2;
constexpr int32_t kLookup = 0, kTopk = 1, kSum = 2;

// As many as an export cuts a table into.
constexpr int32_t kMostShards = 1024;

// What the driver asks of code in memory.
constexpr uint64_t kAlignment = 8;

// Orin: code for desktop GPUs of the same major version does not run there.
constexpr ComputeCapability kAlone{8, 7};

struct Header {
  char magic[8];
  uint32_t version, count;
};

const char* name(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "fp32";
    case ElementType::kFloat16:
      return "fp16";
    case ElementType::kBFloat16:
      return "bf16";
    case ElementType::kInt8:
      return "int8";
    default:
      return "none";
  }
}

std::ostream& operator<<(std::ostream& out, const LookupTraits& node) {
  return out << "MemoryLookup of " << name(node.scores) << " scores, " << name(node.rows) << " rows of " << node.pre_value_dim
             << " + " << node.value_dim << " in " << node.shards << " shards, " << node.cores << " cores"
             << (node.grouped ? ", groups" : "") << (node.gelu ? ", gelu" : "");
}

std::ostream& operator<<(std::ostream& out, const TopkTraits& node) {
  return out << "TuckerTopK of " << name(node.scores) << " scores, " << node.ranks << " ranks, " << node.cores
             << " cores, the top " << node.row_topk << " of a side and " << node.topk << " in all";
}

// What is smaller fits a node closer; code for the device's own architecture comes first.
auto waste(const KernelRecord& record, ComputeCapability device) {
  return std::make_tuple(device.minor - record.minor, record.shards, record.block_v, record.block_p, record.block_m,
                         record.block_k, -record.divisor);
}

std::vector<uint8_t> read_file(const std::string& path) {
  try {
    std::ifstream file(path, std::ios::binary);
    file.exceptions(std::ios::failbit | std::ios::badbit);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  } catch (const std::exception&) {  // a folder opens, and fails when it is read
    throw Error("UMV2_GPU_KERNELS names " + path + ", which cannot be read: let it name a kernels.bin");
  }
}

}  // namespace

bool KernelRecord::runs_on(ComputeCapability device) const {
  if (major != device.major) return false;
  const bool alone = one_architecture || (device.major == kAlone.major && device.minor == kAlone.minor);
  return alone ? minor == device.minor : minor <= device.minor;
}

bool KernelRecord::serves(const LookupTraits& node) const {
  return op == kLookup && scores == node.scores && rows == node.rows && shards >= node.shards && cores == node.cores &&
         (grouped != 0) == node.grouped && (pre_values != 0) == node.pre_values && (gelu != 0) == node.gelu && (split != 0) == node.split &&
         node.pre_value_dim % divisor == 0 && node.value_dim % divisor == 0 &&
         (!node.pre_values || block_p >= node.pre_value_dim) && block_v >= node.value_dim;
}

bool KernelRecord::serves(const SumTraits& node) const {
  return op == kSum && scores == node.scores && block_v >= node.value_dim;
}

bool KernelRecord::serves(const TopkTraits& node) const {
  return op == kTopk && scores == node.scores && ranks == node.ranks && cores == node.cores && block_m >= node.row_topk &&
         block_k >= node.topk;
}

KernelPack::KernelPack(const uint8_t* bytes, size_t size, std::string source) : bytes_(bytes), source_(std::move(source)) {
  Header header;
  const auto require = [&](bool holds) {
    if (!holds) throw Error(source_ + " is no whole file of kernels: write it again with `umv2-export kernels`");
  };
  require(size >= sizeof header);
  std::memcpy(&header, bytes, sizeof header);
  require(std::memcmp(header.magic, kMagic, sizeof header.magic) == 0);
  if (header.version != kFormatVersion) {
    throw Error(source_ + " has format version " + std::to_string(header.version) + ", this library reads " +
                std::to_string(kFormatVersion));
  }
  require(header.count <= (size - sizeof header) / sizeof(KernelRecord));
  records_.resize(header.count);
  if (header.count != 0) std::memcpy(records_.data(), bytes + sizeof header, header.count * sizeof(KernelRecord));
  for (const KernelRecord& record : records_) {
    require(record.offset <= size && record.size <= size - record.offset && record.offset % kAlignment == 0);
    require(std::memchr(record.entry, '\0', sizeof record.entry) != nullptr);
    require(record.op != kLookup ||
            (record.divisor > 0 && record.block_k > 0 && record.shards > 0 && record.shards <= kMostShards));
    require(record.threads > 0 && record.threads <= 1024 && record.shared_bytes >= 0);
  }
}

template <typename Traits>
const KernelRecord* KernelPack::closest(const Traits& node, ComputeCapability device) const {
  const KernelRecord* found = nullptr;
  for (const KernelRecord& record : records_) {
    if (!record.runs_on(device) || !record.serves(node)) continue;
    if (found == nullptr || waste(record, device) < waste(*found, device)) found = &record;
  }
  return found;
}

template const KernelRecord* KernelPack::closest(const LookupTraits& node, ComputeCapability device) const;
template const KernelRecord* KernelPack::closest(const SumTraits& node, ComputeCapability device) const;

template <typename Traits>
const KernelRecord& KernelPack::best(const Traits& node, ComputeCapability device) const {
  if (const KernelRecord* const found = closest(node, device)) return *found;
  std::ostringstream message;
  message << source_ << " holds no kernel for compute capability " << device.text() << " for a " << node
          << "; compile it: umv2-export kernels BUNDLE --compute-capability " << device.text() << " -o kernels";
  throw Error(message.str());
}

const KernelRecord& KernelPack::find(const LookupTraits& node, ComputeCapability device) const { return best(node, device); }
const KernelRecord& KernelPack::find(const TopkTraits& node, ComputeCapability device) const { return best(node, device); }

const KernelPack& kernel_pack() {
  struct File {
    std::vector<uint8_t> bytes;
    std::unique_ptr<KernelPack> pack;
  };
  static std::mutex mutex;
  static std::map<std::string, File> files;
  if (const char* path = std::getenv("UMV2_GPU_KERNELS"); path != nullptr && *path != '\0') {
    const std::lock_guard<std::mutex> lock(mutex);
    File& file = files[path];
    if (file.pack == nullptr) {
      file.bytes = read_file(path);
      file.pack = std::make_unique<KernelPack>(file.bytes.data(), file.bytes.size(), path);
    }
    return *file.pack;
  }
#ifdef UMV2_KERNEL_PACK
  static const KernelPack built_in(umv2_kernel_pack_begin, umv2_kernel_pack_end - umv2_kernel_pack_begin, "this library");
  return built_in;
#else
  throw Error("no GPU kernels: let UMV2_GPU_KERNELS name the kernels.bin that `umv2-export kernels` wrote");
#endif
}

}  // namespace umv2::cuda
