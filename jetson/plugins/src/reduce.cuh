// Sums and maxima over a warp or a block.
#pragma once

#include "cuda.cuh"

namespace orin {

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Every lane gets the result.
template <typename T, typename Combine>
__device__ __forceinline__ T reduce_warp(T value, Combine combine) {
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kFullWarp, value, step));
  return value;
}

// Every thread of the block (whole warps, 1024 threads at most) gets the result. Once a kernel: a second call would
// need a barrier before it.
template <typename T, typename Combine>
__device__ __forceinline__ T reduce_block(T value, T neutral, Combine combine) {
  ORIN_SHARED(T, of_warps, 32);
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  value = reduce_warp(value, combine);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  return reduce_warp(lane < warps ? of_warps[lane] : neutral, combine);
}

}  // namespace orin
