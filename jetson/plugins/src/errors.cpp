#include "errors.h"

#include <cstdarg>
#include <cstdio>

#ifndef ORIN_VERSION
#define ORIN_VERSION "0.1.0"
#endif
#ifndef ORIN_TARGETS
#define ORIN_TARGETS "emulator"
#endif

namespace orin {
namespace {
thread_local char last_error[512] = "";
}

orin_status fail(orin_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace orin

extern "C" const char* orin_last_error(void) { return orin::last_error; }
extern "C" const char* orin_version(void) { return ORIN_VERSION " " ORIN_TARGETS; }
