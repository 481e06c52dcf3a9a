// Kernels with one mistake each, which the emulator must find; `right` is each one mended. See test_emulator.py.
#include "cuda.cuh"
#include "ptx.cuh"

namespace {

using namespace orin;

// Each thread takes its neighbour's value from shared memory.
__global__ void rotate(float* y, int right) {
  ORIN_SHARED(float, values, 128);
  int i = int(threadIdx.x);
  values[i] = float(i);
  if (right) __syncthreads();
  y[i] = values[(i + 37) % 128];
}

// Twice over, so that the second round may overwrite what the first is still reading.
__global__ void rotate_twice(float* y, int right) {
  ORIN_SHARED(float, values, 128);
  int i = int(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    values[i] = float(i + 1000 * round);
    __syncthreads();
    sum += values[(i + 37) % 128];
    if (right) __syncthreads();
  }
  y[i] = sum;
}

__global__ void copy(float* y, const float* x, int right) {
  float4* shared = reinterpret_cast<float4*>(dynamic_shared());
  int i = int(threadIdx.x);
  cp_async_16(shared + i, x + 4 * i);
  cp_async_commit();
  cp_async_commit();  // an empty group
  if (right) cp_async_wait<1>();
  y[i] = shared[i].x + shared[i].w;
}

__global__ void half_a_barrier(float* y, int right) {
  if (right || threadIdx.x < 64) __syncthreads();
  if (!right && threadIdx.x >= 64) __syncwarp(0xffffffffu << (threadIdx.x % 2));
  y[threadIdx.x] = 1;
}

__global__ void half_a_warp(float* y, int right) {
  float v = float(threadIdx.x);
  if (right || threadIdx.x % 32 < 16) v = __shfl_xor_sync(kFullWarp, v, 1);
  y[threadIdx.x] = v;
}

__global__ void behind_shared(float* y, int right) {
  reinterpret_cast<float*>(dynamic_shared())[threadIdx.x + (right ? 0u : 1u)] = 1;
  y[threadIdx.x] = 1;
}

__global__ void misaligned(float* y, const float* x, int right) {
  y[threadIdx.x] = __uint_as_float(load_16(x + 4 * threadIdx.x + (right ? 0 : 1)).x);
}

// Blocks must not depend on the order of others.
__global__ void after_block_before(float* y, int right) {
  int i = int(blockIdx.x);
  y[i] = right || i == 0 ? float(i) : y[i - 1] + 1;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) orin_status run_broken(const char* name, int right, float* y,
                                                                         const float* x) {
  dim3 one{1}, threads{128};
  switch (name[0] * 256 + name[1]) {
    case 'r' * 256 + 'o': return launch(rotate, one, threads, 0, nullptr, y, right);
    case 't' * 256 + 'w': return launch(rotate_twice, one, threads, 0, nullptr, y, right);
    case 'c' * 256 + 'o': return launch(copy, one, threads, 128 * 16, nullptr, y, x, right);
    case 'b' * 256 + 'a': return launch(half_a_barrier, one, threads, 0, nullptr, y, right);
    case 'w' * 256 + 'a': return launch(half_a_warp, one, threads, 0, nullptr, y, right);
    case 's' * 256 + 'h': return launch(behind_shared, one, threads, 128 * 4, nullptr, y, right);
    case 'm' * 256 + 'i': return launch(misaligned, one, threads, 0, nullptr, y, x, right);
    case 'b' * 256 + 'l': return launch(after_block_before, dim3{128}, dim3{1}, 0, nullptr, y, right);
    case 't' * 256 + 'h': return launch(rotate, one, dim3{right ? 128u : 2000u}, 0, nullptr, y, 1);
    default: return fail(ORIN_BAD_ARGUMENT, "no kernel %s", name);
  }
}
