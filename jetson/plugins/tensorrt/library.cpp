// What IPluginRegistry::loadLibrary looks for (https://github.com/NVIDIA/TensorRT/tree/main/samples/trtexec, "Custom
// Plugins"): load the library through it, in Python `trt.get_plugin_registry().load_library(path)`.
//
// Nothing registers itself when the library is opened: loadLibrary fails where a plugin is registered already, and the
// library's C functions serve programs that have no TensorRT. For the same reason nothing here may need a symbol of
// libnvinfer; tests/jetson/test_wrappers.py checks it.
#include <atomic>
#include <cstdio>

#include "plugin.h"

namespace orin::trt {
namespace {
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}

void say(Severity severity, const std::string& message) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger)
    logger->log(severity, message.c_str());
  else
    std::fprintf(stderr, "orin-kit: %s\n", message.c_str());
}

}  // namespace orin::trt

extern "C" ORIN_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { orin::trt::logger_finder = finder; }

extern "C" ORIN_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {
      orin::trt::int4_linear_creator(), orin::trt::kv_attention_creator(), orin::trt::skip_rms_norm_creator(),
      orin::trt::embedding_gather_creator()};
  count = int32_t(sizeof creators / sizeof *creators);
  return creators;
}
