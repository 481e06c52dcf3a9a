// 1 to 8 rows of orin_int4_linear: a block takes up to 32 output features and all input features; its warps share the
// latter and add up at the end. Codes go in as integers, exactly; an fp32 sum of each group is multiplied by its scale.
#include "int4_linear.cuh"

namespace orin {
namespace {

constexpr int kGemvMaxWarps = 8;
constexpr int kGemvSharedX = 32 * 1024;  // bytes of x that a block holds at once

// Between two rows of a warp's sums: lanes 4 g + t then store to banks 8 t + g.
__host__ __device__ constexpr int gemv_stride(int tiles) { return tiles * kTileRows + 4; }

// k-blocks of x that fit, a multiple of the warps so that a warp's k-blocks go on evenly from one part to the next.
ORIN_HD int gemv_part(int rows, int k_blocks, int warps) {
  int fit = kGemvSharedX / (rows * kBlockK * 2) / warps * warps;
  return smaller(fit, round_up(k_blocks, warps));
}

// Rows `0 .. rows - 1`, k-blocks `first .. first + count - 1` of x to shared memory.
__device__ __forceinline__ void gemv_load_x(const LinearArgs& args, char* shared, int first, int count, int stride) {
  int chunks = count * kChunksOfBlock;
  for (int i = int(threadIdx.x); i < args.rows * chunks; i += int(blockDim.x)) {
    int row = i / chunks, chunk = i % chunks;
    const __half* from = args.x + size_t(row) * args.k + size_t(first) * kBlockK + chunk * kChunkHalves;
    cp_async_16(shared + row * stride + x_swizzle(row, chunk) * 16, from);
  }
  cp_async_commit();
}

// What a lane reads of a k-block: its words of each tile, and of the scales those of tile t (its place among four
// lanes), which the four exchange when they need them.
template <int kTiles, int kGroups>
struct GemvWeights {
  uint4 words[kTiles];
  __half scales[kGroups];

  __device__ __forceinline__ void load(const LinearArgs& args, int first_tile, int kb, int lane) {
    int last = args.n / kTileRows - 1, k_blocks = args.k / kBlockK;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      int tile = smaller(first_tile + i, last);  // behind the end: any, it is not stored
      words[i] = load_streaming_16(args.weight + tile_offset(tile, kb, k_blocks) + lane * kWordsOfLane);
    }
    int feature = smaller(first_tile + lane % 4 % kTiles, last) * kTileRows + lane / 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) scales[j] = __ldg(args.scales + (size_t(kb) * kGroups + j) * args.n + feature);
  }
};

// sums += weight * x over a k-block. `x_row` is this lane's row for ldmatrix, in shared memory.
template <int kTiles, int kGroups>
__device__ __forceinline__ void gemv_multiply(float (&sums)[(kTiles + 1) / 2][4], const GemvWeights<kTiles, kGroups>& w,
                                              const char* x_row, int row, int first_chunk, int lane) {
  constexpr int kHalves = (kTiles + 1) / 2, kWordsOfGroup = kWordsOfLane / kGroups;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float of_group[kHalves][4] = {};
#pragma unroll
    for (int i = 0; i < kWordsOfGroup; ++i) {
      int word = group * kWordsOfGroup + i;
      uint32_t b[4];
      ldmatrix_x4(b, x_row + x_swizzle(row, first_chunk + 4 * word + lane / 8) * 16);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        Pairs upper = pairs_of(word_of(w.words[2 * h], word)), lower{};
        if (2 * h + 1 < kTiles) lower = pairs_of(word_of(w.words[smaller(2 * h + 1, kTiles - 1)], word));
#pragma unroll
        for (int step = 0; step < kStepsOfWord; ++step)
          mma_16816(of_group[h], upper.of[2 * step], lower.of[2 * step], upper.of[2 * step + 1], lower.of[2 * step + 1],
                    b[2 * step], b[2 * step + 1]);
      }
    }
    float scale = __half2float(w.scales[group]);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      float upper = __shfl_sync(kFullWarp, scale, (lane & ~3) + 2 * h);
      float lower = __shfl_sync(kFullWarp, scale, (lane & ~3) + 2 * h + 1);
      sums[h][0] += of_group[h][0] * upper, sums[h][1] += of_group[h][1] * upper;
      sums[h][2] += of_group[h][2] * lower, sums[h][3] += of_group[h][3] * lower;
    }
  }
}

// The warps' sums to shared memory, [warp][row of x][feature].
template <int kTiles>
__device__ __forceinline__ void gemv_share(float* shared, const float (&sums)[(kTiles + 1) / 2][4], int warp,
                                           int lane) {
  constexpr int kStride = gemv_stride(kTiles);
  float* mine = shared + warp * kGemvMaxRows * kStride + 2 * (lane % 4) * kStride + lane / 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    mine[i * kTileRows] = sums[i / 2][i % 2 * 2];
    mine[kStride + i * kTileRows] = sums[i / 2][i % 2 * 2 + 1];
  }
}

// Shared memory: kGemvMaxRows * gemv_stride floats for each warp, then the rows of x.
template <int kTiles, int kGroups>
__global__ void __launch_bounds__(kGemvMaxWarps * 32) gemv_kernel(LinearArgs args, int part) {
  constexpr int kStride = gemv_stride(kTiles);
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  int first_tile = int(blockIdx.x) * kTiles, k_blocks = args.k / kBlockK;
  float* shared_sums = reinterpret_cast<float*>(dynamic_shared());
  char* shared_x = dynamic_shared() + warps * kGemvMaxRows * kStride * sizeof(float);
  int row = lane % 8 < args.rows ? lane % 8 : 0;  // a column of the product that is not stored may hold anything
  int x_stride = part * kBlockK * 2;

  float sums[(kTiles + 1) / 2][4] = {};
  GemvWeights<kTiles, kGroups> now, next;
  now.load(args, first_tile, smaller(warp, k_blocks - 1), lane);
  for (int first = 0; first < k_blocks; first += part) {
    int count = smaller(part, k_blocks - first);
    if (first) __syncthreads();  // all have read the part before
    gemv_load_x(args, shared_x, first, count, x_stride);
    cp_async_wait<0>();
    __syncthreads();
    for (int kb = first + warp; kb < first + count; kb += warps) {
      if (kb + warps < k_blocks) next.load(args, first_tile, kb + warps, lane);
      gemv_multiply(sums, now, shared_x + row * x_stride, row, (kb - first) * kChunksOfBlock, lane);
      now = next;
    }
  }

  gemv_share<kTiles>(shared_sums, sums, warp, lane);
  __syncthreads();
  int features = smaller(kTiles * kTileRows, args.n - first_tile * kTileRows), pairs = features / 2;
  for (int i = int(threadIdx.x); i < args.rows * pairs; i += int(blockDim.x)) {
    int out_row = i / pairs, feature = i % pairs * 2;
    float first = 0, second = 0;
    for (int w = 0; w < warps; ++w) {
      const float* of_warp = shared_sums + (w * kGemvMaxRows + out_row) * kStride + feature;
      first += of_warp[0], second += of_warp[1];
    }
    finish_pair(args, out_row, first_tile * kTileRows + feature, first, second);
  }
}

template <int kTiles>
orin_status launch_tiles(const LinearArgs& args, int groups, GemvPlan plan, orin_stream stream) {
  int part = gemv_part(args.rows, args.k / kBlockK, plan.warps);
  size_t sums = plan.warps * kGemvMaxRows * gemv_stride(kTiles) * sizeof(float);
  size_t shared = sums + size_t(args.rows) * part * kXRowBytes;
  auto kernel = groups == 1   ? gemv_kernel<kTiles, 1>
                : groups == 2 ? gemv_kernel<kTiles, 2>
                              : gemv_kernel<kTiles, 4>;
  return launch(kernel, dim3(unsigned(plan.blocks)), dim3(unsigned(plan.warps) * 32), shared, stream, args, part);
}

}  // namespace

orin_status launch_gemv(const LinearArgs& args, int groups, int sms, orin_stream stream) {
  GemvPlan plan = gemv_plan(args.n, args.k, sms);
  if (plan.tiles == 1) return launch_tiles<1>(args, groups, plan, stream);
  if (plan.tiles == 2) return launch_tiles<2>(args, groups, plan, stream);
  return launch_tiles<4>(args, groups, plan, stream);
}

}  // namespace orin
