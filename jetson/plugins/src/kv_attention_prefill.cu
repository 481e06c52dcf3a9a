// orin_kv_attention for more than eight new tokens: bound by multiplication. 64 rows of a kv head a block, 64 keys and
// their values at a time through shared memory, the next 64 on their way meanwhile.
#include "kv_attention.cuh"

namespace orin {
namespace {

constexpr int kThreads = kPrefillWarps * 32;

// 64 rows of fp16 in shared memory.
template <int kDim>
struct Tile {
  static constexpr int kChunks = kDim / 8;  // of 16 bytes, in a row
  static constexpr int kHalves = kPrefillKeys * kDim;
  __half* base;

  __device__ __forceinline__ __half* at(int row, int chunk) const {
    return base + (row * kChunks + x_swizzle(row, chunk)) * 8;
  }
};

// Brings rows of a cache to shared memory by cp.async: of fp16 to one of two stages of a tile, of int8 as they are, to be
// converted by the thread that brought them.
template <int kDim, bool kInt8>
struct Loader {
  static constexpr int kRowBytes = kDim * (kInt8 ? 1 : 2);
  static constexpr int kRowLoads = kRowBytes / 16;
  static constexpr int kStride = kThreads / kRowLoads;  // rows between a thread's loads
  static constexpr int kLoads = kPrefillKeys / kStride;
  static constexpr int kRawBytes = kInt8 ? kPrefillKeys * kRowBytes : 0;
  static_assert(kStride % 8 == 0, "a thread's rows are swizzled alike");

  static __device__ __forceinline__ int row() { return int(threadIdx.x) / kRowLoads; }
  static __device__ __forceinline__ int chunk() { return int(threadIdx.x) % kRowLoads; }

  // Rows first, first + 1, ...; zeros from `end` on, where the cache may hold NaN.
  static __device__ __forceinline__ void fetch(const char* rows, int first, int end, Tile<kDim> tile, char* raw) {
    const char* from = rows + size_t(first + row()) * kRowBytes + 16 * chunk();
    char* to = kInt8 ? raw + int(threadIdx.x) * 16 : reinterpret_cast<char*>(tile.at(row(), chunk()));
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      cp_async_16_or_zero(to + i * kStride * kRowBytes, from + i * kStride * kRowBytes,
                          first + row() + i * kStride < end);
  }

  static __device__ __forceinline__ void convert(const char* raw, Tile<kDim> tile) {
    __half* left = tile.at(row(), 2 * chunk());
    __half* right = tile.at(row(), 2 * chunk() + 1);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint4 v = load_16(raw + int(threadIdx.x) * 16 + i * kStride * kRowBytes);
      uint32_t x = turned(v.x), y = turned(v.y), z = turned(v.z), w = turned(v.w);
      store_16(left + i * kStride * kDim,
               make_uint4(int8_pair(x, false), int8_pair(x, true), int8_pair(y, false), int8_pair(y, true)));
      store_16(right + i * kStride * kDim,
               make_uint4(int8_pair(z, false), int8_pair(z, true), int8_pair(w, false), int8_pair(w, true)));
    }
  }
};

// Bytes of shared memory: tiles of keys and of values, in two stages for fp16, in one for int8 and as they come.
template <int kDim, bool kInt8>
constexpr size_t shared_bytes() {
  return size_t(kInt8 ? 2 : 4) * Tile<kDim>::kHalves * sizeof(__half) + 2 * Loader<kDim, kInt8>::kRawBytes;
}

// scores[n] = q k * scale for keys 8 n .. 8 n + 7 of the tile.
template <int kDim>
__device__ __forceinline__ void multiply_keys(const uint32_t (&q)[kDim / 16][4], Tile<kDim> keys, float scale,
                                              float (&scores)[kPrefillKeys / 8][4]) {
  int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[n][c] = 0;
#pragma unroll
    for (int s = 0; s < kDim / 16; s += 2) {
      uint32_t k[4];
      ldmatrix_x4(k, keys.at(8 * n + lane % 8, 2 * s + lane / 8));
      mma_16816(scores[n], q[s][0], q[s][1], q[s][2], q[s][3], k[0], k[1]);
      mma_16816(scores[n], q[s + 1][0], q[s + 1][1], q[s + 1][2], q[s + 1][3], k[2], k[3]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) scores[n][c] *= scale;
  }
}

// Keys from `first` on that a row does not see.
__device__ __forceinline__ void hide(const Attention& a, int b, int row_0, int first,
                                     float (&scores)[kPrefillKeys / 8][4]) {
  int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int visible = a.visible(b, row_0 + lane / 4 + 8 * r) - first - lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kPrefillKeys / 8; ++n) {
      if (8 * n >= visible) scores[n][2 * r] = -INFINITY;
      if (8 * n + 1 >= visible) scores[n][2 * r + 1] = -INFINITY;
    }
  }
}

template <int kDim>
__device__ __forceinline__ void add_values(const float (&weights)[kPrefillKeys / 8][4], Tile<kDim> values,
                                           float (&sums)[kDim / 8][4]) {
  int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int s = 0; s < kPrefillKeys / 16; ++s) {
    uint32_t p[4];
    weights_of(weights[2 * s], weights[2 * s + 1], p);
#pragma unroll
    for (int i = 0; i < kDim / 8; i += 2) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, values.at(16 * s + lane % 16, i + lane / 16));
      mma_16816(sums[i], p[0], p[1], p[2], p[3], v[0], v[1]);
      mma_16816(sums[i + 1], p[0], p[1], p[2], p[3], v[2], v[3]);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void load_queries(const __half* head, int row_0, int rows, uint32_t (&q)[kDim / 16][4]) {
  int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kDim / 16 * 4; ++i) {
    int row = row_0 + g + 8 * (i % 2), element = i / 4 * 16 + i / 2 % 2 * 8 + 2 * t;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(head + size_t(row) * kDim + element);
    q[i / 4][i % 4] = row < rows ? *from : 0u;
  }
}

// Grid: row tiles, the last and longest first; kv_heads; batch.
template <int kDim, bool kInt8>
__global__ void __launch_bounds__(kThreads, 2) prefill_kernel(Attention a) {
  using Loader = Loader<kDim, kInt8>;
  int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, warp = int(threadIdx.x) / 32;
  int kv = int(blockIdx.y), b = int(blockIdx.z), head = b * a.kv_heads + kv;
  int block_row = (int(gridDim.x) - 1 - int(blockIdx.x)) * kPrefillRows, row_0 = block_row + warp * kRowTile;
  int end = a.visible(b, min(block_row + kPrefillRows, a.rows()) - 1);
  const char* key_rows = static_cast<const char*>(a.keys) + size_t(head) * a.max_len * Loader::kRowBytes;
  const char* value_rows = static_cast<const char*>(a.values) + size_t(head) * a.max_len * Loader::kRowBytes;
  __half* shared = reinterpret_cast<__half*>(dynamic_shared());
  char* raw = reinterpret_cast<char*>(shared + 2 * Tile<kDim>::kHalves);  // of int8, in place of the second stage
  auto tile = [&](int stage, int which) { return Tile<kDim>{shared + (2 * stage + which) * Tile<kDim>::kHalves}; };
  auto fetch = [&](int first, int stage) {
    Loader::fetch(key_rows, first, end, tile(stage, 0), raw);
    Loader::fetch(value_rows, first, end, tile(stage, 1), raw + Loader::kRawBytes);
    cp_async_commit();
  };

  fetch(0, 0);
  uint32_t q[kDim / 16][4];
  load_queries<kDim>(a.query + size_t(head) * a.rows() * kDim, row_0, a.rows(), q);
  float to_powers_of_two = a.scale * kLog2E;
  if constexpr (kInt8) to_powers_of_two *= largest_scale<kDim>(a.key_scale + kv * kDim);
  int seen_by_all = a.visible(b, block_row);

  Softmax softmax;
  float sums[kDim / 8][4] = {};
  int stage = 0;
  for (int first = 0; first < end; first += kPrefillKeys) {
    int next = first + kPrefillKeys;
    cp_async_wait<0>();
    __syncthreads();  // what all threads fetched is there, and the tiles of the step before are read no more
    if constexpr (kInt8) {
      Loader::convert(raw, tile(0, 0));
      Loader::convert(raw + Loader::kRawBytes, tile(0, 1));
      if (next < end) fetch(next, 0);  // each thread over what it has just converted
      __syncthreads();
    } else {
      if (next < end) fetch(next, stage ^ 1);
    }
    float scores[kPrefillKeys / 8][4];
    multiply_keys<kDim>(q, tile(stage, 0), to_powers_of_two, scores);
    if (next > seen_by_all) hide(a, b, row_0, first, scores);
    float factor[2];
    softmax.step(scores, factor);
    multiply_rows(sums, factor);
    add_values<kDim>(scores, tile(stage, 1), sums);
    if constexpr (!kInt8) stage ^= 1;
  }
  softmax.finish();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = row_0 + g + 8 * r;
    if (row >= a.rows()) continue;
    float once = 1.0f / softmax.sum[r];
    __half* y = a.y + a.y_offset(b, kv, row, kDim) + 2 * t;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      float2 by = make_float2(once, once);
      if constexpr (kInt8) {
        float2 scales = *reinterpret_cast<const float2*>(a.value_scale + kv * kDim + 8 * i + 2 * t);
        by = make_float2(once * scales.x, once * scales.y);
      }
      *reinterpret_cast<__half2*>(y + 8 * i) = __floats2half2_rn(sums[i][2 * r] * by.x, sums[i][2 * r + 1] * by.y);
    }
  }
}

}  // namespace

orin_status launch_prefill(const Attention& a, int head_dim, bool int8, orin_stream stream) {
  dim3 grid{unsigned(ceil_div(a.rows(), kPrefillRows)), unsigned(a.kv_heads), unsigned(a.batch)};
  if (head_dim == 64) {
    if (int8) return launch(prefill_kernel<64, true>, grid, dim3{kThreads}, shared_bytes<64, true>(), stream, a);
    return launch(prefill_kernel<64, false>, grid, dim3{kThreads}, shared_bytes<64, false>(), stream, a);
  }
  if (int8) return launch(prefill_kernel<128, true>, grid, dim3{kThreads}, shared_bytes<128, true>(), stream, a);
  return launch(prefill_kernel<128, false>, grid, dim3{kThreads}, shared_bytes<128, false>(), stream, a);
}

}  // namespace orin
