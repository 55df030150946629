#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <sstream>
#include <utility>

#include "simd.h"

namespace umv2::test {
namespace {

using nvinfer1::DataType;
using namespace UMV2_TARGET;

// What the kernels may lose: sums in fp32 (relative to the sum of the absolute terms), and the rounding of an output.
constexpr double kSumError = 1e-5;

double rounding(DataType type) {
  return type == DataType::kHALF ? 0x1p-11 : type == DataType::kBF16 ? 0x1p-8 : 0x1p-24;
}

size_t element_size(DataType type) {
  switch (type) {
    case DataType::kINT64:
      return 8;
    case DataType::kFLOAT:
      return 4;
    case DataType::kINT8:
      return 1;
    default:
      return 2;
  }
}

const char* torch_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    default:
      return "int8";
  }
}

template <typename T>
void put(std::vector<uint8_t>& bytes, T value) {
  const auto* const first = reinterpret_cast<const uint8_t*>(&value);
  bytes.insert(bytes.end(), first, first + sizeof value);
}

template <typename T>
T get(const std::vector<uint8_t>& bytes, size_t element) {
  T value;
  std::memcpy(&value, bytes.data() + element * sizeof value, sizeof value);
  return value;
}

// Of a number that bf16 holds exactly.
BFloat16 upper_half(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}

Tensor make(DataType type, std::vector<int64_t> sizes, const std::function<double()>& next) {
  Tensor tensor{type, std::move(sizes), {}, {}};
  int64_t count = 1;
  for (const int64_t size : tensor.sizes) count *= size;
  for (int64_t i = 0; i < count; ++i) {
    const double value = next();
    tensor.values.push_back(value);
    switch (type) {
      case DataType::kFLOAT:
        put(tensor.bytes, static_cast<float>(value));
        break;
      case DataType::kHALF:
        put(tensor.bytes, to_half(static_cast<float>(value)));
        break;
      case DataType::kBF16:
        put(tensor.bytes, upper_half(static_cast<float>(value)));
        break;
      case DataType::kINT8:
        put(tensor.bytes, static_cast<int8_t>(value));
        break;
      default:
        put(tensor.bytes, static_cast<int64_t>(value));
    }
  }
  return tensor;
}

// Numbers of 7 bits, which every floating type holds exactly; the same in every run.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t below(int64_t end) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end)); }
  double number() { return static_cast<double>(below(255) - 127) / 64; }

 private:
  std::mt19937 engine_;
};

// Keeps the largest error in units of `allowed`; says what is wrong with the first that is beyond.
class Comparison {
 public:
  Comparison(std::string what, DataType type, double& error) : what_(std::move(what)), type_(type), error_(error) {}

  // `magnitude`: sum of the absolute terms of `expected`.
  void add(double found, double expected, double magnitude) {
    const double allowed = kSumError * magnitude + rounding(type_) * std::fabs(expected) + 1e-30;
    const double error = std::fabs(found - expected) / allowed;
    error_ = std::max(error_, error);
    if (!(error <= 1) && wrong_.empty()) {
      std::ostringstream text;
      text << what_ << " element " << place_ << " is " << found << " instead of " << expected << ", allowed are "
           << allowed;
      wrong_ = text.str();
    }
    ++place_;
  }

  const std::string& wrong() const { return wrong_; }

 private:
  std::string what_, wrong_;
  DataType type_;
  double& error_;
  int64_t place_ = 0;
};

// See umv2_export/ops/memory_lookup.py.
class Lookup final : public Case {
 public:
  DataType scores, rows;
  int64_t tokens, hits, cores, groups, pre_value_dim, value_dim, shards, rows_per_shard;
  bool gelu;

  Lookup(const char* label, DataType scores_type, DataType rows_type, int64_t p, int64_t v, int64_t c)
      : scores(scores_type),
        rows(rows_type),
        tokens(3),
        hits(40),
        cores(c),
        groups(1),
        pre_value_dim(p),
        value_dim(v),
        shards(1),
        rows_per_shard(50),
        gelu(false) {
    name = label;
  }

  const char* op() const override { return "MemoryLookup"; }

  void add_attributes(Attributes& attributes) const override {
    attributes.int32("pre_value_dim", static_cast<int32_t>(pre_value_dim))
        .text("activation", gelu ? "gelu" : "none")
        .int32("rows_per_shard", static_cast<int32_t>(rows_per_shard))
        .int32("groups", static_cast<int32_t>(groups));
  }

  std::string json() const override {
    std::ostringstream text;
    text << std::boolalpha << R"("scores_dtype": ")" << torch_name(scores) << R"(", "rows_dtype": ")"
         << torch_name(rows) << R"(", "shards": )" << shards << R"(, "cores": )" << cores << R"(, "grouped": )"
         << (groups > 1) << R"(, "pre_value_dim": )" << pre_value_dim << R"(, "value_dim": )" << value_dim
         << R"(, "gelu": )" << gelu;
    return text.str();
  }

  std::vector<Tensor> inputs() const override {
    Random random(1);
    const auto number = [&] { return random.number(); };
    std::vector<Tensor> made;
    made.push_back(make(DataType::kINT64, {tokens, hits}, [&] { return static_cast<double>(random.below(count())); }));
    made.push_back(make(scores, {tokens, hits, cores}, number));
    if (groups > 1) {
      made.push_back(make(DataType::kINT64, {tokens, hits}, [&] { return static_cast<double>(random.below(groups)); }));
    }
    if (pre_value_dim > 0) made.push_back(make(scores, {tokens, pre_value_dim}, number));
    if (quantised()) {
      made.push_back(
          make(DataType::kFLOAT, {count(), 2}, [&] { return static_cast<double>(1 + random.below(127)) / 8192; }));
    }
    for (int64_t s = 0; s < shards; ++s) {
      const auto element = [&] { return quantised() ? static_cast<double>(random.below(256) - 128) : random.number(); };
      made.push_back(make(rows, {s + 1 < shards ? rows_per_shard : last_shard(), pre_value_dim + value_dim}, element));
    }
    return made;
  }

  std::string difference(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                         double& error) const override {
    Comparison comparison("output", scores, error);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t v = 0; v < value_dim; ++v) {
          double magnitude = 0;
          const double expected = sum(inputs, t, g, v, magnitude);
          comparison.add(outputs[0].values[static_cast<size_t>((t * groups + g) * value_dim + v)], expected, magnitude);
        }
      }
    }
    return comparison.wrong();
  }

 private:
  bool quantised() const { return rows == DataType::kINT8; }
  // The last shard is shorter than the others.
  int64_t last_shard() const { return shards > 1 ? rows_per_shard - 1 : rows_per_shard; }
  int64_t count() const { return (shards - 1) * rows_per_shard + last_shard(); }

  double element(const std::vector<Tensor>& inputs, int64_t row, int64_t column) const {
    const size_t first = inputs.size() - static_cast<size_t>(shards);
    const Tensor& shard = inputs[first + static_cast<size_t>(row / rows_per_shard)];
    const double stored = shard.values[static_cast<size_t>(row % rows_per_shard * shard.sizes[1] + column)];
    return quantised() ? stored * inputs[first - 1].values[static_cast<size_t>(2 * row + (column >= pre_value_dim))]
                       : stored;
  }

  // Element v of the sum of group g, and of its absolute terms.
  double sum(const std::vector<Tensor>& inputs, int64_t t, int64_t g, int64_t v, double& magnitude) const {
    double total = 0;
    for (int64_t k = 0; k < hits; ++k) {
      const auto hit = static_cast<size_t>(t * hits + k);
      if (groups > 1 && static_cast<int64_t>(inputs[2].values[hit]) != g) continue;
      const auto row = static_cast<int64_t>(inputs[0].values[hit]);
      double pre_score = pre_value_dim > 0 ? 0 : 1, pre_magnitude = pre_score;
      for (int64_t p = 0; p < pre_value_dim; ++p) {
        const Tensor& query = inputs[groups > 1 ? 3 : 2];
        const double term = element(inputs, row, p) * query.values[static_cast<size_t>(t * pre_value_dim + p)];
        pre_score += term;
        pre_magnitude += std::fabs(term);
      }
      // GELU grows by at most 1.13 times its argument.
      if (gelu) pre_score *= 0.5 * (1 + std::erf(pre_score / std::sqrt(2.0)));
      const int64_t part = v / (value_dim / cores);
      const double score = inputs[1].values[hit * static_cast<size_t>(cores) + static_cast<size_t>(part)];
      const double value = element(inputs, row, pre_value_dim + v);
      total += score * pre_score * value;
      magnitude += std::fabs(score * value) * 1.13 * pre_magnitude;
    }
    return total;
  }
};

// See umv2_export/ops/tucker_topk.py.
class Topk final : public Case {
 public:
  DataType scores;
  int64_t tokens, heads, keys, ranks, cores, row_topk, topk;

  Topk(const char* label, DataType scores_type, int64_t c)
      : scores(scores_type), tokens(3), heads(2), keys(50), ranks(2), cores(c), row_topk(8), topk(9) {
    name = label;
  }

  const char* op() const override { return "TuckerTopK"; }

  void add_attributes(Attributes& attributes) const override {
    attributes.int32("row_topk", static_cast<int32_t>(row_topk)).int32("topk", static_cast<int32_t>(topk));
  }

  std::string json() const override {
    std::ostringstream text;
    text << R"("scores_dtype": ")" << torch_name(scores) << R"(", "ranks": )" << ranks << R"(, "cores": )" << cores
         << R"(, "row_topk": )" << row_topk << R"(, "topk": )" << topk;
    return text.str();
  }

  std::vector<Tensor> inputs() const override {
    Random random(2);
    std::vector<Tensor> made;
    const std::vector<int64_t> side{tokens, heads, keys, ranks}, vector{heads, ranks},
        matrices{cores, heads, ranks, ranks};
    for (const auto& sizes : {side, side, vector, vector, matrices}) {
      made.push_back(make(scores, sizes, [&] { return random.number(); }));
    }
    return made;
  }

  // Hits come in any order, and of equal totals any may be a hit: addresses must differ, scores be those of the
  // addresses, and totals, sorted, be the highest.
  std::string difference(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                         double& error) const override {
    Comparison scored("scores", scores, error), ranked("sorted totals", scores, error);
    for (int64_t place = 0; place < tokens * heads; ++place) {
      std::set<int64_t> addresses;
      std::vector<double> totals;
      for (int64_t k = place * topk; k < (place + 1) * topk; ++k) {
        const auto address = static_cast<int64_t>(outputs[0].values[static_cast<size_t>(k)]);
        if (address < 0 || address >= keys * keys) return "address " + std::to_string(address) + " is none";
        if (!addresses.insert(address).second) return "address " + std::to_string(address) + " is given twice";
        totals.push_back(0);
        for (int64_t c = 0; c < cores; ++c) {
          double magnitude = 0;
          const double expected = score(inputs, place, c, address / keys, address % keys, magnitude);
          scored.add(outputs[1].values[static_cast<size_t>(k * cores + c)], expected, magnitude);
          totals.back() += expected;
        }
      }
      std::sort(totals.rbegin(), totals.rend());
      const std::vector<double> highest = best_totals(inputs, place);
      for (size_t k = 0; k < totals.size(); ++k) ranked.add(totals[k], highest[k], std::fabs(highest[k]));
    }
    return scored.wrong().empty() ? ranked.wrong() : scored.wrong();
  }

 private:
  double score(const std::vector<Tensor>& inputs, int64_t place, int64_t c, int64_t row, int64_t col,
               double& magnitude) const {
    double sum = 0;
    for (int64_t r = 0; r < ranks; ++r) {
      for (int64_t s = 0; s < ranks; ++s) {
        const double term =
            inputs[0].values[static_cast<size_t>((place * keys + row) * ranks + r)] *
            inputs[4].values[static_cast<size_t>(((c * heads + place % heads) * ranks + r) * ranks + s)] *
            inputs[1].values[static_cast<size_t>((place * keys + col) * ranks + s)];
        sum += term;
        magnitude += std::fabs(term);
      }
    }
    return sum;
  }

  std::vector<int64_t> best_keys(const Tensor& side, const Tensor& merger, int64_t place) const {
    std::vector<std::pair<double, int64_t>> merged;
    for (int64_t n = 0; n < keys; ++n) {
      double sum = 0;
      for (int64_t r = 0; r < ranks; ++r) {
        sum += side.values[static_cast<size_t>((place * keys + n) * ranks + r)] *
               merger.values[static_cast<size_t>(place % heads * ranks + r)];
      }
      merged.emplace_back(-sum, n);
    }
    std::sort(merged.begin(), merged.end());
    std::vector<int64_t> best;
    for (int64_t m = 0; m < row_topk; ++m) best.push_back(merged[static_cast<size_t>(m)].second);
    return best;
  }

  std::vector<double> best_totals(const std::vector<Tensor>& inputs, int64_t place) const {
    std::vector<double> totals;
    for (const int64_t row : best_keys(inputs[0], inputs[2], place)) {
      for (const int64_t col : best_keys(inputs[1], inputs[3], place)) {
        double total = 0, magnitude = 0;
        for (int64_t c = 0; c < cores; ++c) total += score(inputs, place, c, row, col, magnitude);
        totals.push_back(total);
      }
    }
    std::sort(totals.rbegin(), totals.rend());
    return totals;
  }
};

std::vector<std::unique_ptr<const Case>> make_cases() {
  constexpr auto fp32 = DataType::kFLOAT, fp16 = DataType::kHALF, bf16 = DataType::kBF16, int8 = DataType::kINT8;
  std::vector<std::unique_ptr<const Case>> made;
  const auto lookup = [&](const char* name, DataType scores, DataType rows, int64_t p, int64_t v,
                          int64_t c) -> Lookup& {
    auto added = std::make_unique<Lookup>(name, scores, rows, p, v, c);
    Lookup& node = *added;
    made.push_back(std::move(added));
    return node;
  };
  lookup("lookup-fp32", fp32, fp32, 64, 64, 2);
  lookup("lookup-fp32-published", fp32, fp32, 192, 192, 2).hits = 256;
  Lookup& shards = lookup("lookup-fp32-shards-gelu", fp32, fp32, 12, 32, 1);
  shards.shards = 3;
  shards.gelu = true;
  Lookup& groups = lookup("lookup-fp32-groups-no-query", fp32, fp32, 0, 33, 1);
  groups.shards = 2;
  groups.groups = 4;
  Lookup& everything = lookup("lookup-fp32-int8-everything", fp32, int8, 16, 32, 2);
  everything.shards = 3;
  everything.groups = 3;
  everything.gelu = true;
  lookup("lookup-fp32-fp16-rows", fp32, fp16, 64, 64, 2);
  lookup("lookup-fp32-bf16-rows", fp32, bf16, 64, 64, 2);
  lookup("lookup-fp16", fp16, fp16, 64, 64, 2).shards = 2;
  lookup("lookup-fp16-int8-rows", fp16, int8, 64, 64, 2);
  lookup("lookup-bf16", bf16, bf16, 64, 64, 2).gelu = true;
  lookup("lookup-bf16-int8-rows", bf16, int8, 64, 64, 1);
  made.push_back(std::make_unique<Topk>("topk-fp32", fp32, 2));
  made.push_back(std::make_unique<Topk>("topk-fp32-one-core", fp32, 1));
  made.push_back(std::make_unique<Topk>("topk-fp16", fp16, 2));
  made.push_back(std::make_unique<Topk>("topk-bf16", bf16, 1));
  return made;
}

}  // namespace

const std::vector<std::unique_ptr<const Case>>& all_cases() {
  static const std::vector<std::unique_ptr<const Case>> all = make_cases();
  return all;
}

void decode(Tensor& tensor) {
  const size_t count = tensor.bytes.size() / element_size(tensor.type);
  tensor.values.clear();
  for (size_t i = 0; i < count; ++i) {
    switch (tensor.type) {
      case DataType::kFLOAT:
        tensor.values.push_back(get<float>(tensor.bytes, i));
        break;
      case DataType::kHALF:
        tensor.values.push_back(to_float(get<Half>(tensor.bytes, i)));
        break;
      case DataType::kBF16:
        tensor.values.push_back(to_float(get<BFloat16>(tensor.bytes, i)));
        break;
      case DataType::kINT8:
        tensor.values.push_back(get<int8_t>(tensor.bytes, i));
        break;
      default:
        tensor.values.push_back(static_cast<double>(get<int64_t>(tensor.bytes, i)));
    }
  }
}

}  // namespace umv2::test
