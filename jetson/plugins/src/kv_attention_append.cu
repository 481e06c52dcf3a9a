// First kernel of orin_kv_attention: norms and rotates, queries to the workspace, keys and values to the cache. A warp
// for each head of each token.
#include "kv_attention.cuh"

namespace orin {
namespace {

constexpr int kWarps = 4;

template <int kCount>
__device__ __forceinline__ void load_halves(const __half* from, float (&to)[kCount]) {
  if constexpr (kCount == 2) {
    float2 pair = __half22float2(*reinterpret_cast<const __half2*>(from));
    to[0] = pair.x, to[1] = pair.y;
  } else {
    to[0] = __half2float(*from);
  }
}

template <int kCount>
__device__ __forceinline__ void store_halves(__half* to, const float (&from)[kCount]) {
  if constexpr (kCount == 2)
    *reinterpret_cast<__half2*>(to) = __floats2half2_rn(from[0], from[1]);
  else
    *to = __float2half_rn(from[0]);
}

// clip(rint(x / scale), -128, 127), the two bytes of a lane at once.
template <int kCount>
__device__ __forceinline__ void store_int8(int8_t* to, const float (&from)[kCount], const float* scale) {
  int8_t stored[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) stored[i] = int8_t(rintf(fminf(fmaxf(from[i] / scale[i], -128.0f), 127.0f)));
  if constexpr (kCount == 2)
    *reinterpret_cast<uint16_t*>(to) = uint16_t(uint8_t(stored[0]) | uint8_t(stored[1]) << 8);
  else
    *to = stored[0];
}

// A lane's part of a head: kEach elements of the first half, from `first_at` on, and those of the second half that rotate
// with them.
template <int kDim>
struct Part {
  static constexpr int kEach = kDim / 64;
  int first_at = int(threadIdx.x) % 32 * kEach;
  int second_at = first_at + kDim / 2;
  float first[kEach], second[kEach];

  __device__ __forceinline__ void load(const __half* head) {
    load_halves(head + first_at, first);
    load_halves(head + second_at, second);
  }

  __device__ __forceinline__ void norm(const __half* weight, float epsilon) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) squares += first[i] * first[i] + second[i] * second[i];
    float by = 1.0f / sqrtf(reduce_warp(squares, Sum()) / kDim + epsilon);
    float w[kEach];
    load_halves(weight + first_at, w);
#pragma unroll
    for (int i = 0; i < kEach; ++i) first[i] *= by * w[i];
    load_halves(weight + second_at, w);
#pragma unroll
    for (int i = 0; i < kEach; ++i) second[i] *= by * w[i];
  }

  __device__ __forceinline__ void rotate(const float* cos, const float* sin) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float a = first[i], b = second[i], c = cos[first_at + i], s = sin[first_at + i];
      first[i] = a * c - b * s;
      second[i] = b * c + a * s;
    }
  }

  // See largest_scale. Rounded to fp16 before, as the operator's query is.
  __device__ __forceinline__ void over_scale(const float* scales) {
    float largest = largest_scale<kDim>(scales), by = largest > 0 ? 1.0f / largest : 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      first[i] = __half2float(__float2half_rn(first[i])) * (scales[first_at + i] * by);
      second[i] = __half2float(__float2half_rn(second[i])) * (scales[second_at + i] * by);
    }
  }

  __device__ __forceinline__ void store(__half* head) const {
    store_halves(head + first_at, first);
    store_halves(head + second_at, second);
  }

  template <bool kInt8>
  __device__ __forceinline__ void append(void* cache, size_t row, const float* scales) const {
    if constexpr (kInt8) {
      int8_t* head = static_cast<int8_t*>(cache) + row * kDim;
      store_int8(head + first_at, first, scales + first_at);
      store_int8(head + second_at, second, scales + second_at);
    } else {
      store(static_cast<__half*>(cache) + row * kDim);
    }
  }
};

template <int kDim, bool kInt8>
__global__ void __launch_bounds__(kWarps * 32) append_kernel(Attention a) {
  int heads = a.kv_heads * a.groups, vectors = heads + 2 * a.kv_heads;
  int vector = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (vector >= vectors) return;
  int token = int(blockIdx.y), b = int(blockIdx.z);
  // Before the test whether it fits: a padding token's query is computed as if it stood at the last angle there is.
  int place = a.past_of(b) + token;
  size_t angle = size_t(min(place, a.max_positions - 1)) * (kDim / 2);

  Part<kDim> part;
  part.load(a.qkv + ((size_t(b) * a.tokens + token) * vectors + vector) * kDim);
  if (vector < heads) {
    if (a.q_norm) part.norm(a.q_norm, a.epsilon);
    part.rotate(a.cos + angle, a.sin + angle);
    int kv = vector / a.groups, row = token * a.groups + vector % a.groups;
    if constexpr (kInt8) part.over_scale(a.key_scale + kv * kDim);
    part.store(a.query + ((size_t(b) * a.kv_heads + kv) * a.rows() + row) * kDim);
    return;
  }
  if (place >= a.max_len) return;
  bool is_key = vector < heads + a.kv_heads;
  int kv = is_key ? vector - heads : vector - heads - a.kv_heads;
  if (is_key) {
    if (a.k_norm) part.norm(a.k_norm, a.epsilon);
    part.rotate(a.cos + angle, a.sin + angle);
  }
  size_t row = (size_t(b) * a.kv_heads + kv) * a.max_len + place;
  const float* scales = is_key ? a.key_scale : a.value_scale;
  part.template append<kInt8>(is_key ? a.keys : a.values, row, kInt8 ? scales + kv * kDim : nullptr);
}

}  // namespace

orin_status launch_append(const Attention& a, int head_dim, bool int8, orin_stream stream) {
  dim3 grid{unsigned(ceil_div(a.kv_heads * (a.groups + 2), kWarps)), unsigned(a.tokens), unsigned(a.batch)};
  auto kernel = head_dim == 64 ? (int8 ? append_kernel<64, true> : append_kernel<64, false>)
                               : (int8 ? append_kernel<128, true> : append_kernel<128, false>);
  return launch(kernel, grid, dim3{kWarps * 32}, 0, stream, a);
}

}  // namespace orin
