#include "kernel_archive.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

#include "require.h"

#ifdef UMV2_KERNEL_ARCHIVE
// The file itself becomes part of the library, aligned so that the cubins in it are.
__asm__(
    ".section .rodata\n"
    ".balign 64\n"
    "umv2_kernel_archive_begin:\n"
    ".incbin \"" UMV2_KERNEL_ARCHIVE "\"\n"
    "umv2_kernel_archive_end:\n"
    ".byte 0\n"
    ".previous\n");
extern "C" const uint8_t umv2_kernel_archive_begin[], umv2_kernel_archive_end[];
#endif

namespace umv2::cuda {
namespace {

constexpr char kMagic[] = "UMV2KERN";
constexpr uint32_t kFormatVersion = 3;
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

std::ostream& operator<<(std::ostream& out, const LookupTraits& node) {
  return out << "MemoryLookup of " << name(node.scores) << " scores, " << name(node.rows) << " rows of " << node.pre_value_dim
             << " + " << node.value_dim << " in " << node.shards << " shards, " << node.cores << " cores"
             << (node.grouped ? ", groups" : "") << (node.gelu ? ", gelu" : "");
}

std::ostream& operator<<(std::ostream& out, const TopkTraits& node) {
  return out << "TuckerTopK of " << name(node.scores) << " scores, " << node.ranks << " ranks, " << node.cores
             << " cores, the top " << node.row_topk << " of a side and " << node.topk << " in all";
}

bool KernelRecord::runs_on(ComputeCapability device) const {
  if (major != device.major) return false;
  const bool alone = one_architecture || (device.major == kAlone.major && device.minor == kAlone.minor);
  return alone ? minor == device.minor : minor <= device.minor;
}

bool KernelRecord::serves(const LookupTraits& node) const {
  return op == kLookup && scores == node.scores && rows == node.rows && shards >= node.shards && cores == node.cores &&
         (grouped != 0) == node.grouped && (pre_values != 0) == node.pre_values && (gelu != 0) == node.gelu &&
         (split != 0) == node.split && node.pre_value_dim % divisor == 0 && node.value_dim % divisor == 0 &&
         (!node.pre_values || block_p >= node.pre_value_dim) && block_v >= node.value_dim;
}

bool KernelRecord::serves(const SumTraits& node) const {
  return op == kSum && scores == node.scores && block_v >= node.value_dim;
}

bool KernelRecord::serves(const TopkTraits& node) const {
  return op == kTopk && scores == node.scores && ranks == node.ranks && cores == node.cores && block_m >= node.row_topk &&
         block_k >= node.topk;
}

KernelArchive::KernelArchive(const uint8_t* bytes, size_t size, std::string source)
    : bytes_(bytes), source_(std::move(source)) {
  Header header;
  const auto require_whole = [&](bool holds) {
    require(holds, source_, " is not a whole file of kernels: write it again with `umv2-export kernels`");
  };
  require_whole(size >= sizeof header);
  std::memcpy(&header, bytes, sizeof header);
  require_whole(std::memcmp(header.magic, kMagic, sizeof header.magic) == 0);
  require(header.version == kFormatVersion, source_, " has format version ", header.version, ", this library reads ",
          kFormatVersion);
  require_whole(header.count <= (size - sizeof header) / sizeof(KernelRecord));
  records_.resize(header.count);
  if (header.count != 0) std::memcpy(records_.data(), bytes + sizeof header, header.count * sizeof(KernelRecord));
  for (const KernelRecord& record : records_) {
    require_whole(record.offset <= size && record.size <= size - record.offset && record.offset % kAlignment == 0);
    require_whole(std::memchr(record.entry, '\0', sizeof record.entry) != nullptr);
    require_whole(record.op != kLookup ||
                  (record.divisor > 0 && record.block_k > 0 && record.shards > 0 && record.shards <= kMostShards));
    require_whole(record.threads > 0 && record.threads <= 1024 && record.shared_bytes >= 0);
  }
}

template <typename Traits>
const KernelRecord* KernelArchive::look_for(const Traits& node, ComputeCapability device) const {
  const auto found = std::find_if(records_.begin(), records_.end(), [&](const KernelRecord& record) {
    return record.runs_on(device) && record.serves(node);
  });
  return found == records_.end() ? nullptr : &*found;
}

template const KernelRecord* KernelArchive::look_for(const LookupTraits& node, ComputeCapability device) const;
template const KernelRecord* KernelArchive::look_for(const SumTraits& node, ComputeCapability device) const;

template <typename Traits>
const KernelRecord& KernelArchive::find(const Traits& node, ComputeCapability device) const {
  const KernelRecord* const found = look_for(node, device);
  require(found != nullptr, source_, " holds no kernel for compute capability ", device.text(), " for a ", node,
          "; compile it: umv2-export kernels BUNDLE --compute-capability ", device.text(), " -o kernels");
  return *found;
}

template const KernelRecord& KernelArchive::find(const LookupTraits& node, ComputeCapability device) const;
template const KernelRecord& KernelArchive::find(const TopkTraits& node, ComputeCapability device) const;

const KernelArchive& kernel_archive() {
  struct File {
    std::vector<uint8_t> bytes;
    std::unique_ptr<KernelArchive> archive;
  };
  static std::mutex mutex;
  static std::map<std::string, File> files;
  if (const char* path = std::getenv("UMV2_GPU_KERNELS"); path != nullptr && *path != '\0') {
    const std::lock_guard<std::mutex> lock(mutex);
    File& file = files[path];
    if (file.archive == nullptr) {
      file.bytes = read_file(path);
      file.archive = std::make_unique<KernelArchive>(file.bytes.data(), file.bytes.size(), path);
    }
    return *file.archive;
  }
#ifdef UMV2_KERNEL_ARCHIVE
  static const KernelArchive built_in(umv2_kernel_archive_begin, umv2_kernel_archive_end - umv2_kernel_archive_begin,
                                      "this library");
  return built_in;
#else
  throw Error("no GPU kernels: let UMV2_GPU_KERNELS name the kernels.bin that `umv2-export kernels` wrote");
#endif
}

}  // namespace umv2::cuda
