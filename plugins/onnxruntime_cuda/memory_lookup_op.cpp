// umv2::MemoryLookup for ONNX Runtime on a GPU: enqueues the kernel that serves the node. Values of indices and groups are
// not checked: reading them would wait for the device.
#include "checked.h"
#include "launch.h"
#include "op_inputs.h"
#include "ops.h"
#include "registration.h"
#include "scratch.h"

namespace umv2::ort {
namespace {

class MemoryLookup : public LookupSignature {
 public:
  static constexpr const char* kProvider = kExecutionProvider;

  MemoryLookup(const Api& api, const KernelInfo* info)
      : api_(api), attributes_(api, info), archive_(cuda::kernel_archive()), memory_(api, info) {}

  const Api& api() const { return api_; }

  void compute(KernelContext* context) {
    const LookupInputs inputs = lookup_inputs(api_, context, attributes_);
    const bool pre_values = attributes_.pre_value_dim > 0;
    require(!pre_values || inputs.query.type == inputs.scores.type, "query and scores must be of one element type");
    const int64_t width = product_of({attributes_.groups, inputs.value_dim}, "groups * the size of a value");
    product_of({inputs.tokens, width}, "the size of the output");
    cuda::LookupCall call{};
    call.node = {element_type(inputs.scores.type, "scores"),
                 element_type(inputs.row_type, "rows"),
                 static_cast<int64_t>(inputs.shards.size()),
                 inputs.cores,
                 attributes_.groups > 1,
                 pre_values,
                 attributes_.gelu,
                 attributes_.pre_value_dim,
                 inputs.value_dim};
    call.tokens = inputs.tokens;
    call.hits = inputs.hits;
    call.table_rows = inputs.rows;
    call.rows_per_shard = attributes_.rows_per_shard;
    call.groups = attributes_.groups;
    call.indices = inputs.indices.data;
    call.scores = inputs.scores.data;
    call.group = inputs.group.data;
    call.query = inputs.query.data;
    call.row_scales = inputs.row_scales.data;
    call.rows = inputs.shards;
    call.output = output<void>(api_, context, 0, {inputs.tokens, width});
    const cuda::Stream stream = stream_of(api_, context);
    const Scratch sums(memory_, context, stream, cuda::scratch_bytes(archive_, call));
    call.scratch = sums.data();
    cuda::launch(archive_, call, stream);
  }

 private:
  const Api& api_;
  LookupAttributes attributes_;
  const cuda::KernelArchive& archive_;
  DeviceMemory memory_;
};

}  // namespace

const CustomOp* memory_lookup_op(const Api& api, ElementType scores) {
  return new Registration<MemoryLookup>(api, scores);
}

}  // namespace umv2::ort
