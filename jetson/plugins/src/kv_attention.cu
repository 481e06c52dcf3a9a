// orin_kv_attention: checks the arguments, lays out the workspace and picks the kernels.
#include "kv_attention.cuh"

namespace orin {
namespace {

constexpr char kName[] = "orin_kv_attention";

orin_status check_sizes(const orin_kv_attention_args& a) {
  ORIN_REQUIRE(a.batch >= 0 && a.tokens >= 0, "%s: batch %d and tokens %d, want 0 or more", kName, a.batch, a.tokens);
  ORIN_REQUIRE(a.head_dim == 64 || a.head_dim == 128, "%s: head_dim is %d, want 64 or 128", kName, a.head_dim);
  ORIN_REQUIRE(a.kv_num_heads > 0 && a.num_heads > 0 && a.num_heads % a.kv_num_heads == 0,
               "%s: num_heads %d is no multiple of kv_num_heads %d", kName, a.num_heads, a.kv_num_heads);
  ORIN_REQUIRE(a.max_len > 0, "%s: max_len is %d, want 1 or more", kName, a.max_len);
  ORIN_REQUIRE(a.max_positions > 0, "%s: max_positions is %d, want 1 or more", kName, a.max_positions);
  ORIN_REQUIRE(a.tokens <= kMaxGridY, "%s: tokens is %d, want %d or fewer", kName, a.tokens, kMaxGridY);
  ORIN_REQUIRE(int64_t(a.batch) * a.kv_num_heads <= kMaxGridY, "%s: batch * kv_num_heads is %lld, want %d or fewer",
               kName, static_cast<long long>(int64_t(a.batch) * a.kv_num_heads), kMaxGridY);
  ORIN_REQUIRE(int64_t(a.tokens) * a.num_heads <= INT32_MAX, "%s: tokens * num_heads is more than 2^31", kName);
  return ORIN_OK;
}

orin_status check_pointers(const orin_kv_attention_args& a) {
  ORIN_REQUIRE_POINTER(kName, a.qkv);
  ORIN_REQUIRE_POINTER(kName, a.key_cache);
  ORIN_REQUIRE_POINTER(kName, a.value_cache);
  ORIN_REQUIRE(a.past_lengths != nullptr, "%s: past_lengths is NULL", kName);
  ORIN_REQUIRE_POINTER(kName, a.cos);
  ORIN_REQUIRE_POINTER(kName, a.sin);
  ORIN_REQUIRE_POINTER(kName, a.y);
  ORIN_REQUIRE((a.q_norm == nullptr) == (a.k_norm == nullptr), "%s: q_norm and k_norm are given both or not at all",
               kName);
  ORIN_REQUIRE(aligned_16(a.q_norm) && aligned_16(a.k_norm), "%s: q_norm or k_norm is not aligned to 16 bytes", kName);
  if (a.int8_cache) {
    ORIN_REQUIRE_POINTER(kName, a.key_scale);
    ORIN_REQUIRE_POINTER(kName, a.value_scale);
  } else {
    ORIN_REQUIRE(a.key_scale == nullptr && a.value_scale == nullptr, "%s: scales are for an int8 cache", kName);
  }
  return ORIN_OK;
}

}  // namespace
}  // namespace orin

extern "C" size_t orin_kv_attention_workspace(int32_t batch, int32_t tokens, int32_t num_heads, int32_t kv_num_heads,
                                              int32_t head_dim, int32_t max_len) {
  int sms = 0;
  bool sizes = batch > 0 && tokens > 0 && num_heads > 0 && kv_num_heads > 0 && head_dim > 0 && max_len > 0;
  if (!sizes || orin::multiprocessors(&sms) != ORIN_OK) return 0;
  return orin::attention_workspace(batch, tokens, num_heads, kv_num_heads, head_dim, max_len, sms);
}

extern "C" orin_status orin_kv_attention(const orin_kv_attention_args* args, void* workspace, size_t bytes,
                                         orin_stream stream) {
  using namespace orin;
  ORIN_REQUIRE(args != nullptr, "%s: args is NULL", kName);
  const orin_kv_attention_args& given = *args;
  ORIN_RETURN_IF_FAILED(check_sizes(given));
  if (given.batch == 0 || given.tokens == 0) return ORIN_OK;
  ORIN_RETURN_IF_FAILED(check_pointers(given));
  int sms = 0;
  ORIN_RETURN_IF_FAILED(multiprocessors(&sms));
  ORIN_REQUIRE_WORKSPACE(kName, workspace, bytes,
                         attention_bytes(given.batch, given.tokens, given.num_heads, given.kv_num_heads,
                                         given.head_dim, given.max_len, sms));
  bool decode = given.tokens <= kDecodeMaxTokens, int8 = given.int8_cache != 0;
  Attention a{};
  a.batch = given.batch, a.tokens = given.tokens, a.kv_heads = given.kv_num_heads;
  a.groups = given.num_heads / given.kv_num_heads;
  a.max_len = given.max_len, a.max_positions = given.max_positions;
  a.scale = given.scale, a.epsilon = given.norm_epsilon;
  a.qkv = static_cast<const __half*>(given.qkv);
  a.keys = given.key_cache, a.values = given.value_cache;
  a.past = given.past_lengths, a.cos = given.cos, a.sin = given.sin;
  a.q_norm = static_cast<const __half*>(given.q_norm), a.k_norm = static_cast<const __half*>(given.k_norm);
  a.key_scale = given.key_scale, a.value_scale = given.value_scale;
  a.y = static_cast<__half*>(given.y);
  a.query = static_cast<__half*>(workspace);
  if (decode) {
    a.splits = decode_splits(a.batch, a.kv_heads, a.rows(), a.max_len, sms);
    size_t rows = size_t(a.batch) * a.kv_heads * a.rows();
    char* partial = static_cast<char*>(workspace) + query_bytes(a.batch, a.tokens, given.num_heads, given.head_dim);
    a.partial = reinterpret_cast<float*>(partial);
    a.state = reinterpret_cast<float2*>(partial + aligned(a.splits * rows * given.head_dim * sizeof(float)));
  }
  ORIN_RETURN_IF_FAILED(launch_append(a, given.head_dim, int8, stream));
  return decode ? launch_decode(a, given.head_dim, int8, stream) : launch_prefill(a, given.head_dim, int8, stream);
}
