#include "plugin.h"

namespace orin::trt {

unsigned type_bit(DataType type) {
  switch (type) {
    case DataType::kHALF: return kFp16;
    case DataType::kFLOAT: return kFp32;
    case DataType::kINT8: return kInt8;
    case DataType::kINT32: return kInt32;
    case DataType::kINT64: return kInt64;
    default: return 0;
  }
}

std::string in_words(const Dims& dims) {
  std::string all = "[";
  for (int i = 0; i < dims.nbDims; ++i) all += (i ? ", " : "") + std::to_string(dims.d[i]);
  return all + "]";
}

int64_t rows_of(const Dims& dims, int without) {
  int64_t rows = 1;
  for (int i = 0; i < dims.nbDims - without; ++i) rows *= dims.d[i];
  return rows;
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                int32_t) noexcept {
  std::vector<Dims> dims;
  for (int32_t i = 0; i < inputs; ++i) dims.push_back(in[i].desc.dims);
  return fits(dims) ? 0 : 1;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*, int32_t) noexcept {
  std::vector<Dims> dims;
  for (int32_t i = 0; i < inputs; ++i) dims.push_back(in[i].dims);
  return fits(dims) ? 0 : 1;
}

bool Plugin::supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                       int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[at].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  unsigned bit = type_bit(tensor.type);
  if (at < inputs) {
    int index = input_index(at, inputs);
    if (index < 0 || !(op_.inputs[index].types & bit)) return false;
  } else {
    const Output& output = op_.outputs[at - inputs];
    if (!(output.types & bit)) return false;
    if (output.aliased >= 0 && tensor.type != tensors[output.aliased].desc.type) return false;
  }
  return type_fits(at, tensors, inputs);
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  fields_ = attributes_.fields();
  collection_ = {int32_t(fields_.size()), fields_.data()};
  return &collection_;
}

const char* Plugin::description() noexcept {
  description_ = attributes_.description();
  return description_.c_str();
}

bool Plugin::is(const char* input, const Dims& dims, std::initializer_list<int64_t> wanted) const {
  bool good = dims.nbDims == int32_t(wanted.size());
  std::string want;
  int i = 0;
  for (int64_t size : wanted) {
    if (good && size >= 0 && dims.d[i] >= 0 && dims.d[i] != size) good = false;
    want += (i++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
    if (i > dims.nbDims) good = false;
  }
  if (!good)
    say(Severity::kERROR, std::string(op_.name) + ": " + input + " is " + in_words(dims) + ", want [" + want + "]");
  return good;
}

bool Plugin::is_last(const char* input, const Dims& dims, int64_t wanted) const {
  int64_t last = dims.nbDims > 0 ? dims.d[dims.nbDims - 1] : 0;
  if (dims.nbDims > 0 && (last < 0 || last == wanted)) return true;
  say(Severity::kERROR, std::string(op_.name) + ": " + input + " is " + in_words(dims) + ", want [..., " +
                            std::to_string(wanted) + "]");
  return false;
}

int32_t Plugin::result(orin_status status) const {
  if (status == ORIN_OK) return 0;
  say(Severity::kERROR, std::string(op_.name) + ": " + orin_last_error());
  return int32_t(status);
}

}  // namespace orin::trt
