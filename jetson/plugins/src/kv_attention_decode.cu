// orin_kv_attention for up to eight new tokens: bound by reading the cache, so the keys are split over the grid, and each
// lane loads, 16 bytes at a time and straight into registers, what its part of a tensor-core multiplication needs. The
// splits' sums are combined by a second kernel.
#include "kv_attention.cuh"

namespace orin {
namespace {

constexpr int kThreads = kDecodeWarps * 32;

// What a lane (4 g + t of its warp) holds of 16 keys and their values, and how that makes operands of mma.
template <int kDim, bool kInt8>
struct Lane {
  static constexpr int kBytes = kInt8 ? 1 : 2;           // of an element
  static constexpr int kSteps = kDim / 16;               // of 16 elements, in q k
  static constexpr int kTiles = kDim / 8;                // of 8 elements, in p v
  static constexpr int kKeyPer = 16 / kBytes;            // elements of a load
  static constexpr int kKeyLoads = kDim / (4 * kKeyPer); // a lane's, of one key
  static constexpr int kValuePer = value_load(kDim, kBytes);
  static constexpr int kValueLoads = kDim / (8 * kValuePer);
  static constexpr int kValueWords = kValuePer * kBytes / 4;  // of a load

  uint32_t key[2][kKeyLoads * 4];                // of keys g and g + 8
  uint32_t value[4][kValueLoads * kValueWords];  // of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9

  // Keys first, first + 1, ... of a head's rows; zeros from `end` on.
  __device__ __forceinline__ void load_keys(const char* rows, int first, int end, int g, int t) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      int at = first + 8 * n + g;
#pragma unroll
      for (int j = 0; j < kKeyLoads; ++j) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (at < end) v = load_streaming_16(rows + (size_t(at) * kDim + kKeyPer * (4 * j + t)) * kBytes);
        key[n][4 * j] = v.x, key[n][4 * j + 1] = v.y, key[n][4 * j + 2] = v.z, key[n][4 * j + 3] = v.w;
      }
    }
  }

  // Zeros from `end` on matter: what lies there in the cache may be NaN, and 0 * NaN is.
  __device__ __forceinline__ void load_values(const char* rows, int first, int end, int g, int t) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      int at = first + 2 * t + n % 2 + 8 * (n / 2);
#pragma unroll
      for (int j = 0; j < kValueLoads; ++j) {
        const char* from = rows + (size_t(at) * kDim + kValuePer * (g + 8 * j)) * kBytes;
        if constexpr (kValueWords == 4) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (at < end) v = load_streaming_16(from);
          value[n][4 * j] = v.x, value[n][4 * j + 1] = v.y, value[n][4 * j + 2] = v.z, value[n][4 * j + 3] = v.w;
        } else {
          uint2 v = make_uint2(0, 0);
          if (at < end) v = load_streaming_8(from);
          value[n][2 * j] = v.x, value[n][2 * j + 1] = v.y;
        }
      }
    }
  }

  // Key 8 n + g, elements key_element(step, t, pair) and the next.
  __device__ __forceinline__ uint32_t key_pair(int n, int step, int pair) const {
    if constexpr (kInt8) return int8_pair(turned(key[n][step]), pair);
    return key[n][2 * step + pair];
  }

  // Values of keys 2 t and 2 t + 1 (`half` 1: 2 t + 8 and 2 t + 9), element value_element(tile, g).
  __device__ __forceinline__ uint32_t value_pair(int tile, int half) const {
    int load = tile / kValuePer, element = tile % kValuePer;
    if constexpr (kInt8) {
      int word = load * kValueWords + element / 4;
      uint32_t a = turned(value[2 * half][word]), b = turned(value[2 * half + 1][word]);
      return int8_pair(permute_bytes(a, b, element % 4 < 2 ? 0x5140 : 0x7362), element % 2);
    }
    int word = load * kValueWords + element / 2;
    return permute_bytes(value[2 * half][word], value[2 * half + 1][word], element % 2 ? 0x7632 : 0x5410);
  }
};

// Rows row_0 + g and row_0 + g + 8 of the queries, their elements in the order of key_element.
template <int kDim, int kKeyPer>
__device__ __forceinline__ void load_queries(const __half* head, int row_0, int rows, int g, int t,
                                             uint32_t (&q)[kDim / 16][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = row_0 + g + 8 * r;
#pragma unroll
    for (int load = 0; load < kDim / 32; ++load) {
      int first = 8 * load, j = first / kKeyPer, in_chunk = first % kKeyPer;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (row < rows) v = load_16(head + size_t(row) * kDim + kKeyPer * (4 * j + t) + in_chunk);
      int step = j * (kKeyPer / 4) + in_chunk / 4;
      q[step][r] = v.x, q[step][r + 2] = v.y, q[step + 1][r] = v.z, q[step + 1][r + 2] = v.w;
    }
  }
}

// Adds up what the block's warps summed, each relative to its own maximum, and writes it as this split's.
template <int kDim, bool kInt8>
__device__ __forceinline__ void write_split(const Attention& a, int row_0, const Softmax& softmax,
                                            const float (&sums)[kDim / 8][4]) {
  constexpr int kRowFloats = kDim + 8;  // eight more: rows of a phase lie in different banks
  constexpr int kPer = Lane<kDim, kInt8>::kValuePer;
  ORIN_SHARED(float2, states, kDecodeWarps * kRowTile);
  ORIN_SHARED(float, all, kDecodeWarps * kRowTile * kRowFloats);
  int thread = int(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  int here = min(a.rows() - row_0, kRowTile);
  if (t == 0) {
    states[warp * kRowTile + g] = make_float2(softmax.most[0], softmax.sum[0]);
    states[warp * kRowTile + g + 8] = make_float2(softmax.most[1], softmax.sum[1]);
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = g + 8 * r;
    if (row >= here) continue;
    float most = -INFINITY;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, states[w * kRowTile + row].x);
    float factor = most == -INFINITY ? 0.0f : exp2_approx(softmax.most[r] - most);
    float* to = all + (warp * kRowTile + row) * kRowFloats + 2 * t;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i)
      *reinterpret_cast<float2*>(to + 8 * i) = make_float2(sums[i][2 * r] * factor, sums[i][2 * r + 1] * factor);
  }
  __syncthreads();
  size_t rows = size_t(a.batch) * a.kv_heads * a.rows();
  size_t out = size_t(blockIdx.x) * rows + size_t(blockIdx.z) * a.rows() + row_0;
  for (int i = thread; i < here * kDim; i += kThreads) {
    int row = i / kDim, element = i % kDim;
    // value_element turned round: the tile and the column that this element was.
    int chunk = element / kPer, at = (chunk / 8 * kPer + element % kPer) * 8 + chunk % 8;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += all[(w * kRowTile + row) * kRowFloats + at];
    a.partial[(out + row) * kDim + element] = sum;
  }
  if (thread < here) {
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, states[w * kRowTile + thread].x);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      float2 one = states[w * kRowTile + thread];
      if (one.x != -INFINITY) sum += one.y * exp2_approx(one.x - most);
    }
    a.state[out + thread] = make_float2(most, sum);
  }
}

// Grid: splits, row tiles, batch * kv_heads. A warp takes 16 keys in every 64 of its split.
template <int kDim, bool kInt8>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(Attention a) {
  using Lane = Lane<kDim, kInt8>;
  int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4, warp = int(threadIdx.x) / 32;
  int head = int(blockIdx.z), b = head / a.kv_heads, row_0 = int(blockIdx.y) * kRowTile;
  int keys = a.keys_of(b), of_split = split_keys(keys, a.splits);
  int begin = int(blockIdx.x) * of_split, end = min(begin + of_split, keys);
  if (begin >= end) return;

  const char* key_rows = static_cast<const char*>(a.keys) + size_t(head) * a.max_len * kDim * Lane::kBytes;
  const char* value_rows = static_cast<const char*>(a.values) + size_t(head) * a.max_len * kDim * Lane::kBytes;
  Lane lane;
  int first = begin + warp * kStepKeys;
  lane.load_keys(key_rows, first, end, g, t);
  uint32_t q[kDim / 16][4];
  load_queries<kDim, Lane::kKeyPer>(a.query + size_t(head) * a.rows() * kDim, row_0, a.rows(), g, t, q);
  float to_powers_of_two = a.scale * kLog2E;
  if constexpr (kInt8) to_powers_of_two *= largest_scale<kDim>(a.key_scale + head % a.kv_heads * kDim);
  int visible[2] = {a.visible(b, row_0 + g), a.visible(b, row_0 + g + 8)};

  Softmax softmax;
  float sums[kDim / 8][4] = {};
  for (; first < end; first += kChunk) {
    lane.load_values(value_rows, first, end, g, t);
    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int s = 0; s < Lane::kSteps; ++s)
        mma_16816(scores[n], q[s][0], q[s][1], q[s][2], q[s][3], lane.key_pair(n, s, 0), lane.key_pair(n, s, 1));
    }
    lane.load_keys(key_rows, first + kChunk, end, g, t);  // now, while the values are used
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        bool seen = first + 8 * n + 2 * t + c % 2 < visible[c / 2];
        scores[n][c] = seen ? scores[n][c] * to_powers_of_two : -INFINITY;
      }
    }
    float factor[2];
    softmax.step(scores, factor);
    multiply_rows(sums, factor);
    uint32_t weights[4];
    weights_of(scores[0], scores[1], weights);
#pragma unroll
    for (int i = 0; i < Lane::kTiles; ++i)
      mma_16816(sums[i], weights[0], weights[1], weights[2], weights[3], lane.value_pair(i, 0), lane.value_pair(i, 1));
  }
  softmax.finish();
  write_split<kDim, kInt8>(a, row_0, softmax, sums);
}

// A block for each row: the splits' sums, weighted by how far each maximum lies below the largest.
template <int kDim>
__global__ void __launch_bounds__(kThreads) combine_kernel(Attention a) {
  static_assert(kMaxSplits <= kThreads, "a thread reads the state of one split");
  constexpr int kVectors = kDim / 4, kShares = kThreads / kVectors;
  ORIN_SHARED(float4, sums, kThreads);
  ORIN_SHARED(float, totals, kShares);
  int thread = int(threadIdx.x), vector = thread % kVectors, share = thread / kVectors;
  int row = int(blockIdx.x) % a.rows(), head = int(blockIdx.x) / a.rows(), b = head / a.kv_heads;
  size_t rows = size_t(a.batch) * a.kv_heads * a.rows();
  int splits = active_splits(a.keys_of(b), a.splits);
  const float2* state = a.state + blockIdx.x;
  float most = reduce_block(thread < splits ? state[thread * rows].x : -INFINITY, -INFINITY, Larger());
  float4 sum = make_float4(0, 0, 0, 0);
  float total = 0;
  for (int s = share; s < splits; s += kShares) {
    float2 one = state[s * rows];
    float weight = exp2_approx(one.x - most);
    float4 v = *reinterpret_cast<const float4*>(a.partial + (s * rows + blockIdx.x) * kDim + 4 * vector);
    total += weight * one.y;
    sum = make_float4(sum.x + weight * v.x, sum.y + weight * v.y, sum.z + weight * v.z, sum.w + weight * v.w);
  }
  sums[thread] = sum;
  if (vector == 0) totals[share] = total;
  __syncthreads();
  if (share != 0) return;
  for (int s = 1; s < kShares; ++s) {
    float4 v = sums[s * kVectors + vector];
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    total += totals[s];
  }
  int kv = head % a.kv_heads;
  float4 by = make_float4(1, 1, 1, 1);
  if (a.value_scale) by = *reinterpret_cast<const float4*>(a.value_scale + kv * kDim + 4 * vector);
  float once = 1.0f / total;
  __half2* y = reinterpret_cast<__half2*>(a.y + a.y_offset(b, kv, row, kDim) + 4 * vector);
  y[0] = __floats2half2_rn(sum.x * once * by.x, sum.y * once * by.y);
  y[1] = __floats2half2_rn(sum.z * once * by.z, sum.w * once * by.w);
}

}  // namespace

orin_status launch_decode(const Attention& a, int head_dim, bool int8, orin_stream stream) {
  unsigned heads = unsigned(a.batch * a.kv_heads);
  dim3 grid{unsigned(a.splits), unsigned(ceil_div(a.rows(), kRowTile)), heads};
  auto kernel = head_dim == 64 ? (int8 ? decode_kernel<64, true> : decode_kernel<64, false>)
                               : (int8 ? decode_kernel<128, true> : decode_kernel<128, false>);
  ORIN_RETURN_IF_FAILED(launch(kernel, grid, dim3{kThreads}, 0, stream, a));
  auto combine = head_dim == 64 ? combine_kernel<64> : combine_kernel<128>;
  return launch(combine, dim3{heads * unsigned(a.rows())}, dim3{kThreads}, 0, stream, a);
}

}  // namespace orin
