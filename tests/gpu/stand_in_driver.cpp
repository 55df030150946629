// A stand-in for libcuda.so.1 on a machine without a GPU: it checks calls as the driver does, and computes our kernels on
// the processor, so that arguments in a wrong order, or of a wrong kind, give a wrong result.
//
// Environment:
//   STAND_IN_MAJOR, STAND_IN_MINOR   compute capability of the device; 8 and 9 if unset.
//   STAND_IN_DEVICES                 number of devices; 1 if unset. With 0, cuInit finds none.
//   STAND_IN_KERNELS                 file with what is fixed in each kernel, as stand_in.py writes it: launches need it.
//   STAND_IN_LOG                     file to which each launch appends a line of JSON; if unset, none is written.
//
// Device memory is memory of the process. Scores are fp32, rows fp32 or int8; a kernel of others is refused.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <algorithm>

namespace {

enum Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kInvalidPtx = 218,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kMisalignedAddress = 716,
  kNotSupported = 801,
};

struct ErrorText {
  Result result;
  const char *name, *text;
};

constexpr ErrorText kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {kInvalidPtx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kMisalignedAddress, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

constexpr int kMajorAttribute = 75, kMinorAttribute = 76, kMaxDynamicSharedBytes = 8;
constexpr unsigned kDefaultSharedBytes = 48 * 1024;

// What is fixed in a kernel; a line of STAND_IN_KERNELS.
struct Kernel {
  std::string op;
  unsigned threads = 0, shared_bytes = 0;
  int divisor = 1, shards = 0, cores = 0, ranks = 0;
  bool grouped = false, pre_values = false, int8_rows = false, gelu = false, split = false, computed = false;
};

struct Function {
  std::string entry;
  const Kernel* kernel;
  unsigned granted_bytes = kDefaultSharedBytes;
};

struct Module {
  std::set<std::string> entries;
  uint64_t digest;
  std::map<std::string, Function> functions;
};

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

bool initialized = false;
int primary_context = 0;  // Its address is the handle.
thread_local void* current_context = nullptr;
std::map<void*, std::unique_ptr<Module>> modules;

struct Block {
  std::unique_ptr<char[]> bytes;
  size_t size;
};
std::map<uint64_t, Block> memory;  // By address.

struct Stream {};
std::map<void*, std::unique_ptr<Stream>> streams;

Result failed_launch = kSuccess;
void (*pending_work)() = nullptr;

Result usable() {
  if (!initialized) return kNotInitialized;
  if (current_context == nullptr) return kInvalidContext;
  return kSuccess;
}

// The block that holds an address, or the end.
std::map<uint64_t, Block>::const_iterator block_of(uint64_t address) {
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return memory.end();
  const auto block = std::prev(after);
  return address < block->first + block->second.size ? block : memory.end();
}

Result copyable(uint64_t address, size_t size) {
  if (size == 0) return kSuccess;
  const auto block = block_of(address);
  if (block == memory.end() || address + size > block->first + block->second.size) return kInvalidValue;
  return kSuccess;
}

// FNV-1a.
uint64_t digest(const char* data, size_t size) {
  uint64_t value = 0xcbf29ce484222325u;
  for (size_t i = 0; i < size; ++i) value = (value ^ static_cast<unsigned char>(data[i])) * 0x100000001b3u;
  return value;
}

const std::map<uint64_t, Kernel>& known_kernels() {
  static const std::map<uint64_t, Kernel> kernels = [] {
    std::map<uint64_t, Kernel> read;
    const char* name = std::getenv("STAND_IN_KERNELS");
    std::ifstream file(name == nullptr ? "" : name);
    uint64_t key;
    Kernel kernel;
    while (file >> std::hex >> key >> std::dec >> kernel.op >> kernel.threads >> kernel.shared_bytes >> kernel.divisor >>
           kernel.shards >> kernel.cores >> kernel.ranks >> kernel.grouped >> kernel.pre_values >> kernel.int8_rows >>
           kernel.gelu >> kernel.split >> kernel.computed) {
      read[key] = kernel;
    }
    return read;
  }();
  return kernels;
}

template <typename T>
T at(const char* image, size_t offset) {
  T value;
  std::memcpy(&value, image + offset, sizeof value);
  return value;
}

// The entries of a cubin are its sections .text.NAME.
Result read_cubin(const char* image, Module& module) {
  constexpr int kCuda = 190;
  if (at<uint16_t>(image, 18) != kCuda) return kInvalidImage;
  const auto programs = at<uint64_t>(image, 32), sections = at<uint64_t>(image, 40);
  const auto program_size = at<uint16_t>(image, 54), program_count = at<uint16_t>(image, 56);
  const auto section_size = at<uint16_t>(image, 58), section_count = at<uint16_t>(image, 60);
  const auto names = at<uint64_t>(image, sections + section_size * at<uint16_t>(image, 62) + 24);
  const std::string prefix = ".text.";
  for (int s = 0; s < section_count; ++s) {
    const std::string name = image + names + at<uint32_t>(image, sections + section_size * static_cast<size_t>(s));
    if (name.rfind(prefix, 0) == 0) module.entries.insert(name.substr(prefix.size()));
  }
  module.digest = digest(image, std::max(programs + program_size * program_count, sections + section_size * section_count));
  // Since version 8 of the format, the architecture stands in the second byte of the flags.
  const auto flags = at<uint32_t>(image, 48);
  const int architecture = static_cast<int>(image[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff);
  const bool runs = architecture / 10 == from_environment("STAND_IN_MAJOR", 8) &&
                    architecture % 10 <= from_environment("STAND_IN_MINOR", 9);
  return module.entries.empty() ? kInvalidImage : runs ? kSuccess : kNoBinaryForGpu;
}

Result read_ptx(const char* image, Module& module) {
  const std::string text = image, entry = ".entry ", target = ".target sm_";
  if (text.find(".version ") == std::string::npos || text.find(target) == std::string::npos) return kInvalidImage;
  for (size_t place = text.find(entry); place != std::string::npos; place = text.find(entry, place)) {
    place += entry.size();
    module.entries.insert(text.substr(place, text.find_first_of("( \n", place) - place));
  }
  module.digest = digest(image, text.size());
  const char* number = image + text.find(target) + target.size();
  char* end = nullptr;
  const long architecture = std::strtol(number, &end, 10);
  const int device = 10 * from_environment("STAND_IN_MAJOR", 8) + from_environment("STAND_IN_MINOR", 9);
  // PTX for sm_90a and the like is for that architecture alone.
  return *end == 'a' ? (architecture == device ? kSuccess : kInvalidPtx) : architecture <= device ? kSuccess : kInvalidPtx;
}

// The arguments of a launch in order, read as the kernel reads them.
class Arguments {
 public:
  Arguments(void** places, int divisor) : places_(places), divisor_(divisor) {}

  template <typename T>
  T* pointer() {
    const auto address = *static_cast<const uint64_t*>(*places_++);
    values_.push_back(std::to_string(address));
    if (address == 0) result_ = kIllegalAddress;
    if (address % 16 != 0) result_ = kMisalignedAddress;
    return reinterpret_cast<T*>(address);
  }
  int64_t size() {
    const int32_t value = *static_cast<const int32_t*>(*places_++);
    values_.push_back(std::to_string(value));
    return value;
  }
  // The compiler took it to be a multiple.
  int64_t divided_size() {
    const int64_t value = size();
    if (value % divisor_ != 0) result_ = kMisalignedAddress;
    return value;
  }

  Result result() const { return result_; }
  std::string json() const {
    std::string text;
    for (const std::string& value : values_) text += (text.empty() ? "" : ", ") + value;
    return "[" + text + "]";
  }

 private:
  void** places_;
  int divisor_;
  Result result_ = kSuccess;
  std::vector<std::string> values_;
};

class Launch {
 public:
  virtual ~Launch() = default;
  virtual void compute(int64_t tokens, int64_t programs, int64_t splits) const = 0;
};

// See umv2_export/ops/memory_lookup.py.
class Lookup : public Launch {
 public:
  Lookup(const Kernel& kernel, Arguments& arguments) : kernel_(kernel) {
    indices_ = arguments.pointer<const int64_t>();
    scores_ = arguments.pointer<const float>();
    if (kernel.grouped) group_ = arguments.pointer<const int64_t>();
    if (kernel.pre_values) query_ = arguments.pointer<const float>();
    if (kernel.int8_rows) row_scales_ = arguments.pointer<const float>();
    for (int s = 0; s < kernel.shards; ++s) rows_.push_back(arguments.pointer<const void>());
    hits_ = share_ = arguments.size();
    table_rows_ = arguments.size();
    rows_per_shard_ = arguments.size();
    pre_value_dim_ = arguments.divided_size();
    value_dim_ = arguments.divided_size();
    if (kernel.split) share_ = arguments.size();
    output_ = arguments.pointer<float>();
  }

  void compute(int64_t tokens, int64_t groups, int64_t splits) const override {
    for (int64_t place = 0; place < tokens * groups * splits; ++place) {
      const int64_t s = place % splits, g = place / splits % groups, t = place / splits / groups;
      std::vector<double> sum(static_cast<size_t>(value_dim_));
      for (int64_t k = s * share_; k < std::min((s + 1) * share_, hits_); ++k) {
        const int64_t hit = t * hits_ + k;
        const bool there = indices_[hit] >= 0 && indices_[hit] < table_rows_;
        if (there && (group_ == nullptr || group_[hit] == g)) add(t, hit, sum);
      }
      for (int64_t v = 0; v < value_dim_; ++v) output_[place * value_dim_ + v] = static_cast<float>(sum[static_cast<size_t>(v)]);
    }
  }

 private:
  double element(int64_t row, int64_t column) const {
    const void* shard = rows_[static_cast<size_t>(row / rows_per_shard_)];
    const int64_t place = row % rows_per_shard_ * (pre_value_dim_ + value_dim_) + column;
    if (!kernel_.int8_rows) return static_cast<const float*>(shard)[place];
    return static_cast<const int8_t*>(shard)[place] * row_scales_[2 * row + (column < pre_value_dim_ ? 0 : 1)];
  }

  void add(int64_t token, int64_t hit, std::vector<double>& sum) const {
    const int64_t row = indices_[hit];
    double pre_score = 1;
    if (query_ != nullptr) {
      pre_score = 0;
      for (int64_t p = 0; p < pre_value_dim_; ++p) pre_score += element(row, p) * query_[token * pre_value_dim_ + p];
      if (kernel_.gelu) pre_score *= 0.5 * (1 + std::erf(pre_score / std::sqrt(2.0)));
    }
    const int64_t part = value_dim_ / kernel_.cores;
    for (int64_t v = 0; v < value_dim_; ++v) {
      sum[static_cast<size_t>(v)] +=
          scores_[hit * kernel_.cores + v / part] * pre_score * element(row, pre_value_dim_ + v);
    }
  }

  const Kernel& kernel_;
  const int64_t *indices_, *group_ = nullptr;
  const float *scores_, *query_ = nullptr, *row_scales_ = nullptr;
  std::vector<const void*> rows_;
  int64_t hits_, share_, table_rows_, rows_per_shard_, pre_value_dim_, value_dim_;
  float* output_;
};

// Adds the splits of a lookup.
class Sum : public Launch {
 public:
  explicit Sum(Arguments& arguments) {
    sums_ = arguments.pointer<const float>();
    splits_ = arguments.size();
    value_dim_ = arguments.size();
    output_ = arguments.pointer<float>();
  }

  void compute(int64_t tokens, int64_t groups, int64_t) const override {
    for (int64_t place = 0; place < tokens * groups; ++place) {
      for (int64_t v = 0; v < value_dim_; ++v) {
        double sum = 0;
        for (int64_t s = 0; s < splits_; ++s) sum += sums_[(place * splits_ + s) * value_dim_ + v];
        output_[place * value_dim_ + v] = static_cast<float>(sum);
      }
    }
  }

 private:
  const float* sums_;
  int64_t splits_, value_dim_;
  float* output_;
};

// See umv2_export/ops/tucker_topk.py.
class Topk : public Launch {
 public:
  Topk(const Kernel& kernel, Arguments& arguments) : ranks_(kernel.ranks), cores_count_(kernel.cores) {
    for (const float** input : {&row_scores_, &col_scores_, &u_, &v_, &cores_}) *input = arguments.pointer<const float>();
    keys_ = arguments.size();
    row_topk_ = arguments.size();
    topk_ = arguments.size();
    addresses_ = arguments.pointer<int64_t>();
    scores_ = arguments.pointer<float>();
  }

  void compute(int64_t tokens, int64_t heads, int64_t) const override {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h) retrieve(t * heads + h, h, heads);
    }
  }

 private:
  // Places of the highest scores; of equal ones the lower place wins.
  static std::vector<int64_t> best(const std::vector<double>& scores, int64_t count) {
    std::vector<int64_t> places(scores.size());
    for (size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int64_t>(i);
    std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) {
      return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)];
    });
    places.resize(static_cast<size_t>(count));
    return places;
  }

  std::vector<int64_t> best_keys(const float* side, const float* weights) const {
    std::vector<double> merged(static_cast<size_t>(keys_));
    for (int64_t n = 0; n < keys_; ++n) {
      for (int r = 0; r < ranks_; ++r) merged[static_cast<size_t>(n)] += side[n * ranks_ + r] * weights[r];
    }
    // In the order of their numbers, so that cells come in the order of their addresses.
    std::vector<int64_t> keys = best(merged, row_topk_);
    std::sort(keys.begin(), keys.end());
    return keys;
  }

  void retrieve(int64_t place, int64_t head, int64_t heads) const {
    const float* row_side = row_scores_ + place * keys_ * ranks_;
    const float* col_side = col_scores_ + place * keys_ * ranks_;
    const std::vector<int64_t> rows = best_keys(row_side, u_ + head * ranks_);
    const std::vector<int64_t> cols = best_keys(col_side, v_ + head * ranks_);
    const auto score = [&](int64_t c, int64_t row, int64_t col) {
      double sum = 0;
      for (int r = 0; r < ranks_; ++r) {
        for (int s = 0; s < ranks_; ++s) {
          sum += row_side[row * ranks_ + r] * cores_[((c * heads + head) * ranks_ + r) * ranks_ + s] *
                 col_side[col * ranks_ + s];
        }
      }
      return sum;
    };
    std::vector<double> totals;
    for (const int64_t row : rows) {
      for (const int64_t col : cols) {
        totals.push_back(0);
        for (int c = 0; c < cores_count_; ++c) totals.back() += score(c, row, col);
      }
    }
    int64_t output = place * topk_;
    for (const int64_t cell : best(totals, topk_)) {
      const int64_t row = rows[static_cast<size_t>(cell / row_topk_)], col = cols[static_cast<size_t>(cell % row_topk_)];
      addresses_[output] = row * keys_ + col;
      for (int c = 0; c < cores_count_; ++c) {
        scores_[output * cores_count_ + c] = static_cast<float>(score(c, row, col));
      }
      ++output;
    }
  }

  int ranks_, cores_count_;
  const float *row_scores_, *col_scores_, *u_, *v_, *cores_;
  int64_t keys_, row_topk_, topk_;
  int64_t* addresses_;
  float* scores_;
};

struct Dim {
  unsigned x, y, z;
};

void log_launch(const Function& function, Dim grid, Dim block, unsigned shared_bytes, void* stream,
                const Arguments& arguments) {
  const char* name = std::getenv("STAND_IN_LOG");
  if (name == nullptr) return;
  std::ostringstream line;
  line << "{\"entry\": \"" << function.entry << "\", \"grid\": [" << grid.x << ", " << grid.y << ", " << grid.z
       << "], \"block\": [" << block.x << ", " << block.y << ", " << block.z << "], \"shared\": " << shared_bytes
       << ", \"stream\": " << reinterpret_cast<uintptr_t>(stream) << ", \"arguments\": " << arguments.json() << "}\n";
  std::ofstream(name, std::ios::app) << line.str();
}

}  // namespace

extern "C" {

Result cuInit(unsigned flags) {
  if (flags != 0) return kInvalidValue;
  if (from_environment("STAND_IN_DEVICES", 1) == 0) return kNoDevice;
  initialized = true;
  return kSuccess;
}

Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

Result cuGetErrorName(Result result, const char** name) {
  for (const ErrorText& error : kErrors) {
    if (error.result == result) return *name = error.name, kSuccess;
  }
  return *name = nullptr, kInvalidValue;
}

Result cuGetErrorString(Result result, const char** text) {
  for (const ErrorText& error : kErrors) {
    if (error.result == result) return *text = error.text, kSuccess;
  }
  return *text = nullptr, kInvalidValue;
}

Result cuDeviceGetCount(int* count) {
  if (!initialized) return kNotInitialized;
  *count = from_environment("STAND_IN_DEVICES", 1);
  return kSuccess;
}

Result cuDeviceGet(int* device, int number) {
  if (!initialized) return kNotInitialized;
  if (number < 0 || number >= from_environment("STAND_IN_DEVICES", 1)) return kInvalidDevice;
  *device = number;
  return kSuccess;
}

Result cuDeviceGetName(char* name, int size, int device) {
  if (!initialized) return kNotInitialized;
  if (device != 0) return kInvalidDevice;
  std::snprintf(name, static_cast<size_t>(size), "stand-in");
  return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (!initialized) return kNotInitialized;
  if (device != 0) return kInvalidDevice;
  if (attribute != kMajorAttribute && attribute != kMinorAttribute) return kInvalidValue;
  *value = attribute == kMajorAttribute ? from_environment("STAND_IN_MAJOR", 8) : from_environment("STAND_IN_MINOR", 9);
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(void** context, int device) {
  if (!initialized) return kNotInitialized;
  if (device != 0) return kInvalidDevice;
  *context = &primary_context;
  return kSuccess;
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
  if (!initialized) return kNotInitialized;
  return device == 0 ? kSuccess : kInvalidDevice;
}

Result cuCtxSetCurrent(void* context) {
  if (!initialized) return kNotInitialized;
  if (context != nullptr && context != &primary_context) return kInvalidContext;
  current_context = context;
  return kSuccess;
}

Result cuCtxGetCurrent(void** context) {
  if (!initialized) return kNotInitialized;
  *context = current_context;
  return kSuccess;
}

Result cuCtxGetDevice(int* device) {
  if (const Result result = usable()) return result;
  *device = 0;
  return kSuccess;
}

// A launch that failed is told of here, and from then on by every call, as a broken context does.
Result cuCtxSynchronize() {
  if (const Result result = usable()) return result;
  if (auto* work = std::exchange(pending_work, nullptr)) work();
  return failed_launch;
}

// Of the stand-in alone: work that a library has put on a stream, and that is done once it is waited for.
void stand_in_defer(void (*work)()) { pending_work = work; }

Result cuStreamCreate(void** stream, unsigned flags) {
  if (const Result result = usable()) return result;
  if (flags > 1) return kInvalidValue;
  auto made = std::make_unique<Stream>();
  *stream = made.get();
  streams[*stream] = std::move(made);
  return kSuccess;
}

Result cuStreamDestroy_v2(void* stream) {
  if (const Result result = usable()) return result;
  return streams.erase(stream) == 1 ? kSuccess : kInvalidHandle;
}

Result cuStreamGetFlags(void* stream, unsigned* flags) {
  if (const Result result = usable()) return result;
  if (streams.count(stream) == 0) return kInvalidHandle;
  *flags = 0;
  return kSuccess;
}

Result cuStreamSynchronize(void*) { return cuCtxSynchronize(); }

Result cuModuleLoadData(void** handle, const void* data) {
  if (const Result result = usable()) return result;
  const char* image = static_cast<const char*>(data);
  auto module = std::make_unique<Module>();
  const bool is_elf = std::memcmp(image, "\x7f" "ELF", 4) == 0;
  if (const Result result = is_elf ? read_cubin(image, *module) : read_ptx(image, *module)) return result;
  *handle = module.get();
  modules[*handle] = std::move(module);
  return kSuccess;
}

Result cuModuleUnload(void* handle) {
  if (const Result result = usable()) return result;
  return modules.erase(handle) == 1 ? kSuccess : kInvalidHandle;
}

Result cuModuleGetFunction(void** handle, void* module_handle, const char* name) {
  if (const Result result = usable()) return result;
  const auto found = modules.find(module_handle);
  if (found == modules.end()) return kInvalidHandle;
  Module& module = *found->second;
  if (module.entries.count(name) == 0) return kNotFound;
  const auto kernel = known_kernels().find(module.digest);
  Function function{name, kernel == known_kernels().end() ? nullptr : &kernel->second};
  *handle = &module.functions.emplace(name, function).first->second;
  return kSuccess;
}

Result cuFuncSetAttribute(void* handle, int attribute, int value) {
  if (const Result result = usable()) return result;
  if (attribute != kMaxDynamicSharedBytes || value < 0) return kInvalidValue;
  static_cast<Function*>(handle)->granted_bytes = static_cast<unsigned>(value);
  return kSuccess;
}

Result cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared_bytes, void* stream, void** places, void** extra) {
  if (const Result result = usable()) return result;
  const Function& function = *static_cast<Function*>(handle);
  if (function.kernel == nullptr) {
    std::fprintf(stderr, "stand-in: %s is not a kernel of STAND_IN_KERNELS\n", function.entry.c_str());
    return kNotSupported;
  }
  const Kernel& kernel = *function.kernel;
  if (!kernel.computed) {
    std::fprintf(stderr, "stand-in: %s is not of dtypes that are computed\n", function.entry.c_str());
    return kNotSupported;
  }
  const Dim grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
  const bool has_programs = grid.x > 0 && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                            grid.z <= (kernel.split ? 65535 : 1);
  const bool has_threads = block.x == kernel.threads && block.y == 1 && block.z == 1;
  const bool has_memory = shared_bytes >= kernel.shared_bytes && shared_bytes <= function.granted_bytes;
  if (!has_programs || !has_threads || !has_memory || places == nullptr || extra != nullptr) return kInvalidValue;
  Arguments arguments(places, kernel.divisor);
  std::unique_ptr<Launch> launch;
  if (kernel.op == "MemoryLookup") {
    launch = std::make_unique<Lookup>(kernel, arguments);
  } else if (kernel.op == "MemoryLookupSum") {
    launch = std::make_unique<Sum>(arguments);
  } else {
    launch = std::make_unique<Topk>(kernel, arguments);
  }
  log_launch(function, grid, block, shared_bytes, stream, arguments);
  if (arguments.result() != kSuccess) {
    failed_launch = arguments.result();
  } else {
    launch->compute(grid.x, grid.y, grid.z);
  }
  return kSuccess;
}

// Aligned as the driver does.
Result cuMemAlloc_v2(uint64_t* address, size_t size) {
  if (const Result result = usable()) return result;
  if (size == 0) return kInvalidValue;
  constexpr uint64_t kAlignment = 256;
  auto block = std::make_unique<char[]>(size + kAlignment);
  *address = (reinterpret_cast<uint64_t>(block.get()) + kAlignment - 1) / kAlignment * kAlignment;
  memory[*address] = Block{std::move(block), size};
  return kSuccess;
}

Result cuMemFree_v2(uint64_t address) {
  if (const Result result = usable()) return result;
  return memory.erase(address) == 1 ? kSuccess : kInvalidValue;
}

Result cuMemGetAddressRange_v2(uint64_t* base, size_t* size, uint64_t address) {
  if (const Result result = usable()) return result;
  const auto block = block_of(address);
  if (block == memory.end()) return kNotFound;
  *base = block->first;
  *size = block->second.size;
  return kSuccess;
}

Result cuMemcpyHtoD_v2(uint64_t address, const void* source, size_t size) {
  if (const Result result = usable()) return result;
  if (const Result result = copyable(address, size)) return result;
  std::memcpy(reinterpret_cast<void*>(address), source, size);
  return kSuccess;
}

Result cuMemcpyDtoH_v2(void* target, uint64_t address, size_t size) {
  if (const Result result = usable()) return result;
  if (failed_launch != kSuccess) return failed_launch;
  if (const Result result = copyable(address, size)) return result;
  std::memcpy(target, reinterpret_cast<const void*>(address), size);
  return kSuccess;
}

}  // extern "C"
