// More than 8 rows of orin_int4_linear: a block takes 128 output features and 16, 32 or 64 rows, and where that leaves
// multiprocessors without work a part of the input features. Weights are scaled in fp16 before the multiplication: one
// more rounding, 2^-11 of a weight at most, for half the registers.
#include "int4_linear.cuh"

namespace orin {
namespace {

constexpr int kGemmWarps = 4;
constexpr int kWarpTiles = kGemmN / kTileRows / kGemmWarps;  // four, 32 output features
constexpr int kGemmStages = 3;                               // k-blocks of x in shared memory
constexpr int kSumsStride = kGemmN + 4;                      // floats between rows of sums: banks as in the GEMV

__host__ __device__ constexpr int gemm_shared_bytes(int block_m) {
  int stages = kGemmStages * block_m * kXRowBytes, sums = block_m * kSumsStride * 4;
  return stages > sums ? stages : sums;
}

// That registers leave room for: 64 rows need 220 to 241 of them; three blocks leave 168 and spill.
__host__ __device__ constexpr int gemm_blocks_of_sm(int block_m) { return block_m == 64 ? 2 : 3; }

// A k-block of the block's rows of x; those behind the end are the last one again, and are not stored.
template <int kRows>
__device__ __forceinline__ void gemm_load_x(const LinearArgs& args, char* shared, int first_row, int kb) {
  constexpr int kThreadRows = kGemmWarps * 32 / kChunksOfBlock;  // rows that the block's threads load at once
  int chunk = int(threadIdx.x) % kChunksOfBlock, feature = kb * kBlockK + chunk * kChunkHalves;
#pragma unroll
  for (int i = 0; i < kRows; i += kThreadRows) {
    int row = i + int(threadIdx.x) / kChunksOfBlock;
    const __half* from = args.x + size_t(smaller(first_row + row, args.rows - 1)) * args.k + feature;
    cp_async_16(shared + row * kXRowBytes + x_swizzle(row, chunk) * 16, from);
  }
}

template <int kGroups>
struct GemmWeights {
  uint4 words[kWarpTiles];
  __half scales[kGroups][kWarpTiles];

  __device__ __forceinline__ void load(const LinearArgs& args, int first_tile, int kb, int lane) {
    int last = args.n / kTileRows - 1, k_blocks = args.k / kBlockK;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      int tile = smaller(first_tile + i, last);
      words[i] = load_16(args.weight + tile_offset(tile, kb, k_blocks) + lane * kWordsOfLane);
#pragma unroll
      for (int j = 0; j < kGroups; ++j)
        scales[j][i] = __ldg(args.scales + (size_t(kb) * kGroups + j) * args.n + tile * kTileRows + lane / 4);
    }
  }
};

template <int kRows, int kGroups>
__device__ __forceinline__ void gemm_multiply(float (&sums)[kWarpTiles / 2][kRows / 8][4],
                                              const GemmWeights<kGroups>& w, const char* x, int lane) {
#pragma unroll
  for (int word = 0; word < kWordsOfLane; ++word) {
    Pairs a[kWarpTiles];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
      a[i] = scaled(pairs_of(word_of(w.words[i], word)), __half2half2(w.scales[word * kGroups / kWordsOfLane][i]));
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      int row = 8 * j + lane % 8;
      uint32_t b[4];
      ldmatrix_x4(b, x + row * kXRowBytes + x_swizzle(row, 4 * word + lane / 8) * 16);
#pragma unroll
      for (int step = 0; step < kStepsOfWord; ++step)
#pragma unroll
        for (int h = 0; h < kWarpTiles / 2; ++h)
          mma_16816(sums[h][j], a[2 * h].of[2 * step], a[2 * h + 1].of[2 * step], a[2 * h].of[2 * step + 1],
                    a[2 * h + 1].of[2 * step + 1], b[2 * step], b[2 * step + 1]);
    }
  }
}

// The block's sums to shared memory, [row][feature].
template <int kRows>
__device__ __forceinline__ void gemm_share(float* shared, const float (&sums)[kWarpTiles / 2][kRows / 8][4], int warp,
                                           int lane) {
  float* mine = shared + 2 * (lane % 4) * kSumsStride + warp * kWarpTiles * kTileRows + lane / 4;
#pragma unroll
  for (int h = 0; h < kWarpTiles / 2; ++h)
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[(8 * j + e % 2) * kSumsStride + 16 * h + e / 2 * 8] = sums[h][j][e];
}

// One split of K: `partial` is NULL, or fp32 [splits, rows, n], which finish_kernel adds up.
template <int kRows, int kGroups>
__global__ void __launch_bounds__(kGemmWarps * 32, gemm_blocks_of_sm(kRows))
    gemm_kernel(LinearArgs args, int blocks_of_split, float* partial) {
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int first_row = int(blockIdx.x) * kRows, first_feature = int(blockIdx.y) * kGemmN;
  int first_tile = first_feature / kTileRows + warp * kWarpTiles;
  int begin = int(blockIdx.z) * blocks_of_split, end = smaller(begin + blocks_of_split, args.k / kBlockK);
  char* shared = dynamic_shared();

  float sums[kWarpTiles / 2][kRows / 8][4] = {};
  GemmWeights<kGroups> now, next;
  now.load(args, first_tile, begin, lane);
#pragma unroll
  for (int i = 0; i < kGemmStages - 1; ++i) {
    if (begin + i < end) gemm_load_x<kRows>(args, shared + i * kRows * kXRowBytes, first_row, begin + i);
    cp_async_commit();
  }
  int stage = 0;
  for (int kb = begin; kb < end; ++kb) {
    if (kb + 1 < end) next.load(args, first_tile, kb + 1, lane);
    cp_async_wait<kGemmStages - 2>();
    __syncthreads();  // this k-block has come for all, and all are done with the one before, whose place is next filled
    int coming = kb + kGemmStages - 1, free = stage == 0 ? kGemmStages - 1 : stage - 1;
    if (coming < end) gemm_load_x<kRows>(args, shared + free * kRows * kXRowBytes, first_row, coming);
    cp_async_commit();
    gemm_multiply<kRows, kGroups>(sums, now, shared + stage * kRows * kXRowBytes, lane);
    now = next;
    stage = stage == kGemmStages - 1 ? 0 : stage + 1;
  }

  __syncthreads();  // all are done with x, whose place the sums take
  float* shared_sums = reinterpret_cast<float*>(shared);
  gemm_share<kRows>(shared_sums, sums, warp, lane);
  __syncthreads();
  for (int i = int(threadIdx.x); i < kRows * kGemmN / 2; i += kGemmWarps * 32) {
    int row = i / (kGemmN / 2), in_block = i % (kGemmN / 2) * 2, feature = first_feature + in_block;
    if (first_row + row >= args.rows || feature >= args.n) continue;
    float2 pair = *reinterpret_cast<const float2*>(shared_sums + row * kSumsStride + in_block);
    if (partial) {
      size_t at = (size_t(blockIdx.z) * args.rows + first_row + row) * args.n + feature;
      *reinterpret_cast<float2*>(partial + at) = pair;
    } else {
      finish_pair(args, first_row + row, feature, pair.x, pair.y);
    }
  }
}

constexpr int kFinishThreads = 256;

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(LinearArgs args, const float* partial, int splits) {
  size_t i = size_t(blockIdx.x) * kFinishThreads + threadIdx.x, pairs = size_t(args.n) / 2;
  if (i >= pairs * args.rows) return;
  float first = 0, second = 0;
  for (int split = 0; split < splits; ++split) {
    float2 pair = *reinterpret_cast<const float2*>(partial + 2 * (split * pairs * args.rows + i));
    first += pair.x, second += pair.y;
  }
  finish_pair(args, int(i / pairs), int(i % pairs) * 2, first, second);
}

template <int kRows>
orin_status launch_rows(const LinearArgs& args, int groups, GemmPlan plan, float* partial, orin_stream stream) {
  auto kernel = groups == 1   ? gemm_kernel<kRows, 1>
                : groups == 2 ? gemm_kernel<kRows, 2>
                              : gemm_kernel<kRows, 4>;
  dim3 grid{unsigned(plan.blocks_m), unsigned(plan.blocks_n), unsigned(plan.splits)};
  ORIN_RETURN_IF_FAILED(launch(kernel, grid, dim3(kGemmWarps * 32), gemm_shared_bytes(kRows), stream, args,
                               plan.blocks_of_split, plan.splits > 1 ? partial : nullptr));
  if (plan.splits == 1) return ORIN_OK;
  size_t blocks = (size_t(args.rows) * args.n / 2 + kFinishThreads - 1) / kFinishThreads;
  return launch(finish_kernel, dim3(unsigned(blocks)), dim3(kFinishThreads), 0, stream, args,
                static_cast<const float*>(partial), plan.splits);
}

}  // namespace

orin_status launch_gemm(const LinearArgs& args, int groups, int sms, float* workspace, orin_stream stream) {
  GemmPlan plan = gemm_plan(args.rows, args.n, args.k, sms);
  if (plan.block_m == 16) return launch_rows<16>(args, groups, plan, workspace, stream);
  if (plan.block_m == 32) return launch_rows<32>(args, groups, plan, workspace, stream);
  return launch_rows<64>(args, groups, plan, workspace, stream);
}

}  // namespace orin
