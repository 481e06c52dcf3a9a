// orin_argmax: a key for each part of 4096 logits, then the largest key of a row.
#include "cuda.cuh"
#include "orin_layout.h"
#include "reduce.cuh"

namespace orin {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float logit(const float* p) { return *p; }
__device__ __forceinline__ float logit(const __half* p) { return __half2float(*p); }

template <typename T>
__global__ void __launch_bounds__(kThreads) argmax_parts_kernel(const T* logits, int vocab, uint64_t* keys) {
  const T* row = logits + size_t(blockIdx.y) * vocab;
  int first = int(blockIdx.x) * kArgmaxValues, end = smaller(first + kArgmaxValues, vocab);
  uint64_t best = 0;
  for (int i = first + int(threadIdx.x); i < end; i += kThreads)
    best = Larger()(best, argmax_key(__float_as_uint(logit(row + i)), uint32_t(i)));
  best = reduce_block(best, uint64_t(0), Larger());
  if (threadIdx.x == 0) keys[size_t(blockIdx.y) * gridDim.x + blockIdx.x] = best;
}

__global__ void __launch_bounds__(32) argmax_rows_kernel(const uint64_t* keys, int parts, int64_t* index) {
  uint64_t best = 0;
  for (int i = int(threadIdx.x); i < parts; i += 32) best = Larger()(best, keys[size_t(blockIdx.x) * parts + i]);
  best = reduce_warp(best, Larger());
  if (threadIdx.x == 0) index[blockIdx.x] = int64_t(argmax_index(best));
}

}  // namespace
}  // namespace orin

extern "C" size_t orin_argmax_workspace(int32_t rows, int32_t vocab) {
  if (rows < 1 || vocab < 1) return 0;
  return size_t(rows) * orin::argmax_parts(vocab) * sizeof(uint64_t);
}

extern "C" orin_status orin_argmax(const void* logits, int32_t fp16, int32_t rows, int32_t vocab, int64_t* index,
                                   void* workspace, size_t bytes, orin_stream stream) {
  using namespace orin;
  ORIN_REQUIRE(rows >= 0 && rows <= kMaxGridY, "orin_argmax: rows is %d, want 0 to %d", rows, kMaxGridY);
  ORIN_REQUIRE(vocab > 0, "orin_argmax: vocab is %d, want 1 or more", vocab);
  if (rows == 0) return ORIN_OK;
  ORIN_REQUIRE_POINTER("orin_argmax", logits);
  ORIN_REQUIRE_POINTER("orin_argmax", index);
  ORIN_REQUIRE_WORKSPACE("orin_argmax", workspace, bytes, orin_argmax_workspace(rows, vocab));
  int parts = argmax_parts(vocab);
  uint64_t* keys = static_cast<uint64_t*>(workspace);
  dim3 grid{unsigned(parts), unsigned(rows)};
  ORIN_RETURN_IF_FAILED(fp16 ? launch(argmax_parts_kernel<__half>, grid, dim3(kThreads), 0, stream,
                                      static_cast<const __half*>(logits), vocab, keys)
                             : launch(argmax_parts_kernel<float>, grid, dim3(kThreads), 0, stream,
                                      static_cast<const float*>(logits), vocab, keys));
  return launch(argmax_rows_kernel, dim3(unsigned(rows)), dim3(32), 0, stream, static_cast<const uint64_t*>(keys),
                parts, index);
}
