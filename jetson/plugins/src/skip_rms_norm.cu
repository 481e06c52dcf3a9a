// orin_skip_rms_norm: a block for each row, which stays in registers between the sum and the norm.
#include "cuda.cuh"
#include "orin_layout.h"
#include "ptx.cuh"
#include "reduce.cuh"

namespace orin {
namespace {

constexpr int kVector = 8;  // halves of 16 bytes
constexpr int kMaxThreads = 1024;

struct NormArgs {
  const __half* x;
  const __half* weight;
  const __half* residual;
  __half* y;
  __half* sum;
  int hidden;
  float epsilon;
};

// Two rows of 8 halves summed in fp32 and rounded to fp16 once.
__device__ __forceinline__ uint4 add_halves(uint4 a, uint4 b) {
  uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 p = __half22float2(bits_half2(left[i])), q = __half22float2(bits_half2(right[i]));
    left[i] = half2_bits(__floats2half2_rn(p.x + q.x, p.y + q.y));
  }
  return make_uint4(left[0], left[1], left[2], left[3]);
}

__device__ __forceinline__ float sum_of_squares(uint4 v) {
  uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 p = __half22float2(bits_half2(pairs[i]));
    sum += p.x * p.x + p.y * p.y;
  }
  return sum;
}

__device__ __forceinline__ uint4 scaled(uint4 v, uint4 weight, float scale) {
  uint32_t pairs[4] = {v.x, v.y, v.z, v.w}, weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 p = __half22float2(bits_half2(pairs[i])), w = __half22float2(bits_half2(weights[i]));
    pairs[i] = half2_bits(__floats2half2_rn(p.x * scale * w.x, p.y * scale * w.y));
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <int kChunks>  // of 8 halves that a thread keeps
__global__ void __launch_bounds__(kMaxThreads) skip_rms_norm_kernel(NormArgs args) {
  size_t row = size_t(blockIdx.x) * args.hidden;
  uint4 kept[kChunks] = {}, weight[kChunks] = {};
  float squares = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    int i = int(threadIdx.x + c * blockDim.x) * kVector;
    if (i >= args.hidden) continue;
    kept[c] = load_16(args.x + row + i);
    weight[c] = load_16(args.weight + i);  // now, so that it is there when the sum is
    if (args.residual) {
      kept[c] = add_halves(kept[c], load_16(args.residual + row + i));
      store_16(args.sum + row + i, kept[c]);
    }
    squares += sum_of_squares(kept[c]);
  }
  float scale = rsqrtf(reduce_block(squares, 0.0f, Sum()) / float(args.hidden) + args.epsilon);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    int i = int(threadIdx.x + c * blockDim.x) * kVector;
    if (i < args.hidden) store_16(args.y + row + i, scaled(kept[c], weight[c], scale));
  }
}

}  // namespace
}  // namespace orin

extern "C" orin_status orin_skip_rms_norm(const void* x, const void* weight, const void* residual, void* y, void* sum,
                                          int32_t rows, int32_t hidden, float epsilon, orin_stream stream) {
  using namespace orin;
  const char* name = "orin_skip_rms_norm";
  constexpr int max_hidden = 4 * kMaxThreads * kVector;
  ORIN_REQUIRE(rows >= 0, "%s: rows is %d, want 0 or more", name, rows);
  ORIN_REQUIRE(hidden > 0 && hidden % kVector == 0 && hidden <= max_hidden,
               "%s: hidden is %d, want a multiple of %d up to %d", name, hidden, kVector, max_hidden);
  ORIN_REQUIRE((residual == nullptr) == (sum == nullptr), "%s: residual and sum are given both or not at all", name);
  if (rows == 0) return ORIN_OK;
  ORIN_REQUIRE_POINTER(name, x);
  ORIN_REQUIRE_POINTER(name, weight);
  ORIN_REQUIRE_POINTER(name, y);
  ORIN_REQUIRE(aligned_16(residual) && aligned_16(sum), "%s: residual or sum is not aligned to 16 bytes", name);
  NormArgs args{static_cast<const __half*>(x), static_cast<const __half*>(weight), static_cast<const __half*>(residual),
                static_cast<__half*>(y),       static_cast<__half*>(sum),          hidden, epsilon};
  int vectors = hidden / kVector;
  dim3 grid{unsigned(rows)}, block{unsigned(smaller(kMaxThreads, round_up(vectors, 32)))};
  if (vectors <= kMaxThreads) return launch(skip_rms_norm_kernel<1>, grid, block, 0, stream, args);
  if (vectors <= 2 * kMaxThreads) return launch(skip_rms_norm_kernel<2>, grid, block, 0, stream, args);
  return launch(skip_rms_norm_kernel<4>, grid, block, 0, stream, args);
}
