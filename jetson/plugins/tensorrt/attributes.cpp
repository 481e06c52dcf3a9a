#include "attributes.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace orin::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

PluginFieldType field_type(Kind kind) {
  switch (kind) {
    case Kind::kInt: return PluginFieldType::kINT32;
    case Kind::kFloat: return PluginFieldType::kFLOAT32;
    case Kind::kString: return PluginFieldType::kCHAR;
    case Kind::kNone: break;
  }
  return PluginFieldType::kUNKNOWN;
}

const char* in_words(Kind kind) {
  return kind == Kind::kInt ? "one int32" : kind == Kind::kFloat ? "one float" : "a string";
}

std::string in_words(float number) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", double(number));
  return buffer;
}

}  // namespace

std::optional<Attributes> Attributes::read(const Operator& op, const char* node,
                                           const nvinfer1::PluginFieldCollection* fields) {
  Attributes read(op);
  std::string where = std::string(op.name) + " " + (node ? node : "");
  for (int a = 0; a < op.attribute_count(); ++a) {
    const Attribute& wanted = op.attributes[a];
    const PluginField* found = nullptr;
    for (int32_t i = 0; fields && i < fields->nbFields; ++i)
      if (std::strcmp(fields->fields[i].name, wanted.name) == 0) found = &fields->fields[i];
    if (!found) {
      say(Severity::kERROR, where + ": the attribute " + wanted.name + " is missing: export the model again");
      return std::nullopt;
    }
    if (!read.take(a, *found)) {
      say(Severity::kERROR, where + ": the attribute " + wanted.name + " is not " + in_words(wanted.kind));
      return std::nullopt;
    }
  }
  return read;
}

bool Attributes::take(int at, const PluginField& field) {
  Kind kind = op_->attributes[at].kind;
  if (field.type != field_type(kind) || field.data == nullptr) return false;
  Value& value = values_[at];
  if (kind == Kind::kString) {
    // The parser counts the zero at the end.
    const char* text = static_cast<const char*>(field.data);
    value.text.assign(text, strnlen(text, size_t(field.length)));
    return true;
  }
  if (field.length != 1) return false;
  if (kind == Kind::kInt)
    std::memcpy(&value.integer, field.data, sizeof value.integer);
  else
    std::memcpy(&value.number, field.data, sizeof value.number);
  return true;
}

const Attributes::Value& Attributes::value(const char* name, Kind kind) const {
  for (int a = 0; a < op_->attribute_count(); ++a)
    if (std::strcmp(op_->attributes[a].name, name) == 0 && op_->attributes[a].kind == kind) return values_[a];
  std::fprintf(stderr, "orin-kit: %s has no attribute %s of this type\n", op_->name, name);
  std::abort();  // a mistake in this library: the names are written in it
}

std::vector<PluginField> Attributes::fields() const {
  std::vector<PluginField> all;
  for (int a = 0; a < op_->attribute_count(); ++a) {
    const Attribute& one = op_->attributes[a];
    const Value& value = values_[a];
    const void* data = one.kind == Kind::kInt     ? static_cast<const void*>(&value.integer)
                       : one.kind == Kind::kFloat ? static_cast<const void*>(&value.number)
                                                  : static_cast<const void*>(value.text.c_str());
    int32_t length = one.kind == Kind::kString ? int32_t(value.text.size()) + 1 : 1;
    all.emplace_back(one.name, data, field_type(one.kind), length);
  }
  return all;
}

std::string Attributes::description() const {
  std::string all;
  for (int a = 0; a < op_->attribute_count(); ++a) {
    const Attribute& one = op_->attributes[a];
    const Value& value = values_[a];
    all += std::string(a ? "," : "") + one.name + "=";
    all += one.kind == Kind::kInt ? std::to_string(value.integer) : one.kind == Kind::kFloat ? in_words(value.number) : value.text;
  }
  return all;
}

std::vector<PluginField> field_names(const Operator& op) {
  std::vector<PluginField> all;
  for (int a = 0; a < op.attribute_count(); ++a)
    all.emplace_back(op.attributes[a].name, nullptr, field_type(op.attributes[a].kind), 1);
  return all;
}

}  // namespace orin::trt
