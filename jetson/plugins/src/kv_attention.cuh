// What the kernels of orin_kv_attention share. Rows of a kv head are its query heads at all new tokens: token s and query
// head g of the group are row s * groups + g, so that one read of the keys serves them all.
#pragma once

#include "cuda.cuh"
#include "orin_layout.h"
#include "ptx.cuh"
#include "reduce.cuh"

namespace orin {

struct Attention {
  int batch, tokens, kv_heads, groups, max_len, max_positions;
  float scale, epsilon;
  const __half* qkv;
  void* keys;
  void* values;
  const int32_t* past;
  const float* cos;
  const float* sin;
  const __half* q_norm;
  const __half* k_norm;
  const float* key_scale;
  const float* value_scale;
  __half* y;
  // Workspace, see orin_layout.h. `partial` and `state` are of decode only.
  __half* query;
  float* partial;
  float2* state;  // maximum (of scores in powers of two) and sum
  int splits;

  ORIN_HD int rows() const { return tokens * groups; }
  __device__ __forceinline__ int past_of(int b) const { return max(past[b], 0); }
  // Keys that sequence `b` has in the cache once the new ones are there.
  __device__ __forceinline__ int keys_of(int b) const { return min(past_of(b) + tokens, max_len); }
  // Keys that a row sees.
  __device__ __forceinline__ int visible(int b, int row) const {
    return min(past_of(b) + row_token(row, groups) + 1, keys_of(b));
  }
  // Where row `row` of kv head `kv` of sequence `b` goes in y.
  __device__ __forceinline__ size_t y_offset(int b, int kv, int row, int head_dim) const {
    size_t token = size_t(b) * tokens + row / groups;
    return (token * kv_heads * groups + size_t(kv) * groups + row % groups) * head_dim;
  }
};

orin_status launch_append(const Attention& a, int head_dim, bool int8, orin_stream stream);
orin_status launch_decode(const Attention& a, int head_dim, bool int8, orin_stream stream);
orin_status launch_prefill(const Attention& a, int head_dim, bool int8, orin_stream stream);

constexpr float kLog2E = 1.4426950408889634f;

// An int8 key is `stored * key_scale[channel]`. The scale goes into the query instead, over the head's largest, so that
// the product is no larger than the query and fits fp16; the scores are then multiplied by that largest. All of a warp.
template <int kDim>
__device__ __forceinline__ float largest_scale(const float* scales) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) most = fmaxf(most, scales[int(threadIdx.x) % 32 + 32 * i]);
  return reduce_warp(most, Larger());
}

// ---- int8 to fp16: bytes with their top bit turned are stored + 128, behind 0x64 they are the fp16 1024 + that ----

__device__ __forceinline__ uint32_t turned(uint32_t word) { return word ^ 0x80808080u; }

// Bytes 0 and 1 (`high`: 2 and 3) of a turned word.
__device__ __forceinline__ uint32_t int8_pair(uint32_t word, bool high) {
  uint32_t magic = permute_bytes(word, 0x64646464u, high ? 0x4342 : 0x4140);
  return half2_bits(__hsub2(bits_half2(magic), bits_half2(0x64806480u)));
}

// ---- softmax over keys that come tile by tile ----

// A lane's two rows, g and g + 8 of 16: scores are in powers of two, sums are of this lane's columns only.
struct Softmax {
  float most[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};

  // Scores become weights relative to the new maximum; what was summed before is to be multiplied by `factor`. A row that
  // has seen no key yet keeps a maximum of -inf and weights of 0.
  template <int kTiles>
  __device__ __forceinline__ void step(float (&scores)[kTiles][4], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = most[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) now = fmaxf(now, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kFullWarp, now, 2));
      float base = now == -INFINITY ? 0.0f : now;
      factor[r] = exp2_approx(most[r] - base);
      most[r] = now;
      sum[r] *= factor[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 2 * r; c < 2 * r + 2; ++c) {
          scores[n][c] = exp2_approx(scores[n][c] - base);
          sum[r] += scores[n][c];
        }
      }
    }
  }

  // The sums of all columns, in every lane.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kFullWarp, sum[r], 1);
      sum[r] += __shfl_xor_sync(kFullWarp, sum[r], 2);
    }
  }
};

template <int kTiles>
__device__ __forceinline__ void multiply_rows(float (&sums)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[i][c] *= factor[c / 2];
  }
}

// The weights of 16 keys, as two tiles of scores hold them, are what mma wants as its left operand.
__device__ __forceinline__ void weights_of(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
  a[0] = half2_bits(__floats2half2_rn(left[0], left[1]));
  a[1] = half2_bits(__floats2half2_rn(left[2], left[3]));
  a[2] = half2_bits(__floats2half2_rn(right[0], right[1]));
  a[3] = half2_bits(__floats2half2_rn(right[2], right[3]));
}

}  // namespace orin
