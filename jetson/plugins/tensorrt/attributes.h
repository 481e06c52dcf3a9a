// A plugin's attributes: read from what the ONNX parser or a serialized engine gives, and given back to be serialized.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "operators.h"

namespace orin::trt {

using Severity = nvinfer1::ILogger::Severity;

// To TensorRT's logger where it has given one, else to stderr.
void say(Severity severity, const std::string& message) noexcept;

class Attributes {
 public:
  // Every attribute of the operator must be there, with its type. Otherwise says which is not and returns nothing.
  static std::optional<Attributes> read(const Operator& op, const char* node,
                                        const nvinfer1::PluginFieldCollection* fields);

  int32_t integer(const char* name) const { return value(name, Kind::kInt).integer; }
  float number(const char* name) const { return value(name, Kind::kFloat).number; }
  const std::string& text(const char* name) const { return value(name, Kind::kString).text; }

  // They point into this object.
  std::vector<nvinfer1::PluginField> fields() const;
  // "N=1536,K=8960,group_size=128,activation=none"
  std::string description() const;

 private:
  struct Value {
    int32_t integer = 0;
    float number = 0;
    std::string text;
  };

  explicit Attributes(const Operator& op) : op_(&op) {}
  bool take(int at, const nvinfer1::PluginField& field);
  const Value& value(const char* name, Kind kind) const;

  const Operator* op_;
  std::array<Value, kMaxAttributes> values_;
};

// What a creator has to offer.
std::vector<nvinfer1::PluginField> field_names(const Operator& op);

}  // namespace orin::trt
