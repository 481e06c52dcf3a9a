#include "orin_layout.h"
#include "plugin.h"

namespace orin::trt {
namespace {

constexpr int kTensorProtoFloat = 1, kTensorProtoFloat16 = 10;

class EmbeddingGather final : public Plugin {
 public:
  static constexpr const Operator& kOperator = kEmbeddingGather;

  explicit EmbeddingGather(const Attributes& a)
      : Plugin(kOperator, a),
        bits_(a.integer("bits")),
        group_(a.integer("group_size")),
        hidden_(a.integer("hidden_size")),
        tiles_(a.text("layout") == "int4_linear"),
        fp32_(a.integer("output_type") == kTensorProtoFloat) {}

  static std::string wrong(const Attributes& a) {
    int bits = a.integer("bits"), group = a.integer("group_size"), hidden = a.integer("hidden_size");
    int type = a.integer("output_type");
    const std::string& layout = a.text("layout");
    if (layout != "rows" && layout != "int4_linear")
      return "layout is \"" + layout + "\", want \"rows\" or \"int4_linear\"";
    if (bits != 4 && bits != 8) return "bits is " + std::to_string(bits) + ", want 4 or 8";
    if (layout == "int4_linear" && bits != 4) return "bits is 8, and the layout int4_linear has 4";
    if (group <= 0 || hidden <= 0 || hidden % group)
      return "hidden_size " + std::to_string(hidden) + " is no multiple of group_size " + std::to_string(group);
    if (type != kTensorProtoFloat && type != kTensorProtoFloat16)
      return "output_type is " + std::to_string(type) + ", want 1 (fp32) or 10 (fp16)";
    return "";
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) EmbeddingGather(*this); }

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType*, int32_t) const noexcept override {
    out[0] = output_type();
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t, const DimsExprs*, int32_t, DimsExprs* out, int32_t,
                          IExprBuilder& expressions) noexcept override {
    out[0].nbDims = in[0].nbDims + 1;
    for (int i = 0; i < in[0].nbDims; ++i) out[0].d[i] = in[0].d[i];
    out[0].d[in[0].nbDims] = expressions.constant(hidden_);
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void*, cudaStream_t stream) noexcept override {
    orin_embedding_args args{};
    args.tokens = int32_t(rows_of(in[0].dims, 0));
    args.vocab = int32_t(tiles_ ? in[1].dims.d[0] * kTileRows : in[1].dims.d[0]);
    args.hidden = hidden_, args.bits = bits_, args.group_size = group_;
    args.layout = tiles_ ? ORIN_LAYOUT_INT4_LINEAR : ORIN_LAYOUT_ROWS;
    args.fp32_output = fp32_;
    args.ids = static_cast<const int64_t*>(inputs[0]);
    args.table = inputs[1], args.scales = inputs[2];
    args.y = outputs[0];
    return result(orin_embedding_gather(&args, stream));
  }

 protected:
  bool type_fits(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs) const override {
    if (at == 1) return !tiles_ || tensors[1].desc.type == DataType::kINT32;
    return at != inputs || tensors[at].desc.type == output_type();
  }

  bool fits(const std::vector<Dims>& in) const override {
    if (in.size() != 3) {
      say(Severity::kERROR, "EmbeddingGather: " + std::to_string(in.size()) + " inputs, want 3");
      return false;
    }
    if (tiles_) {
      int64_t vocab = in[1].nbDims == 5 && in[1].d[0] >= 0 ? in[1].d[0] * kTileRows : -1;
      return is("table", in[1], {-1, hidden_ / kBlockK, 8, 4, 4}) && is("scales", in[2], {hidden_ / group_, vocab});
    }
    // A row's bytes, or its words of four bytes.
    int64_t bytes = int64_t(hidden_) * bits_ / 8, vocab = in[1].nbDims == 2 ? in[1].d[0] : -1;
    bool words = in[1].nbDims == 2 && in[1].d[1] == bytes / 4 && bytes % 4 == 0;
    return (words || is("table", in[1], {-1, bytes})) && is("scales", in[2], {vocab, hidden_ / group_});
  }

 private:
  DataType output_type() const { return fp32_ ? DataType::kFLOAT : DataType::kHALF; }

  int bits_, group_, hidden_;
  bool tiles_, fp32_;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* embedding_gather_creator() {
  static Creator<EmbeddingGather> creator;
  return &creator;
}

}  // namespace orin::trt
