// orin_embedding_gather: a block for each token, eight features a thread.
#include "cuda.cuh"
#include "orin_layout.h"
#include "ptx.cuh"

namespace orin {
namespace {

constexpr int kFeatures = 8;
constexpr int kMaxThreads = 256;

struct Codes {
  int of[kFeatures];
};

// Features 8 chunk .. 8 chunk + 7 of row `id`.
template <int kBits>
__device__ __forceinline__ Codes row_codes(const void* table, size_t id, int chunk, int hidden) {
  Codes codes;
  size_t first = (id * hidden + size_t(chunk) * kFeatures) * kBits / 8;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(table) + first);
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) codes.of[i] = int(words[i * kBits / 32] >> i * kBits % 32 & ((1u << kBits) - 1));
  return codes;
}

// The same of an Int4Linear's weight: two neighbours from each of the four threads' words.
__device__ __forceinline__ Codes tiled_codes(const void* table, size_t id, int chunk, int hidden) {
  Codes codes;
  const uint32_t* words = static_cast<const uint32_t*>(table);
#pragma unroll
  for (int i = 0; i < kFeatures; ++i) {
    NibblePlace place = nibble_place(int(id), chunk * kFeatures + i, hidden);
    codes.of[i] = int(words[place.word] >> 4 * place.nibble & 15);
  }
  return codes;
}

__device__ __forceinline__ void store_features(float* y, const float (&v)[kFeatures]) {
#pragma unroll
  for (int i = 0; i < kFeatures; i += 4)
    *reinterpret_cast<float4*>(y + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}
__device__ __forceinline__ void store_features(__half* y, const float (&v)[kFeatures]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = half2_bits(__floats2half2_rn(v[2 * i], v[2 * i + 1]));
  store_16(y, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}

template <int kBits, bool kTiled, typename T>
__global__ void __launch_bounds__(kMaxThreads) embedding_gather_kernel(orin_embedding_args args) {
  int64_t id = args.ids[blockIdx.x];
  T* y = static_cast<T*>(args.y) + size_t(blockIdx.x) * args.hidden;
  bool inside = id >= 0 && id < args.vocab;
  int groups = args.hidden / args.group_size;
  const __half* scales = static_cast<const __half*>(args.scales);
  for (int chunk = int(threadIdx.x); chunk < args.hidden / kFeatures; chunk += int(blockDim.x)) {
    float values[kFeatures] = {};
    if (inside) {
      Codes codes = kTiled ? tiled_codes(args.table, size_t(id), chunk, args.hidden)
                           : row_codes<kBits>(args.table, size_t(id), chunk, args.hidden);
      int group = chunk * kFeatures / args.group_size;
      size_t at = kTiled ? size_t(group) * args.vocab + size_t(id) : size_t(id) * groups + group;
      float scale = __half2float(scales[at]);
#pragma unroll
      for (int i = 0; i < kFeatures; ++i) values[i] = float(codes.of[i] - (1 << (kBits - 1))) * scale;
    }
    store_features(y + chunk * kFeatures, values);
  }
}

template <int kBits, bool kTiled>
orin_status launch_gather(const orin_embedding_args& args, orin_stream stream) {
  dim3 grid{unsigned(args.tokens)}, block{unsigned(smaller(kMaxThreads, round_up(args.hidden / kFeatures, 32)))};
  if (args.fp32_output) return launch(embedding_gather_kernel<kBits, kTiled, float>, grid, block, 0, stream, args);
  return launch(embedding_gather_kernel<kBits, kTiled, __half>, grid, block, 0, stream, args);
}

}  // namespace
}  // namespace orin

extern "C" orin_status orin_embedding_gather(const orin_embedding_args* given, orin_stream stream) {
  using namespace orin;
  const char* name = "orin_embedding_gather";
  ORIN_REQUIRE(given != nullptr, "%s: args is NULL", name);
  const orin_embedding_args& args = *given;
  bool tiled = args.layout == ORIN_LAYOUT_INT4_LINEAR;
  ORIN_REQUIRE(tiled || args.layout == ORIN_LAYOUT_ROWS, "%s: layout is %d, want %d (rows) or %d (int4_linear)", name,
               args.layout, ORIN_LAYOUT_ROWS, ORIN_LAYOUT_INT4_LINEAR);
  ORIN_REQUIRE(args.bits == 4 || (args.bits == 8 && !tiled), "%s: bits is %d, want %s", name, args.bits,
               tiled ? "4 in the layout int4_linear" : "4 or 8");
  ORIN_REQUIRE(args.tokens >= 0, "%s: tokens is %d, want 0 or more", name, args.tokens);
  int rows = tiled ? kTileRows : 1, features = tiled ? kBlockK : kFeatures;
  ORIN_REQUIRE(args.vocab > 0 && args.vocab % rows == 0, "%s: vocab is %d, want a multiple of %d", name, args.vocab,
               rows);
  ORIN_REQUIRE(args.hidden > 0 && args.hidden % features == 0, "%s: hidden is %d, want a multiple of %d", name,
               args.hidden, features);
  ORIN_REQUIRE(args.group_size > 0 && args.group_size % kFeatures == 0 && args.hidden % args.group_size == 0,
               "%s: group_size is %d, want a multiple of %d that divides hidden, %d", name, args.group_size, kFeatures,
               args.hidden);
  if (args.tokens == 0) return ORIN_OK;
  ORIN_REQUIRE_POINTER(name, args.ids);
  ORIN_REQUIRE_POINTER(name, args.table);
  ORIN_REQUIRE_POINTER(name, args.scales);
  ORIN_REQUIRE_POINTER(name, args.y);
  if (tiled) return launch_gather<4, true>(args, stream);
  return args.bits == 4 ? launch_gather<4, false>(args, stream) : launch_gather<8, false>(args, stream);
}
