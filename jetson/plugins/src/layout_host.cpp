// orin_layout.h through a C interface, for the tests on the CPU (ctypes).
#include "orin_layout.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void layout_nibble_place(int n, int k, int k_total, int64_t* word, int* nibble) {
  orin::NibblePlace place = orin::nibble_place(n, k, k_total);
  *word = int64_t(place.word);
  *nibble = place.nibble;
}
EXPORT int layout_pair_feature(int t, int w, int p) { return orin::pair_feature(t, w, p); }
EXPORT uint32_t layout_magic_low(uint32_t word) { return orin::magic_low(word); }
EXPORT uint32_t layout_magic_high(uint32_t word) { return orin::magic_high(word); }
EXPORT void layout_gemv_plan(int n, int k, int sms, int* out) {
  orin::GemvPlan plan = orin::gemv_plan(n, k, sms);
  out[0] = plan.tiles, out[1] = plan.warps, out[2] = plan.blocks;
}
EXPORT void layout_gemm_plan(int rows, int n, int k, int sms, int* out) {
  orin::GemmPlan plan = orin::gemm_plan(rows, n, k, sms);
  out[0] = plan.block_m, out[1] = plan.blocks_m, out[2] = plan.blocks_n;
  out[3] = plan.splits, out[4] = plan.blocks_of_split;
}
EXPORT size_t layout_gemm_workspace(int rows, int n, int k, int sms) { return orin::gemm_workspace(rows, n, k, sms); }
EXPORT int layout_decode_splits(int batch, int kv_heads, int rows, int max_len, int sms) {
  return orin::decode_splits(batch, kv_heads, rows, max_len, sms);
}
EXPORT int layout_split_keys(int keys, int splits) { return orin::split_keys(keys, splits); }
EXPORT int layout_active_splits(int keys, int splits) { return orin::active_splits(keys, splits); }
EXPORT size_t layout_attention_workspace(int batch, int tokens, int heads, int kv_heads, int head_dim, int max_len,
                                         int sms) {
  return orin::attention_workspace(batch, tokens, heads, kv_heads, head_dim, max_len, sms);
}
EXPORT int layout_key_element(int step, int t, int pair, int per) { return orin::key_element(step, t, pair, per); }
EXPORT int layout_value_element(int i, int g, int per) { return orin::value_element(i, g, per); }
EXPORT int layout_value_load(int head_dim, int element_bytes) { return orin::value_load(head_dim, element_bytes); }
EXPORT int layout_x_swizzle(int row, int chunk) { return orin::x_swizzle(row, chunk); }
EXPORT uint64_t layout_argmax_key(uint32_t bits, uint32_t index) { return orin::argmax_key(bits, index); }
EXPORT uint32_t layout_argmax_index(uint64_t key) { return orin::argmax_index(key); }
