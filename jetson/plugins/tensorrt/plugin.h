// What our four plugins share: everything that operators.h knows about them. A plugin adds its shapes, its checks, its
// workspace and the call of its kernel.
// https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/extending-custom-layers.html
#pragma once

#include <NvInferRuntime.h>

#include <initializer_list>
#include <new>
#include <string>
#include <vector>

#include "attributes.h"
#include "operators.h"
#include "orin_kernels.h"

namespace orin::trt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;

// The bit that operators.h has for a type; 0 where it has none.
unsigned type_bit(DataType type);
std::string in_words(const Dims& dims);
// The product of all dimensions but the last `without`.
int64_t rows_of(const Dims& dims, int without = 1);

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Operator& op, const Attributes& attributes) : op_(op), attributes_(attributes) {}

  // IPluginV3, and what all versions of its parts ask
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build
  int32_t getNbOutputs() const noexcept override { return op_.output_count(); }
  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out,
                          int32_t outputs) noexcept override;
  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override { return op_.outputs[output].aliased; }
  const char* getTimingCacheID() noexcept override { return description(); }
  const char* getMetadataString() noexcept override { return description(); }

  // Runtime
  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
                        int32_t outputs) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 protected:
  // Whether tensors with these dimensions (-1: not known yet) are what the attributes say; says why not.
  virtual bool fits(const std::vector<Dims>& inputs) const = 0;
  // Whether the type at place `at` goes with those before it, beyond what operators.h says.
  virtual bool type_fits(int32_t, const DynamicPluginTensorDesc*, int32_t) const { return true; }
  // Which of the operator's inputs stands at place `at` of `inputs`; -1 where there is none such.
  virtual int input_index(int32_t at, int32_t) const { return input_at(op_, at, false, false); }

  // Says what is wrong and returns false where a known dimension is not the wanted one; -1 wants nothing.
  bool is(const char* input, const Dims& dims, std::initializer_list<int64_t> wanted) const;
  bool is_last(const char* input, const Dims& dims, int64_t wanted) const;
  // What enqueue returns; says what a failing kernel said.
  int32_t result(orin_status status) const;
  const Attributes& attributes() const { return attributes_; }

 private:
  const char* description() noexcept;

  const Operator& op_;
  Attributes attributes_;
  std::string description_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{0, nullptr};
};

// Reads attributes and makes plugins. `P::kOperator` is what operators.h says, `P::wrong` what is not to be had.
template <typename P>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(field_names(P::kOperator)), collection_{int32_t(fields_.size()), fields_.data()} {}

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override try {
    std::optional<Attributes> attributes = Attributes::read(P::kOperator, name, fields);
    if (!attributes) return nullptr;
    std::string why = P::wrong(*attributes);
    if (why.empty()) return new P(*attributes);
    say(Severity::kERROR, std::string(P::kOperator.name) + " " + (name ? name : "") + ": " + why);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return P::kOperator.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// One for the whole process.
nvinfer1::IPluginCreatorInterface* int4_linear_creator();
nvinfer1::IPluginCreatorInterface* kv_attention_creator();
nvinfer1::IPluginCreatorInterface* skip_rms_norm_creator();
nvinfer1::IPluginCreatorInterface* embedding_gather_creator();

}  // namespace orin::trt
