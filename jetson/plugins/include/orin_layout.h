// Index and packing arithmetic that the kernels and the tests on the CPU share: no CUDA is needed to compile it.
// The layouts are those of orin_kit/export/interleave.py; tests/jetson/test_plugins_layout.py compares the two.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define ORIN_HD __host__ __device__ __forceinline__
#else
#define ORIN_HD inline
#endif

namespace orin {

ORIN_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
ORIN_HD constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
ORIN_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }
ORIN_HD constexpr int larger(int a, int b) { return a > b ? a : b; }

// ---- Int4Linear: weight int32 [N/8, K/128, 8, 4, 4] ----

constexpr int kTileRows = 8;         // output features of a tile
constexpr int kBlockK = 128;         // input features of a tile
constexpr int kTileWords = 8 * 4 * 4;  // 512 bytes
constexpr int kTileBytes = kTileWords * 4;

// First word of the tile of rows 8 i .. 8 i + 7 and features 128 kb .. 128 kb + 127.
ORIN_HD size_t tile_offset(int i, int kb, int k_blocks) { return (size_t(i) * k_blocks + kb) * kTileWords; }

// A place in the weight: the word, and which of its eight nibbles.
struct NibblePlace {
  size_t word;
  int nibble;
};

// Where weight[n][k] lies.
ORIN_HD NibblePlace nibble_place(int n, int k, int k_total) {
  int in_block = k % kBlockK, step = in_block / 16, in_step = in_block % 16;
  int t = (in_step % 8) / 2, half = in_step / 8, neighbour = in_step % 2;
  int word = step / 2, pair = 2 * (step % 2) + half;
  size_t lane = size_t(n % kTileRows) * 4 + t;
  return {tile_offset(n / kTileRows, k / kBlockK, k_total / kBlockK) + lane * 4 + word, pair + 4 * neighbour};
}

// First of the two neighbouring input features, within a k-block, that pair p of word w holds for thread t.
ORIN_HD int pair_feature(int t, int w, int p) { return 16 * (2 * w + p / 2) + 8 * (p % 2) + 2 * t; }

// One fp16 bit pattern pair with both codes of a pair in the low mantissa bits. For an even pair the value is
// 1024 + code; for an odd pair, whose nibbles are four bits further up, 1024 + 16 code. One shift serves two pairs.
ORIN_HD uint32_t magic_low(uint32_t word) { return (word & 0x000f000fu) | 0x64006400u; }
ORIN_HD uint32_t magic_high(uint32_t word) { return (word & 0x00f000f0u) | 0x64006400u; }

// ---- which block of the grid does what ----

struct GemvPlan {
  int tiles;  // 8-row tiles of a block: 1, 2 or 4
  int warps;  // that share the input features of a block
  int blocks;
};

// A block's warps keep `tiles` 16-byte loads a lane in flight and read x once for all its tiles; so as many tiles as
// leave two blocks for every SM. Eight warps where each still gets four k-blocks, else four.
ORIN_HD GemvPlan gemv_plan(int n, int k, int sms) {
  int all = n / kTileRows, tiles = 4;
  while (tiles > 1 && ceil_div(all, tiles) < 2 * sms) tiles /= 2;
  return {tiles, k / kBlockK >= 32 ? 8 : 4, ceil_div(all, tiles)};
}

struct GemmPlan {
  int block_m;  // 16, 32 or 64
  int blocks_m, blocks_n;
  int splits;           // of the k-blocks
  int blocks_of_split;  // k-blocks a split
};

constexpr int kGemmN = 128;

// Splits K only where the grid would leave SMs without work, and never below eight k-blocks a split: each split writes
// and reads rows * n floats.
ORIN_HD GemmPlan gemm_plan(int rows, int n, int k, int sms) {
  int block_m = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
  int k_blocks = k / kBlockK, blocks_m = ceil_div(rows, block_m), blocks_n = ceil_div(n, kGemmN);
  int splits = larger(1, smaller(2 * sms / (blocks_m * blocks_n), k_blocks / 8));
  int of_split = ceil_div(k_blocks, splits);
  return {block_m, blocks_m, blocks_n, ceil_div(k_blocks, of_split), of_split};
}

ORIN_HD size_t gemm_workspace(int rows, int n, int k, int sms) {
  GemmPlan plan = gemm_plan(rows, n, k, sms);
  return plan.splits == 1 ? 0 : size_t(plan.splits) * rows * n * sizeof(float);
}

// Enough for `rows` rows and for fewer, which may be split more often: the most of each number of row blocks.
ORIN_HD size_t gemm_largest_workspace(int rows, int n, int k, int sms) {
  size_t largest = gemm_workspace(rows, n, k, sms);
  for (int fewer = 64; fewer < rows; fewer += 64) {
    size_t bytes = gemm_workspace(fewer, n, k, sms);
    if (bytes == 0) break;  // nor will more rows be split
    if (bytes > largest) largest = bytes;
  }
  return largest;
}

// ---- KvAttention ----

constexpr int kDecodeMaxTokens = 8;
constexpr int kRowTile = 16;                           // rows of mma.m16n8k16
constexpr int kDecodeWarps = 4;                        // of a block, each with its own keys
constexpr int kStepKeys = 16;                          // keys of a warp's step
constexpr int kChunk = kDecodeWarps * kStepKeys;       // a split's keys are a multiple of it
constexpr int kMaxSplits = 128;

// Rows of a kv head: token s and query head g of its group are row s * groups + g.
ORIN_HD int row_token(int row, int groups) { return row / groups; }

// Splits of the keys in decode. Two blocks of 128 threads fit an SM (registers), so the grid is one full wave.
// From the cache's size, not from the lengths: a CUDA graph's grid is fixed while lengths grow.
ORIN_HD int decode_splits(int batch, int kv_heads, int rows, int max_len, int sms) {
  int others = batch * kv_heads * ceil_div(rows, kRowTile);
  int splits = smaller(ceil_div(2 * sms, others), ceil_div(max_len, kChunk));
  return larger(1, smaller(splits, kMaxSplits));
}

// Keys of each split, for a sequence that now holds `keys`.
ORIN_HD int split_keys(int keys, int splits) { return round_up(ceil_div(keys, splits), kChunk); }

// Splits that have any key at all; at least one, so that the combining kernel has something to read.
ORIN_HD int active_splits(int keys, int splits) { return larger(1, ceil_div(keys, split_keys(larger(keys, 1), splits))); }

ORIN_HD size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The rotated queries, fp16 [batch, kv_heads, tokens * groups, head_dim].
ORIN_HD size_t query_bytes(int batch, int tokens, int heads, int head_dim) {
  return aligned(size_t(batch) * tokens * heads * head_dim * 2);
}

// Queries, then for decode fp32 [splits, batch * heads * tokens, head_dim] and two floats a row: maximum and sum.
ORIN_HD size_t attention_bytes(int batch, int tokens, int heads, int kv_heads, int head_dim, int max_len, int sms) {
  size_t bytes = query_bytes(batch, tokens, heads, head_dim);
  if (tokens > kDecodeMaxTokens) return bytes;
  size_t rows = size_t(batch) * heads * tokens;
  size_t splits = decode_splits(batch, kv_heads, tokens * (heads / kv_heads), max_len, sms);
  return bytes + aligned(splits * rows * head_dim * 4) + aligned(splits * rows * 2 * 4);
}

// Enough for `batch` sequences of `tokens` and for fewer of either: fewer blocks are split more, so a smaller call can
// need more.
ORIN_HD size_t attention_workspace(int batch, int tokens, int heads, int kv_heads, int head_dim, int max_len, int sms) {
  size_t most = attention_bytes(batch, tokens, heads, kv_heads, head_dim, max_len, sms);
  for (int b = 1; b <= batch; ++b) {
    for (int s = 1; s <= smaller(tokens, kDecodeMaxTokens); ++s) {
      size_t bytes = attention_bytes(b, s, heads, kv_heads, head_dim, max_len, sms);
      if (bytes > most) most = bytes;
    }
  }
  return most;
}

// Which head_dim elements a lane's 16-byte loads of a key hold: chunk 4 j + t of the row, `per` elements each (8 of fp16,
// 16 of int8). k-step j * (per / 4) + q takes elements 4 q .. 4 q + 3 of the chunk: two for b0, two for b1. The dot
// product does not mind the order, if the query is read in the same one.
ORIN_HD int key_element(int step, int t, int pair, int per) {
  int j = step / (per / 4), q = step % (per / 4);
  return per * (4 * j + t) + 4 * q + 2 * pair;
}

// Elements of a lane's load of a value row: 16 bytes, or a row's eighth where that is less.
ORIN_HD constexpr int value_load(int head_dim, int element_bytes) { return smaller(16 / element_bytes, head_dim / 8); }

// Which head_dim element column `g` of output tile `i` is, where a lane's loads of a value row have `per` elements.
ORIN_HD int value_element(int i, int g, int per) { return per * (g + 8 * (i / per)) + i % per; }

// Prefill: 64 rows of a kv head for each block, 64 keys for each step.
constexpr int kPrefillWarps = 4;
constexpr int kPrefillRows = kPrefillWarps * kRowTile;
constexpr int kPrefillKeys = 64;

// Where 16-byte chunk `chunk` of a row of eight chunks or more lies in shared memory (x of the GEMM, keys and values of
// prefill): ldmatrix reads eight rows at one chunk, from eight different bank groups.
ORIN_HD int x_swizzle(int row, int chunk) { return chunk ^ (row & 7); }

// ---- argmax ----

constexpr int kArgmaxValues = 4096;  // of a block in the first pass
ORIN_HD int argmax_parts(int vocab) { return ceil_div(vocab, kArgmaxValues); }

// Orders like the float (the zeros are one), then by the smaller index; 0 is below everything. NaN is never the largest.
ORIN_HD uint64_t argmax_key(uint32_t bits, uint32_t index) {
  if (bits == 0x80000000u) bits = 0;
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(nan ? 0u : ordered) << 32 | (0xffffffffu - index);
}
ORIN_HD uint32_t argmax_index(uint64_t key) { return 0xffffffffu - uint32_t(key); }

}  // namespace orin
