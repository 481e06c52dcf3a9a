#include "orin_layout.h"
#include "plugin.h"

namespace orin::trt {
namespace {

class Int4Linear final : public Plugin {
 public:
  static constexpr const Operator& kOperator = kInt4Linear;

  explicit Int4Linear(const Attributes& a)
      : Plugin(kOperator, a),
        n_(a.integer("N")),
        k_(a.integer("K")),
        group_(a.integer("group_size")),
        gate_(a.text("activation") == "silu_gate") {}

  static std::string wrong(const Attributes& a) {
    int n = a.integer("N"), k = a.integer("K"), group = a.integer("group_size");
    const std::string& activation = a.text("activation");
    if (activation != "none" && activation != "silu_gate")
      return "activation is \"" + activation + "\", want \"none\" or \"silu_gate\"";
    int rows = activation == "none" ? kTileRows : 2 * kTileRows;
    if (n <= 0 || n % rows) return "N is " + std::to_string(n) + ", want a multiple of " + std::to_string(rows);
    if (k <= 0 || k % kBlockK) return "K is " + std::to_string(k) + ", want a multiple of " + std::to_string(kBlockK);
    if (group != 32 && group != 64 && group != 128)
      return "group_size is " + std::to_string(group) + ", want 32, 64 or 128";
    return "";
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) Int4Linear(*this); }

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t) const noexcept override {
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t, const DimsExprs*, int32_t, DimsExprs* out, int32_t,
                          IExprBuilder& expressions) noexcept override {
    out[0] = in[0];
    out[0].d[out[0].nbDims - 1] = expressions.constant(gate_ ? n_ / 2 : n_);
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return orin_int4_linear_workspace(int32_t(rows_of(in[0].max)), n_, k_);
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    orin_int4_linear_args args{};
    args.rows = int32_t(rows_of(in[0].dims));
    args.n = n_, args.k = k_, args.group_size = group_;
    args.activation = gate_ ? ORIN_ACTIVATION_SILU_GATE : ORIN_ACTIVATION_NONE;
    args.x = inputs[0], args.weight = inputs[1], args.scales = inputs[2];
    args.bias = has_bias_ ? inputs[3] : nullptr;
    args.y = outputs[0];
    return result(orin_int4_linear(&args, workspace, orin_int4_linear_workspace(args.rows, n_, k_), stream));
  }

 protected:
  bool fits(const std::vector<Dims>& in) const override {
    if (in.size() < 3 || in.size() > 4) return count_wrong(in.size());
    has_bias_ = in.size() == 4;
    return is_last("x", in[0], k_) && is("weight", in[1], {n_ / kTileRows, k_ / kBlockK, 8, 4, 4}) &&
           is("scales", in[2], {k_ / group_, n_}) && (!has_bias_ || is("bias", in[3], {n_}));
  }

 private:
  static bool count_wrong(size_t count) {
    say(Severity::kERROR, "Int4Linear: " + std::to_string(count) + " inputs, want 3 or, with a bias, 4");
    return false;
  }

  int n_, k_, group_;
  bool gate_;
  mutable bool has_bias_ = false;  // enqueue is not told how many inputs there are; onShapeChange comes before it
};

}  // namespace

nvinfer1::IPluginCreatorInterface* int4_linear_creator() {
  static Creator<Int4Linear> creator;
  return &creator;
}

}  // namespace orin::trt
