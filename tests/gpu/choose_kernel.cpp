// Says which kernel of a archive serves a node on a device: plugins/cuda/kernel_archive.h, run by
// tests/gpu/test_kernel_archive.py.
//
//   choose_kernel PACK CAPABILITY lookup SCORES ROWS SHARDS CORES GROUPED PRE_VALUES GELU P V
//   choose_kernel PACK CAPABILITY topk SCORES RANKS CORES ROW_TOPK TOPK
//
// Numbers, element types as ONNX numbers them; prints the entry, or what the archive says, with exit code 1.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "kernel_archive.h"
#include "require.h"

int main(int count, char** arguments) {
  using namespace umv2::cuda;
  if (count < 4) return 2;
  std::ifstream file(arguments[1], std::ios::binary);
  const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const std::string capability = arguments[2];
  const size_t point = capability.find('.');
  const ComputeCapability device{std::stoi(capability), std::stoi(capability.substr(point + 1))};
  std::vector<int64_t> n;
  for (int i = 4; i < count; ++i) n.push_back(std::stoll(arguments[i]));
  const auto type = [&](size_t i) { return static_cast<ElementType>(n.at(i)); };
  try {
    const KernelArchive archive(bytes.data(), bytes.size(), "the archive");
    const KernelRecord& found = std::string(arguments[3]) == "lookup"
                                    ? archive.find(LookupTraits{type(0), type(1), n.at(2), n.at(3), n.at(4) != 0,
                                                             n.at(5) != 0, n.at(6) != 0, n.at(7), n.at(8)},
                                                device)
                                    : archive.find(TopkTraits{type(0), n.at(1), n.at(2), n.at(3), n.at(4)}, device);
    std::printf("%s\n", found.entry);
    return 0;
  } catch (const umv2::Error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
