#include "plugin.h"

namespace orin::trt {
namespace {

class SkipRmsNorm final : public Plugin {
 public:
  static constexpr const Operator& kOperator = kSkipRmsNorm;

  explicit SkipRmsNorm(const Attributes& a) : Plugin(kOperator, a), epsilon_(a.number("epsilon")) {}

  static std::string wrong(const Attributes& a) {
    float epsilon = a.number("epsilon");
    return epsilon >= 0 ? "" : "epsilon is " + std::to_string(epsilon) + ", want 0 or more";
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) SkipRmsNorm(*this); }

  int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t) const noexcept override {
    out[0] = out[1] = in[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t, const DimsExprs*, int32_t, DimsExprs* out, int32_t,
                          IExprBuilder&) noexcept override {
    out[0] = out[1] = in[0];
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void*, cudaStream_t stream) noexcept override {
    const Dims& x = in[0].dims;
    const void* residual = has_residual_ ? inputs[2] : nullptr;
    void* sum = has_residual_ ? outputs[1] : nullptr;
    return result(orin_skip_rms_norm(inputs[0], inputs[1], residual, outputs[0], sum, int32_t(rows_of(x)),
                                     int32_t(x.d[x.nbDims - 1]), epsilon_, stream));
  }

 protected:
  bool fits(const std::vector<Dims>& in) const override {
    if (in.size() < 2 || in.size() > 3) {
      say(Severity::kERROR, "SkipRmsNorm: " + std::to_string(in.size()) + " inputs, want 2 or, with a residual, 3");
      return false;
    }
    has_residual_ = in.size() == 3;
    int64_t hidden = in[1].nbDims == 1 ? in[1].d[0] : -1;
    if (!is("weight", in[1], {-1}) || (hidden >= 0 && !is_last("x", in[0], hidden))) return false;
    return !has_residual_ || hidden < 0 || is_last("residual", in[2], hidden);
  }

 private:
  float epsilon_;
  mutable bool has_residual_ = false;  // as Int4Linear's has_bias_
};

}  // namespace

nvinfer1::IPluginCreatorInterface* skip_rms_norm_creator() {
  static Creator<SkipRmsNorm> creator;
  return &creator;
}

}  // namespace orin::trt
