// CUDA, or what stands in for it when the kernels are compiled for a CPU (ORIN_EMULATE); and how kernels are launched.
#pragma once

#include "errors.h"
#include "orin_kernels.h"

#ifdef ORIN_EMULATE
#include "../emulator/cuda_emulator.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Static shared memory: `ORIN_SHARED(float, sums, 32)` is `__shared__ float sums[32]`. Do not take its sizeof.
#ifdef ORIN_EMULATE
#define ORIN_SHARED(type, name, count)  \
  static const char name##_key = 0;     \
  type* const name = static_cast<type*>(::orin::emulator::static_shared(&name##_key, sizeof(type) * (count)))
#else
#define ORIN_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

namespace orin {

constexpr size_t kDefaultShared = 48 * 1024;  // of a block, without asking for more
constexpr uint32_t kFullWarp = 0xffffffffu;

#ifdef ORIN_EMULATE

__device__ inline char* dynamic_shared() { return static_cast<char*>(emulator::dynamic_shared()); }

inline orin_status multiprocessors(int* sms) {
  *sms = emulator::sms();
  return ORIN_OK;
}

template <typename... Parameters, typename... Arguments>
orin_status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, orin_stream,
                   Arguments... arguments) {
  if (emulator::run(grid, block, shared_bytes, [=] { kernel(arguments...); })) return ORIN_OK;
  return fail(ORIN_CUDA_ERROR, "%s", emulator::error());
}

#else

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char orin_dynamic_shared[];
  return orin_dynamic_shared;
}

inline orin_status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return ORIN_OK;
  return fail(ORIN_CUDA_ERROR, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

// Of the current device. Neither call touches a stream, so a graph may be under capture.
inline orin_status multiprocessors(int* sms) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device);
  return checked(error, "asking for the number of multiprocessors");
}

// Launches and reports what the launch itself had to say; what the kernel does later shows at the next synchronisation.
template <typename... Parameters, typename... Arguments>
orin_status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, orin_stream stream,
                   Arguments... arguments) {
  if (shared_bytes > kDefaultShared) {
    orin_status status = checked(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                      cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
                                 "asking for shared memory");
    if (status != ORIN_OK) return status;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return checked(cudaGetLastError(), "launching a kernel");
}

#endif

}  // namespace orin
