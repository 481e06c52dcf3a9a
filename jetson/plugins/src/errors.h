// What failing calls leave behind for orin_last_error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "orin_kernels.h"

namespace orin {

// Keeps the message for this thread and returns `status`.
orin_status fail(orin_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

constexpr int kMaxGridY = 65535;  // and of z

inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace orin

// Ends the calling function where `condition` does not hold; the rest is a printf of what is wrong and what is wanted.
#define ORIN_REQUIRE(condition, ...)                                            \
  do {                                                                          \
    if (!(condition)) return ::orin::fail(ORIN_BAD_ARGUMENT, __VA_ARGS__);      \
  } while (0)

// A device pointer that a call needs.
#define ORIN_REQUIRE_POINTER(function, pointer)                                                        \
  do {                                                                                                 \
    ORIN_REQUIRE((pointer) != nullptr, "%s: %s is NULL", function, #pointer);                          \
    ORIN_REQUIRE(::orin::aligned_16(pointer), "%s: %s is not aligned to 16 bytes", function, #pointer); \
  } while (0)

#define ORIN_REQUIRE_WORKSPACE(function, pointer, given, wanted)                                            \
  do {                                                                                                      \
    size_t orin_wanted_ = (wanted);                                                                         \
    if ((given) < orin_wanted_)                                                                             \
      return ::orin::fail(ORIN_SMALL_WORKSPACE, "%s: the workspace has %zu bytes, want %zu", function,      \
                          size_t(given), orin_wanted_);                                                     \
    if (orin_wanted_) ORIN_REQUIRE_POINTER(function, pointer);                                              \
  } while (0)

#define ORIN_RETURN_IF_FAILED(call)                \
  do {                                             \
    orin_status orin_status_ = (call);             \
    if (orin_status_ != ORIN_OK) return orin_status_; \
  } while (0)
