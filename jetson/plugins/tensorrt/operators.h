// What the operators of domain `orin_kit` look like from outside: the plugins read it, and a test compares it with the
// graphs that orin_kit/export/dialects/trt_plugin.py writes. Neither TensorRT nor CUDA is needed to compile it.
// What they compute is said in orin_kit/export/plugin_ops.py.
#pragma once

namespace orin::trt {

constexpr char kNamespace[] = "orin_kit";
constexpr char kVersion[] = "1";
constexpr int kMaxAttributes = 6, kMaxInputs = 10, kMaxOutputs = 3;

enum class Kind { kNone, kInt, kFloat, kString };

struct Attribute {
  const char* name = nullptr;
  Kind kind = Kind::kNone;
};

// Element types, one bit each: a tensor may be of any that are set.
enum Types : unsigned { kFp16 = 1, kFp32 = 2, kInt8 = 4, kInt32 = 8, kInt64 = 16 };

// When an input is there. The rest follow without gaps.
enum class When { kNever, kAlways, kMaybe, kQkNorm, kInt8Cache };

struct Input {
  const char* name = nullptr;
  unsigned types = 0;
  When when = When::kNever;
};

struct Output {
  const char* name = nullptr;
  unsigned types = 0;
  int aliased = -1;  // the input whose memory it is
};

struct Operator {
  const char* name;
  Attribute attributes[kMaxAttributes];
  Input inputs[kMaxInputs];
  Output outputs[kMaxOutputs];

  constexpr int attribute_count() const {
    int n = 0;
    while (n < kMaxAttributes && attributes[n].kind != Kind::kNone) ++n;
    return n;
  }
  constexpr int output_count() const {
    int n = 0;
    while (n < kMaxOutputs && outputs[n].name != nullptr) ++n;
    return n;
  }
};

constexpr Operator kInt4Linear = {
    "Int4Linear",
    {{"N", Kind::kInt}, {"K", Kind::kInt}, {"group_size", Kind::kInt}, {"activation", Kind::kString}},
    {{"x", kFp16, When::kAlways},
     {"weight", kInt32, When::kAlways},
     {"scales", kFp16, When::kAlways},
     {"bias", kFp16, When::kMaybe}},
    {{"y", kFp16}}};

constexpr Operator kKvAttention = {
    "KvAttention",
    {{"num_heads", Kind::kInt},
     {"kv_num_heads", Kind::kInt},
     {"head_dim", Kind::kInt},
     {"scale", Kind::kFloat},
     {"qk_norm", Kind::kInt},
     {"norm_epsilon", Kind::kFloat}},
    {{"qkv", kFp16, When::kAlways},
     {"key_cache", kFp16 | kInt8, When::kAlways},
     {"value_cache", kFp16 | kInt8, When::kAlways},
     {"past_lengths", kInt32, When::kAlways},
     {"cos", kFp32, When::kAlways},
     {"sin", kFp32, When::kAlways},
     {"q_norm", kFp16, When::kQkNorm},
     {"k_norm", kFp16, When::kQkNorm},
     {"key_scale", kFp32, When::kInt8Cache},
     {"value_scale", kFp32, When::kInt8Cache}},
    {{"y", kFp16}, {"key_cache", kFp16 | kInt8, 1}, {"value_cache", kFp16 | kInt8, 2}}};

// TensorRT asks for the number of outputs before it tells of inputs: there are always two, and without a residual nobody
// reads the second, which is then not written.
constexpr Operator kSkipRmsNorm = {
    "SkipRmsNorm",
    {{"epsilon", Kind::kFloat}},
    {{"x", kFp16, When::kAlways}, {"weight", kFp16, When::kAlways}, {"residual", kFp16, When::kMaybe}},
    {{"y", kFp16}, {"sum", kFp16}}};

// A table in rows comes as bytes or as words of four, never as uint8: the ONNX parser makes int32 numbers of those
// (convertUINT8 in https://github.com/onnx/onnx-tensorrt/blob/release/10.3-GA/WeightsContext.cpp).
constexpr Operator kEmbeddingGather = {
    "EmbeddingGather",
    {{"bits", Kind::kInt},
     {"group_size", Kind::kInt},
     {"hidden_size", Kind::kInt},
     {"layout", Kind::kString},
     {"output_type", Kind::kInt}},
    {{"ids", kInt64, When::kAlways}, {"table", kInt8 | kInt32, When::kAlways}, {"scales", kFp16, When::kAlways}},
    {{"y", kFp16 | kFp32}}};

constexpr const Operator* kOperators[] = {&kInt4Linear, &kKvAttention, &kSkipRmsNorm, &kEmbeddingGather};

// Which of an operator's inputs stands at place `at` of a node, or -1.
constexpr int input_at(const Operator& op, int at, bool qk_norm, bool int8_cache) {
  for (int i = 0, place = 0; i < kMaxInputs && op.inputs[i].name != nullptr; ++i) {
    When when = op.inputs[i].when;
    bool there = when == When::kAlways || when == When::kMaybe || (when == When::kQkNorm && qk_norm) ||
                 (when == When::kInt8Cache && int8_cache);
    if (there && place++ == at) return i;
  }
  return -1;
}

}  // namespace orin::trt
