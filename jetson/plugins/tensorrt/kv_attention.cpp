// The caches are inputs and outputs at once. TensorRT gives both the same address where the preview feature
// ALIASED_PLUGIN_IO_10_03 is on when the engine is built.
#include <cuda_runtime_api.h>

#include "plugin.h"

namespace orin::trt {
namespace {

constexpr int kQkv = 0, kKeys = 1, kValues = 2, kPast = 3, kCos = 4, kSin = 5, kMore = 6;

class KvAttention final : public Plugin {
 public:
  static constexpr const Operator& kOperator = kKvAttention;

  explicit KvAttention(const Attributes& a)
      : Plugin(kOperator, a),
        heads_(a.integer("num_heads")),
        kv_heads_(a.integer("kv_num_heads")),
        dim_(a.integer("head_dim")),
        scale_(a.number("scale")),
        qk_norm_(a.integer("qk_norm") != 0),
        epsilon_(a.number("norm_epsilon")) {}

  static std::string wrong(const Attributes& a) {
    int heads = a.integer("num_heads"), kv_heads = a.integer("kv_num_heads"), dim = a.integer("head_dim");
    if (heads <= 0 || kv_heads <= 0 || heads % kv_heads)
      return "num_heads " + std::to_string(heads) + " is no multiple of kv_num_heads " + std::to_string(kv_heads);
    if (dim != 64 && dim != 128) return "head_dim is " + std::to_string(dim) + ", want 64 or 128";
    if (!(a.number("norm_epsilon") >= 0))
      return "norm_epsilon is " + std::to_string(a.number("norm_epsilon")) + ", want 0 or more";
    return "";
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) KvAttention(*this); }

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t) const noexcept override {
    out[0] = in[kQkv], out[1] = in[kKeys], out[2] = in[kValues];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t, const DimsExprs*, int32_t, DimsExprs* out, int32_t,
                          IExprBuilder& expressions) noexcept override {
    out[0] = in[kQkv];
    out[0].d[2] = expressions.constant(int64_t(heads_) * dim_);
    out[1] = in[kKeys], out[2] = in[kValues];
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return workspace(in[kQkv].max, in[kKeys].max);
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace_bytes, cudaStream_t stream) noexcept override {
    for (int i : {kKeys, kValues})
      if (int32_t failed = same_memory(in[i], inputs[i], outputs[i], stream)) return failed;
    orin_kv_attention_args args{};
    args.batch = int32_t(in[kQkv].dims.d[0]), args.tokens = int32_t(in[kQkv].dims.d[1]);
    args.num_heads = heads_, args.kv_num_heads = kv_heads_, args.head_dim = dim_;
    args.max_len = int32_t(in[kKeys].dims.d[2]), args.max_positions = int32_t(in[kCos].dims.d[0]);
    args.int8_cache = in[kKeys].type == DataType::kINT8;
    args.scale = scale_, args.norm_epsilon = epsilon_;
    args.qkv = inputs[kQkv];
    args.key_cache = outputs[kKeys], args.value_cache = outputs[kValues];
    args.past_lengths = static_cast<const int32_t*>(inputs[kPast]);
    args.cos = static_cast<const float*>(inputs[kCos]), args.sin = static_cast<const float*>(inputs[kSin]);
    int next = kMore;
    if (qk_norm_) args.q_norm = inputs[next], args.k_norm = inputs[next + 1], next += 2;
    if (args.int8_cache) {
      args.key_scale = static_cast<const float*>(inputs[next]);
      args.value_scale = static_cast<const float*>(inputs[next + 1]);
    }
    args.y = outputs[0];
    return result(
        orin_kv_attention(&args, workspace_bytes, workspace(in[kQkv].dims, in[kKeys].dims), stream));
  }

 protected:
  // An int8 cache shows in its scales.
  bool is_int8(int32_t inputs) const { return inputs == kMore + 2 * qk_norm_ + 2; }

  int input_index(int32_t at, int32_t inputs) const override {
    return input_at(kOperator, at, qk_norm_, is_int8(inputs));
  }

  bool type_fits(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs) const override {
    if (at != kKeys && at != kValues) return true;
    return tensors[at].desc.type == (is_int8(inputs) ? DataType::kINT8 : DataType::kHALF);
  }

  bool fits(const std::vector<Dims>& in) const override {
    size_t without_scales = kMore + 2 * qk_norm_;
    if (in.size() != without_scales && in.size() != without_scales + 2) {
      say(Severity::kERROR, "KvAttention: " + std::to_string(in.size()) + " inputs, want " +
                                std::to_string(without_scales) + " or, with an int8 cache, two more");
      return false;
    }
    int64_t batch = in[kQkv].nbDims == 3 ? in[kQkv].d[0] : -1, length = in[kKeys].nbDims == 4 ? in[kKeys].d[2] : -1;
    int64_t positions = in[kCos].nbDims == 2 ? in[kCos].d[0] : -1;
    bool good = is("qkv", in[kQkv], {batch, -1, int64_t(heads_ + 2 * kv_heads_) * dim_}) &&
                is("key_cache", in[kKeys], {batch, kv_heads_, length, dim_}) &&
                is("value_cache", in[kValues], {batch, kv_heads_, length, dim_}) &&
                is("past_lengths", in[kPast], {batch}) && is("cos", in[kCos], {positions, dim_ / 2}) &&
                is("sin", in[kSin], {positions, dim_ / 2});
    for (size_t i = kMore; good && i < without_scales; ++i) good = is(i % 2 ? "k_norm" : "q_norm", in[i], {dim_});
    for (size_t i = without_scales; good && i < in.size(); ++i)
      good = is(i == without_scales ? "key_scale" : "value_scale", in[i], {1, kv_heads_, 1, dim_});
    return good;
  }

 private:
  size_t workspace(const Dims& qkv, const Dims& keys) const {
    return orin_kv_attention_workspace(int32_t(qkv.d[0]), int32_t(qkv.d[1]), heads_, kv_heads_, dim_,
                                       int32_t(keys.d[2]));
  }

  // Without aliasing the result is still right, at the price of a copy of the whole cache.
  int32_t same_memory(const PluginTensorDesc& tensor, const void* input, void* output, cudaStream_t stream) {
    if (input == output) return 0;
    if (!warned_)
      say(Severity::kWARNING,
          "KvAttention: the cache is copied in every call: build the engine with the preview feature "
          "ALIASED_PLUGIN_IO_10_03, and bind each cache's input and output to one address");
    warned_ = true;
    size_t bytes = size_t(rows_of(tensor.dims, 0)) * (tensor.type == DataType::kINT8 ? 1 : 2);
    cudaError_t error = cudaMemcpyAsync(output, input, bytes, cudaMemcpyDeviceToDevice, stream);
    if (error == cudaSuccess) return 0;
    say(Severity::kERROR, std::string("KvAttention: copying the cache: ") + cudaGetErrorString(error));
    return 1;
  }

  int heads_, kv_heads_, dim_;
  float scale_;
  bool qk_norm_;
  float epsilon_;
  bool warned_ = false;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* kv_attention_creator() {
  static Creator<KvAttention> creator;
  return &creator;
}

}  // namespace orin::trt
