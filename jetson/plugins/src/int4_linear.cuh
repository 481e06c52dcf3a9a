// What the two kernels of orin_int4_linear share. The weight is always the left operand (16 output features of
// mma.m16n8k16) and the rows of x the right one, because a lane's 16 bytes of the interleaved weight are then its
// registers of eight steps, for one shift and two logical operations a register, and go from global memory straight to
// the tensor cores.
#pragma once

#include "cuda.cuh"
#include "orin_layout.h"
#include "ptx.cuh"

namespace orin {

struct LinearArgs {
  int rows, n, k;
  bool silu_gate;
  const __half* x;
  const uint32_t* weight;
  const __half* scales;
  const __half* bias;
  __half* y;
};

constexpr int kGemvMaxRows = 8;

// `groups` is how many groups a k-block has: 4, 2 or 1.
orin_status launch_gemv(const LinearArgs& args, int groups, int sms, orin_stream stream);
orin_status launch_gemm(const LinearArgs& args, int groups, int sms, float* workspace, orin_stream stream);

constexpr int kStepsOfWord = 2;
constexpr int kWordsOfLane = 4;
constexpr int kChunksOfBlock = 16;  // of 16 bytes, in a row's k-block of x
constexpr int kChunkHalves = 8;
constexpr int kXRowBytes = kBlockK * 2;

// ---- dequantization: pair p of a word, as two halves code - 8, exactly ----

__device__ __forceinline__ uint32_t even_pair(uint32_t word) {  // 1024 + code, less 1032
  return half2_bits(__hsub2(bits_half2(magic_low(word)), bits_half2(0x64086408u)));
}
__device__ __forceinline__ uint32_t odd_pair(uint32_t word) {  // (1024 + 16 code) / 16, less 72
  return half2_bits(__hfma2(bits_half2(magic_high(word)), bits_half2(0x2c002c00u), bits_half2(0xd480d480u)));
}

struct Pairs {
  uint32_t of[4];
};
__device__ __forceinline__ Pairs pairs_of(uint32_t word) {
  return {{even_pair(word), odd_pair(word), even_pair(word >> 8), odd_pair(word >> 8)}};
}
__device__ __forceinline__ Pairs scaled(Pairs pairs, __half2 scale) {
#pragma unroll
  for (int p = 0; p < 4; ++p) pairs.of[p] = half2_bits(__hmul2(bits_half2(pairs.of[p]), scale));
  return pairs;
}
__device__ __forceinline__ uint32_t word_of(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---- what becomes of a sum ----

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// Two neighbouring features' sums: stored as two, or as one where the first is a gate.
__device__ __forceinline__ void finish_pair(const LinearArgs& args, int row, int feature, float first, float second) {
  if (args.bias) {
    float2 bias = __half22float2(*reinterpret_cast<const __half2*>(args.bias + feature));
    first += bias.x, second += bias.y;
  }
  if (args.silu_gate) {
    args.y[size_t(row) * (args.n / 2) + feature / 2] = __float2half_rn(silu(first) * second);
  } else {
    *reinterpret_cast<__half2*>(args.y + size_t(row) * args.n + feature) = __floats2half2_rn(first, second);
  }
}

}  // namespace orin
