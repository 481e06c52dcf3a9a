// TensorRT's part in the life of a plugin, for test_wrappers.py: what the builder asks, then serialization, then a call on
// host memory with the emulated kernels. It is no TensorRT: that the real one asks the same is not shown.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

// The two functions of CUDA's that the plugins call themselves, for host memory.
extern "C" cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
extern "C" const char* cudaGetErrorString(cudaError_t) { return "an error"; }

namespace {

std::string said;

struct Logger final : ILogger {
  void log(Severity, const char* message) noexcept override { said += std::string(message) + "\n"; }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

struct Dimension final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Dimension(int64_t value) : value(value) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  int64_t value;
};

struct Expressions final : IExprBuilder, apiv::VExprBuilder {
  Expressions() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override {
    all.push_back(std::make_unique<Dimension>(value));
    return all.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  std::vector<std::unique_ptr<Dimension>> all;
};

}  // namespace

struct FieldArg {
  const char* name;
  int32_t type, length;
  const void* data;
};

struct TensorArg {
  int32_t type, rank;
  int64_t dims[8];
  void* address;
};

namespace {

PluginTensorDesc described(const TensorArg& tensor) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = tensor.rank;
  for (int i = 0; i < tensor.rank; ++i) desc.dims.d[i] = tensor.dims[i];
  desc.type = DataType(tensor.type);
  desc.format = TensorFormat::kLINEAR;
  return desc;
}

template <typename Part>
Part* part(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Part*>(plugin->getCapabilityInterface(type));
}

bool same_outputs(IPluginV3OneBuildV2* build, const std::vector<DynamicPluginTensorDesc>& all, int inputs, int outputs) {
  Expressions expressions;
  std::vector<DimsExprs> in(inputs), out(outputs);
  std::vector<DataType> in_types, out_types(outputs);
  for (int i = 0; i < inputs; ++i) {
    in[i].nbDims = all[i].desc.dims.nbDims;
    for (int d = 0; d < in[i].nbDims; ++d) in[i].d[d] = expressions.constant(all[i].desc.dims.d[d]);
    in_types.push_back(all[i].desc.type);
  }
  if (build->getOutputDataTypes(out_types.data(), outputs, in_types.data(), inputs)) return false;
  if (build->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), outputs, expressions)) return false;
  for (int o = 0; o < outputs; ++o) {
    const PluginTensorDesc& wanted = all[inputs + o].desc;
    if (out_types[o] != wanted.type || out[o].nbDims != wanted.dims.nbDims) return false;
    for (int d = 0; d < out[o].nbDims; ++d)
      if (out[o].d[d]->getConstantValue() != wanted.dims.d[d]) return false;
  }
  return true;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* driver_said() { return said.c_str(); }

// "" and what the plugin's enqueue returned in `status`; or at which step it went wrong. The timing cache's key in `key`.
extern "C" __attribute__((visibility("default"))) const char* drive(const char* op, const FieldArg* given, int fields,
                                                                    const TensorArg* tensors, int inputs, int outputs,
                                                                    int* status, char* key) {
  said.clear();
  setLoggerFinder(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  IPluginCreatorV3One* creator = nullptr;
  for (int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (!std::strcmp(one->getPluginName(), op) && !std::strcmp(one->getPluginVersion(), "1") &&
        !std::strcmp(one->getPluginNamespace(), "orin_kit"))
      creator = one;
  }
  if (!creator) return "no creator";
  // As the ONNX parser does: only the fields that the creator names.
  std::vector<PluginField> taken;
  const PluginFieldCollection* names = creator->getFieldNames();
  for (int32_t n = 0; n < names->nbFields; ++n)
    for (int f = 0; f < fields; ++f)
      if (!std::strcmp(names->fields[n].name, given[f].name))
        taken.emplace_back(given[f].name, given[f].data, PluginFieldType(given[f].type), given[f].length);
  PluginFieldCollection collection{int32_t(taken.size()), taken.data()};
  std::unique_ptr<IPluginV3> built(creator->createPlugin("node", &collection, TensorRTPhase::kBUILD));
  if (!built) return "createPlugin";
  auto* build = part<IPluginV3OneBuildV2>(built.get(), PluginCapabilityType::kBUILD);
  if (build->getNbOutputs() != outputs) return "getNbOutputs";

  std::vector<DynamicPluginTensorDesc> all;
  std::vector<PluginTensorDesc> fixed;
  for (int i = 0; i < inputs + outputs; ++i) {
    fixed.push_back(described(tensors[i]));
    all.push_back({fixed.back(), fixed.back().dims, fixed.back().dims, fixed.back().dims});
  }
  if (!same_outputs(build, all, inputs, outputs)) return "getOutputDataTypes or getOutputShapes";
  for (int at = 0; at < inputs + outputs; ++at) {
    if (!build->supportsFormatCombination(at, all.data(), inputs, outputs)) return "supportsFormatCombination";
    std::vector<DynamicPluginTensorDesc> other = all;
    other[at].desc.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(at, other.data(), inputs, outputs)) return "it supports kCHW32";
    other[at] = all[at];
    other[at].desc.type = DataType::kBF16;
    if (build->supportsFormatCombination(at, other.data(), inputs, outputs)) return "it supports kBF16";
  }
  if (build->configurePlugin(all.data(), inputs, all.data() + inputs, outputs)) return "configurePlugin";
  size_t bytes = build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
  for (int o = 0; o < outputs; ++o) {
    int aliased = build->getAliasedInput(o);
    if (aliased >= 0 && tensors[aliased].address != tensors[inputs + o].address && tensors[aliased].address)
      said += "not aliased\n";
    if (aliased < 0)
      for (int i = 0; i < inputs; ++i)
        if (tensors[i].address == tensors[inputs + o].address) return "getAliasedInput";
  }
  std::strncpy(key, build->getTimingCacheID(), 255);

  std::unique_ptr<IPluginV3> cloned(built->clone());
  auto* serialized = part<IPluginV3OneRuntime>(cloned.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> loaded(creator->createPlugin("node", serialized, TensorRTPhase::kRUNTIME));
  if (!loaded) return "createPlugin at run time";
  built.reset(), cloned.reset();
  auto* runtime = part<IPluginV3OneRuntime>(loaded.get(), PluginCapabilityType::kRUNTIME);
  std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
  loaded.reset();
  runtime = part<IPluginV3OneRuntime>(attached.get(), PluginCapabilityType::kRUNTIME);
  if (runtime->onShapeChange(fixed.data(), inputs, fixed.data() + inputs, outputs)) return "onShapeChange";
  std::vector<const void*> from;
  std::vector<void*> to;
  for (int i = 0; i < inputs; ++i) from.push_back(tensors[i].address);
  for (int o = 0; o < outputs; ++o) to.push_back(tensors[inputs + o].address);
  std::unique_ptr<char, void (*)(void*)> workspace(static_cast<char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256)),
                                                  std::free);
  std::memset(workspace.get(), 0xFF, bytes);
  *status = runtime->enqueue(fixed.data(), fixed.data() + inputs, from.data(), to.data(), workspace.get(), nullptr);
  return "";
}
