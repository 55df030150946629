// Checks of the plugins that need no GPU: what TensorRT asks of them while it builds, saves and loads an engine.
//
//   tensorrt_host_test LIBRARY CASE      0 if it holds; else 1, with what does not on stderr
//   tensorrt_host_test LIBRARY prepare   onShapeChange of a lookup of fp32: prints its code, then what was logged
//   tensorrt_host_test LIBRARY unlogged  a refusal without a logger
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>

#include "device.h"
#include "dimensions.h"
#include "plugin_library.h"

namespace umv2::test {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr auto kFp32 = DataType::kFLOAT, kFp16 = DataType::kHALF, kBf16 = DataType::kBF16, kInt8 = DataType::kINT8,
               kInt32 = DataType::kINT32, kInt64 = DataType::kINT64;

using Types = std::vector<DataType>;
using Sizes = std::vector<int64_t>;
using Descs = std::vector<PluginTensorDesc>;

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("does not hold: " + what);
}

class Test {
 public:
  explicit Test(const char* path) : library_(path, &log_) {}

  void creators() {
    expect(library_.creators().size() == 2, "there are two creators");
    for (const char* name : {"MemoryLookup", "TuckerTopK"}) {
      auto& creator = library_.creator(name);
      expect(std::string(creator.getPluginVersion()) == "1", "version 1");
      expect(std::string(creator.getPluginNamespace()) == "umv2", "namespace umv2");
    }
    using Fields = std::map<std::string, PluginFieldType>;
    const auto fields = [&](const char* name) {
      const auto* const names = library_.creator(name).getFieldNames();
      Fields found;
      for (int32_t i = 0; i < names->nbFields; ++i) found[names->fields[i].name] = names->fields[i].type;
      return found;
    };
    expect(fields("MemoryLookup") == Fields{{"pre_value_dim", PluginFieldType::kINT32},
                                            {"activation", PluginFieldType::kCHAR},
                                            {"rows_per_shard", PluginFieldType::kINT32},
                                            {"groups", PluginFieldType::kINT32}},
           "the fields of MemoryLookup are its attributes");
    expect(fields("TuckerTopK") == Fields{{"row_topk", PluginFieldType::kINT32}, {"topk", PluginFieldType::kINT32}},
           "the fields of TuckerTopK are its attributes");
  }

  void attributes() {
    for (const bool wide : {false, true}) {
      for (const bool terminated : {false, true}) {
        Attributes given;
        if (wide) {
          given.int64("pre_value_dim", 16).int64("rows_per_shard", 7).int64("groups", 3);
        } else {
          given.int32("pre_value_dim", 16).int32("rows_per_shard", 7).int32("groups", 3);
        }
        given.text("activation", "gelu", terminated).text("plugin_namespace", "umv2");
        const Plugin plugin = library_.build("MemoryLookup", given);
        expect(plugin != nullptr, "integers of 32 and 64 bits, text with and without zero: " + log_.take());
        expect(identity(plugin) == "pre_value_dim=16 activation=gelu rows_per_shard=7 groups=3", identity(plugin));
      }
    }
    Attributes without;
    const Plugin plugin = library_.build(
        "MemoryLookup", without.int32("pre_value_dim", 16).text("activation", "none").int32("rows_per_shard", 7));
    expect(plugin != nullptr, "groups may be left out: " + log_.take());
    expect(identity(plugin) == "pre_value_dim=16 activation=none rows_per_shard=7 groups=1", identity(plugin));
  }

  void bad_attributes() {
    const auto refused = [&](const char* name, Attributes& attributes, const char* why) {
      expect(library_.build(name, attributes) == nullptr, std::string("refused: ") + why);
      logged(name, why);
    };
    Attributes missing, real, text, inner, huge, none, rows;
    refused("TuckerTopK", missing.int32("row_topk", 4), "attribute topk is missing");
    refused("TuckerTopK", real.int32("row_topk", 4).text("topk", "4"), "attribute topk must be an integer");
    refused("TuckerTopK", huge.int32("row_topk", 4).int64("topk", int64_t{1} << 40), "attribute topk is 1099511627776");
    refused("TuckerTopK", none.int32("row_topk", 2).int32("topk", 5),
            "topk must be from 1 to row_topk * row_topk, got 5");
    refused("MemoryLookup", lookup(text, 16, "relu", 7, 1), "activation must be none or gelu, got relu");
    refused("MemoryLookup", inner.int32("pre_value_dim", 16).int32("rows_per_shard", 7).text("activation", {"gelu\0!", 6}),
            "activation must be none or gelu");
    refused("MemoryLookup", lookup(rows, 16, "none", 0, 1), "rows_per_shard must be 1 or more, got 0");
    constexpr int32_t kMost = 1 << 23;
    for (const int32_t groups : {0, kMost + 1, INT32_MAX}) {
      Attributes given;
      refused("MemoryLookup", lookup(given, 16, "none", 7, groups), "groups must be from 1 to 8388608");
    }
    for (const int32_t size : {-1, kMost + 1, INT32_MIN}) {
      Attributes given;
      refused("MemoryLookup", lookup(given, size, "none", 7, 1), "pre_value_dim must be from 0 to 8388608");
    }
    for (const int32_t size : {0, (1 << 15) + 1, INT32_MAX}) {
      Attributes given;
      refused("TuckerTopK", given.int32("row_topk", size).int32("topk", 1), "row_topk must be from 1 to 32768");
    }
    expect(library_.creator("TuckerTopK").createPlugin("node", nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr,
           "no attributes at all are refused");
    logged("TuckerTopK", "no attributes are given");
  }

  void capabilities() {
    const Plugin plugin = make_topk(4, 5);
    expect(std::string(core(plugin).getInterfaceInfo().kind) == "PLUGIN_V3ONE_CORE", "core");
    expect(std::string(builder(plugin).getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD", "build");
    expect(std::string(runtime(plugin).getInterfaceInfo().kind) == "PLUGIN_V3ONE_RUNTIME", "runtime");
    expect(plugin->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(7)) == nullptr, "no other");
    expect(std::string(core(plugin).getPluginName()) == "TuckerTopK", "name");
    expect(std::string(core(plugin).getPluginVersion()) == "1", "version");
    expect(std::string(core(plugin).getPluginNamespace()) == "umv2", "namespace");
    expect(builder(plugin).getNbOutputs() == 2 && builder(make_lookup(0, "none", 1)).getNbOutputs() == 1, "outputs");
    expect(builder(plugin).getWorkspaceSize(nullptr, 0, nullptr, 0) == 0, "no workspace");
  }

  void output_types() {
    for (const DataType type : {kFp32, kFp16, kBf16}) {
      expect(types_of(make_topk(4, 5), Types(5, type), 2) == Types{kInt64, type}, "TuckerTopK");
      expect(types_of(make_lookup(16, "none", 1), {kInt64, type, type, kFp32, kInt8}, 1) == Types{type},
             "MemoryLookup");
    }
  }

  void output_shapes() {
    // Tokens are known only when the engine runs.
    for (const bool constant : {true, false}) {
      Expressions e;
      const auto shape = [&](const Sizes& sizes) {
        auto made = e.shape(sizes);
        made.d[0] = e.dimension(sizes[0], constant);
        return made;
      };
      expect(shapes_of(
                 e, make_topk(8, 9),
                 {shape({3, 2, 50, 4}), shape({3, 2, 50, 4}), e.shape({2, 4}), e.shape({2, 4}), e.shape({5, 2, 4, 4})},
                 2) == std::vector<Sizes>{{3, 18}, {3, 18, 5}},
             "TuckerTopK gives [T, H*topk] and [T, H*topk, C]");
      const nvinfer1::DimsExprs indices = shape({3, 40}), scores = shape({3, 40, 2}), query = shape({3, 12}),
                                rows = e.shape({7, 44}), scales = e.shape({14, 2});
      expect(shapes_of(e, make_lookup(12, "none", 1), {indices, scores, query, rows}, 1) == std::vector<Sizes>{{3, 32}},
             "MemoryLookup gives [T, V]");
      expect(shapes_of(e, make_lookup(12, "none", 5), {indices, scores, indices, query, scales, rows, rows}, 1) ==
                 std::vector<Sizes>{{3, 160}},
             "MemoryLookup gives [T, G*V]");
      expect(shapes_of(e, make_lookup(0, "none", 1), {indices, scores, rows}, 1) == std::vector<Sizes>{{3, 44}},
             "without pre-values the whole row is the value");
    }
  }

  void formats() {
    const Plugin topk = make_topk(4, 5);
    for (const DataType type : {kFp32, kFp16, kBf16}) {
      expect(supported(topk, 5, {type, type, type, type, type, kInt64, type}), "TuckerTopK of floats");
    }
    expect(!supported(topk, 5, {kInt8}), "no integers");
    expect(!supported(topk, 5, {kFp32, kFp16}), "inputs are alike");
    expect(!supported(topk, 5, {kFp32, kFp32, kFp32, kFp32, kFp32, kInt32}), "addresses are int64");
    expect(!supported(topk, 5, {kFp16, kFp16, kFp16, kFp16, kFp16, kInt64, kFp32}), "scores are of the inputs' type");

    const Plugin all = make_lookup(12, "gelu", 3);
    for (const DataType scores : {kFp32, kFp16, kBf16}) {
      for (const DataType rows : {kFp32, kFp16, kBf16}) {
        expect(supported(all, 6, {kInt64, scores, kInt64, scores, rows, rows, scores}), "rows of floats");
      }
      expect(supported(all, 7, {kInt64, scores, kInt64, scores, kFp32, kInt8, kInt8, scores}), "rows of int8");
    }
    expect(!supported(all, 6, {kInt32}), "indices are int64");
    expect(!supported(all, 6, {kInt64, kInt8}), "scores are floats");
    expect(!supported(all, 6, {kInt64, kFp32, kInt32}), "group is int64");
    expect(!supported(all, 6, {kInt64, kFp32, kInt64, kFp16}), "query is like scores");
    expect(!supported(all, 6, {kInt64, kFp32, kInt64, kFp32, kInt8}), "rows of int8 need row_scales");
    expect(!supported(all, 6, {kInt64, kFp32, kInt64, kFp32, kFp16, kInt8}), "row_scales are fp32");
    expect(!supported(all, 7, {kInt64, kFp32, kInt64, kFp32, kFp32, kInt8, kFp32}), "shards are alike");
    expect(!supported(all, 6, {kInt64, kFp16, kInt64, kFp16, kFp16, kFp16, kFp32}), "the output is like scores");
    const Plugin plain = make_lookup(0, "none", 1);
    expect(supported(plain, 3, {kInt64, kFp16, kFp32, kFp16}), "without group and query, rows follow scores");
    expect(!supported(plain, 4, {kInt64, kFp32, kFp32, kInt8}, {7, 44}), "a shard is not taken for row_scales");
    std::vector<DynamicPluginTensorDesc> packed(1);
    packed[0].desc = tensor(kInt64, {3, 40});
    packed[0].desc.format = nvinfer1::TensorFormat::kCHW32;
    expect(!builder(plain).supportsFormatCombination(0, packed.data(), 3, 1), "linear only");
  }

  void round_trip() {
    Plugin first = make_lookup(12, "gelu", 3);
    const std::string before = identity(first);
    const Plugin restored(
        library_.creator("MemoryLookup")
            .createPlugin("node", runtime(first).getFieldsToSerialize(), nvinfer1::TensorRTPhase::kRUNTIME));
    expect(restored != nullptr && identity(restored) == before, "what is serialised makes the same plugin");
    const Plugin clone(first->clone()), attached(runtime(first).attachToContext(nullptr));
    for (const Plugin* copy : {&clone, &attached}) {
      expect(runtime(*copy).getFieldsToSerialize()->fields[0].data !=
                 runtime(first).getFieldsToSerialize()->fields[0].data,
             "the fields of a copy are its own");
    }
    first.reset();
    for (const Plugin* copy : {&clone, &attached}) {
      expect(identity(*copy) == before, "a copy is equal");
      const Plugin again(
          library_.creator("MemoryLookup")
              .createPlugin("node", runtime(*copy).getFieldsToSerialize(), nvinfer1::TensorRTPhase::kRUNTIME));
      expect(again != nullptr && identity(again) == before, "a copy outlives its original");
    }
    const Plugin topk = make_topk(4, 5);
    const Plugin other(
        library_.creator("TuckerTopK")
            .createPlugin("node", runtime(topk).getFieldsToSerialize(), nvinfer1::TensorRTPhase::kRUNTIME));
    expect(other != nullptr && identity(other) == "row_topk=4 topk=5", "TuckerTopK");
    expect(identity(make_topk(4, 6)) != identity(topk), "other attributes are timed anew");
  }

  void wrong_types() {
    const auto refused = [&](const char* op, const Plugin& plugin, const Types& types, const char* why) {
      Types outputs(static_cast<size_t>(builder(plugin).getNbOutputs()));
      const int32_t code = builder(plugin).getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()),
                                                              types.data(), static_cast<int32_t>(types.size()));
      expect(code != 0, std::string("refused: ") + why);
      logged(op, why);
    };
    const Plugin topk = make_topk(4, 5), all = make_lookup(12, "none", 3);
    refused("TuckerTopK", topk, Types(4, kFp32), "5 inputs expected, got 4");
    refused("TuckerTopK", topk, Types(5, kInt8), "scores must be fp32, fp16 or bf16, got int8");
    refused("TuckerTopK", topk, {kFp32, kFp32, kFp32, kFp16, kFp32}, "inputs must be alike, got fp32 and fp16");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt64, kFp32}, "no rows are given");
    refused("MemoryLookup", all, {kInt32, kFp32, kInt64, kFp32, kFp32}, "indices must be int64, got int32");
    refused("MemoryLookup", all, {kInt64, kInt8, kInt64, kInt8, kFp32}, "scores must be fp32, fp16 or bf16, got int8");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt32, kFp32, kFp32}, "group must be int64, got int32");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt64, kFp16, kFp32}, "query must be fp32 like scores, got fp16");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt64, kFp32, kInt8}, "row_scales must come before rows of int8");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt64, kFp32, kFp16, kInt8}, "row_scales must be fp32, got fp16");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt64, kFp32, kInt32},
            "rows must be fp32, fp16, bf16 or int8, got int32");
    refused("MemoryLookup", all, {kInt64, kFp32, kInt64, kFp32, kFp16, kFp32}, "shard 1 is fp32, shard 0 fp16");
  }

  void wrong_ranks() {
    Expressions e;
    const auto refused = [&](const char* op, const Plugin& plugin, const std::vector<Sizes>& sizes, const char* why) {
      std::vector<nvinfer1::DimsExprs> inputs, outputs(2);
      for (const Sizes& input : sizes) inputs.push_back(e.shape(input));
      expect(builder(plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                             outputs.data(), builder(plugin).getNbOutputs(), e) != 0,
             std::string("refused: ") + why);
      logged(op, why);
    };
    const Plugin topk = make_topk(4, 5), lookup = make_lookup(12, "none", 1);
    refused("TuckerTopK", topk, {{3, 2, 50, 4}}, "5 inputs expected, got 1");
    refused("TuckerTopK", topk, {{3, 2, 50}, {3, 2, 50, 4}, {2, 4}, {2, 4}, {5, 2, 4, 4}},
            "input 0 must have 4 dimensions, got 3");
    refused("TuckerTopK", topk, {{3, 2, 50, 4}, {3, 2, 50, 4}, {2, 4}, {2}, {5, 2, 4, 4}},
            "input 3 must have 2 dimensions, got 1");
    refused("MemoryLookup", lookup, {{3, 40}, {3, 40, 2}, {3, 12}}, "no rows are given");
    refused("MemoryLookup", lookup, {{3, 40}, {3, 40}, {3, 12}, {7, 44}}, "input 1 must have 3 dimensions, got 2");
    refused("MemoryLookup", lookup, {{3, 40}, {3, 40, 2}, {3, 12}, {7}}, "input 3 must have 2 dimensions, got 1");
    refused("MemoryLookup", lookup, {{3, 40}, {3, 40, 2}, {3, 12}, {7, 12}}, "rows of 12 elements hold no value");
  }

  void wrong_sizes() {
    const auto refused = [&](const char* op, const Plugin& plugin, const Descs& inputs, const char* why) {
      expect(shape_change(plugin, inputs) != 0, std::string("refused: ") + why);
      logged(op, why);
    };
    const auto topk = [&](const Sizes& rows, const Sizes& cols, const Sizes& v, const Sizes& cores) {
      return Descs{tensor(kFp32, rows), tensor(kFp32, cols), tensor(kFp32, {2, 4}), tensor(kFp32, v),
                   tensor(kFp32, cores)};
    };
    const Plugin retrieve = make_topk(4, 5);
    refused("TuckerTopK", retrieve, topk({3, 2, 50, 4}, {3, 2, 51, 4}, {2, 4}, {5, 2, 4, 4}),
            "got [3, 2, 50, 4] and [3, 2, 51, 4]");
    refused("TuckerTopK", retrieve, topk({3, 2, 50, 4}, {3, 2, 50, 4}, {3, 4}, {5, 2, 4, 4}), "u and v must be [H, R]");
    refused("TuckerTopK", retrieve, topk({3, 2, 50, 4}, {3, 2, 50, 4}, {2, 4}, {5, 2, 4, 3}),
            "cores must be [C, H, R, R]");
    refused("TuckerTopK", retrieve, topk({3, 2, 3, 4}, {3, 2, 3, 4}, {2, 4}, {5, 2, 4, 4}),
            "row_topk 4 is not within the 3 keys");

    const Plugin all = make_lookup(12, "none", 3);
    const Descs good{tensor(kInt64, {3, 40}), tensor(kFp32, {3, 40, 2}), tensor(kInt64, {3, 40}),
                     tensor(kFp32, {3, 12}),  tensor(kFp32, {13, 2}),    tensor(kInt8, {7, 44}),
                     tensor(kInt8, {6, 44})};
    const auto lookup = [&](size_t input, const Sizes& sizes) {
      Descs changed = good;
      changed[input] = tensor(good[input].type, sizes);
      return changed;
    };
    refused("MemoryLookup", all, lookup(1, {3, 41, 2}),
            "indices [T, K] and scores [T, K, C] expected, got [3, 40] and [3, 41, 2]");
    refused("MemoryLookup", all, lookup(2, {3, 39}), "group must be like indices, got [3, 39]");
    refused("MemoryLookup", all, lookup(3, {3, 13}), "query must be [T, P], got [3, 13]");
    refused("MemoryLookup", all, lookup(4, {14, 2}), "row_scales must be [13, 2], got [14, 2]");
    refused("MemoryLookup", all, lookup(5, {6, 44}), "shard 0 is [6, 44], which does not fit rows_per_shard 7");
    refused("MemoryLookup", all, lookup(6, {8, 44}), "shard 1 is [8, 44], which does not fit rows_per_shard 7");
    refused("MemoryLookup", all, lookup(6, {6, 45}), "shard 1 is [6, 45]");
    Descs narrow = good;
    narrow[5] = tensor(kInt8, {7, 13});
    narrow[6] = tensor(kInt8, {6, 13});
    refused("MemoryLookup", all, narrow, "rows [7, 13] do not split into a pre-value and C equal parts");

    // Shapes of which a product wraps around; nothing of their size is allocated.
    constexpr int64_t kHuge = int64_t{1} << 40;
    const Plugin plain = make_lookup(0, "none", 1);
    refused("MemoryLookup", plain,
            {tensor(kInt64, {kHuge, kHuge}), tensor(kFp32, {kHuge, kHuge, 2}), tensor(kFp32, {7, 44})},
            "the number of scores is out of range: 1099511627776 * 1099511627776 * 2");
    refused("MemoryLookup", plain,
            {tensor(kInt64, {3, kHuge}), tensor(kFp32, {3, kHuge, kHuge}), tensor(kFp32, {7, kHuge})},
            "do not split into a pre-value and C equal parts");
    refused("TuckerTopK", retrieve, topk({kHuge, 2, 50, 4}, {kHuge, 2, 50, 4}, {2, 4}, {kHuge, 2, 4, 4}),
            "the number of scores is out of range: 1099511627776 * 10 * 1099511627776");
    constexpr int64_t kKeys = int64_t{1} << 45;
    refused("TuckerTopK", retrieve, topk({3, 2, kKeys, 4}, {3, 2, kKeys, 4}, {2, 4}, {5, 2, 4, 4}),
            "the number of scores of keys is out of range: 3 * 2 * 35184372088832 * 4");
  }

  // Attributes and shapes that no one means. Built with sanitizers, this shows whatever wraps around on the way to the
  // refusal; there is no driver, so nothing is launched where all fit.
  void fuzz() {
    constexpr int64_t kSizes[] = {INT64_MIN, -1, 0, 1, 2, 3, 7, 44, 1 << 15, 1 << 23, INT32_MAX, int64_t{1} << 31,
                                  int64_t{1} << 40, int64_t{1} << 62, INT64_MAX};
    uint32_t state = 1;
    const auto below = [&](size_t count) {
      state = state * 1664525u + 1013904223u;
      return (state >> 8) % count;
    };
    const auto size = [&] { return below(3) == 0 ? kSizes[below(std::size(kSizes))] : static_cast<int64_t>(below(4)) + 1; };
    size_t made = 0;
    for (int round = 0; round < 20000; ++round) {
      Attributes attributes;
      const bool topk = below(2) == 0;
      if (topk) {
        attributes.int64("row_topk", size()).int64("topk", size());
      } else {
        attributes.int64("pre_value_dim", size()).int64("rows_per_shard", size()).int64("groups", size());
        attributes.text("activation", below(2) == 0 ? "none" : "gelu");
      }
      const Plugin plugin = library_.build(topk ? "TuckerTopK" : "MemoryLookup", attributes);
      if (plugin == nullptr) continue;
      ++made;
      const int64_t t = size(), k = size(), c = size();
      const auto any = [&](int64_t meant) { return below(8) == 0 ? size() : meant; };
      Descs inputs;
      if (topk) {
        const int64_t h = size(), n = size();
        inputs = {tensor(kFp32, {t, h, any(n), k}), tensor(kFp32, {t, h, n, k}), tensor(kFp32, {h, any(k)}),
                  tensor(kFp32, {h, k}), tensor(kFp32, {c, h, k, any(k)})};
      } else {
        inputs = {tensor(kInt64, {t, k}), tensor(kFp32, {any(t), k, c})};
        if (below(2) == 0) inputs.push_back(tensor(kInt64, {t, any(k)}));
        if (below(2) == 0) inputs.push_back(tensor(kFp32, {t, size()}));
        const int64_t width = size();
        for (size_t shards = below(3); shards > 0; --shards) inputs.push_back(tensor(kFp32, {size(), any(width)}));
      }
      shape_change(plugin, inputs);
      std::vector<DynamicPluginTensorDesc> largest(inputs.size());
      for (size_t i = 0; i < inputs.size(); ++i) largest[i].max = inputs[i].dims;
      builder(plugin).getWorkspaceSize(largest.data(), static_cast<int32_t>(largest.size()), nullptr, 0);
      log_.take();
    }
    expect(made > 1000, "enough of the attributes are sound");
  }

  // The lookup of the case lookup-fp32 of the harness.
  void prepare() {
    const int32_t code = shape_change(make_lookup(64, "none", 1), prepared(3));
    std::printf("%d\n%s", code, log_.take().c_str());
  }

  void empty() {
    const Plugin plugin = make_lookup(64, "none", 1);
    expect(shape_change(plugin, prepared(0)) == 0, "onShapeChange: " + log_.take());
    const Descs inputs = prepared(0);
    const void* const sources[4] = {};
    void* const targets[1] = {};
    expect(runtime(plugin).enqueue(inputs.data(), nullptr, sources, targets, nullptr, nullptr) == 0,
           "no tokens are no work: " + log_.take());
  }

  // With kernels whose pointers to shards the stand-in of the driver does not follow.
  void misaligned() {
    const Plugin plugin = make_lookup(64, "none", 1);
    const Descs inputs = prepared(3);
    expect(shape_change(plugin, inputs) == 0, "onShapeChange: " + log_.take());
    alignas(16) const char byte[32] = {};
    const void* const sources[4] = {byte, byte, byte + 4, byte};
    void* const targets[1] = {};
    expect(runtime(plugin).enqueue(inputs.data(), nullptr, sources, targets, nullptr, nullptr) != 0, "refused");
    logged("MemoryLookup", "a tensor does not start at 16 bytes");
  }

 private:
  static Descs prepared(int64_t tokens) {
    return {tensor(kInt64, {tokens, 40}), tensor(kFp32, {tokens, 40, 2}), tensor(kFp32, {tokens, 64}),
            tensor(kFp32, {7, 128})};
  }

  static Attributes& lookup(Attributes& attributes, int32_t p, const char* activation, int32_t rows, int32_t groups) {
    return attributes.int32("pre_value_dim", p)
        .text("activation", activation)
        .int32("rows_per_shard", rows)
        .int32("groups", groups);
  }

  Plugin make_lookup(int32_t pre_value_dim, const char* activation, int32_t groups) {
    Attributes attributes;
    return library_.build("MemoryLookup", lookup(attributes, pre_value_dim, activation, 7, groups));
  }

  Plugin make_topk(int32_t row_topk, int32_t topk) {
    Attributes attributes;
    return library_.build("TuckerTopK", attributes.int32("row_topk", row_topk).int32("topk", topk));
  }

  static std::string identity(const Plugin& plugin) { return builder(plugin).getTimingCacheID(); }

  void logged(const std::string& op, const char* why) {
    const std::string text = log_.take();
    expect(text.rfind("umv2::" + op + ": ", 0) == 0 && text.find(why) != std::string::npos,
           "it says \"" + std::string(why) + "\", but it says: " + text);
  }

  Types types_of(const Plugin& plugin, const Types& inputs, size_t count) {
    Types outputs(count);
    const int32_t code = builder(plugin).getOutputDataTypes(outputs.data(), static_cast<int32_t>(count), inputs.data(),
                                                            static_cast<int32_t>(inputs.size()));
    expect(code == 0, "output types: " + log_.take());
    return outputs;
  }

  std::vector<Sizes> shapes_of(Expressions& e, const Plugin& plugin, const std::vector<nvinfer1::DimsExprs>& inputs,
                               size_t count) {
    std::vector<nvinfer1::DimsExprs> outputs(count);
    const int32_t code = builder(plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                                         outputs.data(), static_cast<int32_t>(count), e);
    expect(code == 0, "output shapes: " + log_.take());
    std::vector<Sizes> found;
    for (const auto& output : outputs) found.push_back(sizes(output));
    return found;
  }

  // Asks as TensorRT does: of each tensor, given those before it. `types`: the first of the inputs and outputs.
  static bool supported(const Plugin& plugin, int32_t inputs, const Types& types, const Sizes& table = {14, 2}) {
    std::vector<DynamicPluginTensorDesc> tensors(static_cast<size_t>(inputs) + 2);
    for (size_t i = 0; i < types.size(); ++i) {
      tensors[i].desc = tensor(types[i], table);
      if (!builder(plugin).supportsFormatCombination(static_cast<int32_t>(i), tensors.data(), inputs,
                                                     builder(plugin).getNbOutputs())) {
        return false;
      }
    }
    return true;
  }

  static int32_t shape_change(const Plugin& plugin, const Descs& inputs) {
    return runtime(plugin).onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0);
  }

  Log log_;
  PluginLibrary library_;
};

const std::map<std::string, void (Test::*)()> kCases{
    {"creators", &Test::creators},
    {"attributes", &Test::attributes},
    {"bad-attributes", &Test::bad_attributes},
    {"capabilities", &Test::capabilities},
    {"output-types", &Test::output_types},
    {"output-shapes", &Test::output_shapes},
    {"formats", &Test::formats},
    {"round-trip", &Test::round_trip},
    {"wrong-types", &Test::wrong_types},
    {"wrong-ranks", &Test::wrong_ranks},
    {"wrong-sizes", &Test::wrong_sizes},
    {"fuzz", &Test::fuzz},
    {"prepare", &Test::prepare},
    {"empty", &Test::empty},
    {"misaligned", &Test::misaligned},
};

int run(const char* path, const std::string& name) {
  if (name == "unlogged") {
    Attributes attributes;
    return PluginLibrary(path, nullptr).build("TuckerTopK", attributes.int32("row_topk", 4)) == nullptr ? 0 : 1;
  }
  const auto found = kCases.find(name);
  if (found == kCases.end()) throw std::runtime_error("no case " + name);
  std::unique_ptr<Device> device;
  // These want a current context, where there is a driver.
  if (name == "prepare" || name == "empty" || name == "misaligned") {
    try {
      device = std::make_unique<Device>();
    } catch (const std::exception&) {
    }
  }
  Test test(path);
  (test.*found->second)();
  return 0;
}

}  // namespace
}  // namespace umv2::test

int main(int count, char** arguments) {
  try {
    return count == 3 ? umv2::test::run(arguments[1], arguments[2]) : 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
