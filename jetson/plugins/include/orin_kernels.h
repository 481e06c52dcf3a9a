/* The kernels of orin-kit, with a plain C interface and without TensorRT.
 *
 * Every function checks its arguments, launches on `stream` and returns at once: it allocates nothing and waits for
 * nothing, so calls can be captured in a CUDA graph. Device pointers must be aligned to 16 bytes. What the operators
 * compute is said in orin_kit/export/plugin_ops.py; fp16 is `__half`. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ORIN_API __attribute__((visibility("default")))

typedef struct CUstream_st* orin_stream; /* cudaStream_t */

typedef enum {
  ORIN_OK = 0,
  ORIN_BAD_ARGUMENT = 1,    /* orin_last_error names the argument and its value */
  ORIN_SMALL_WORKSPACE = 2, /* fewer bytes than the ..._workspace function asks for */
  ORIN_CUDA_ERROR = 3       /* a launch failed; orin_last_error has CUDA's own words */
} orin_status;

typedef enum { ORIN_ACTIVATION_NONE = 0, ORIN_ACTIVATION_SILU_GATE = 1 } orin_activation;
typedef enum { ORIN_LAYOUT_ROWS = 0, ORIN_LAYOUT_INT4_LINEAR = 1 } orin_layout;

/* What went wrong in this thread's last failing call. */
ORIN_API const char* orin_last_error(void);
/* "0.1.0 sm_87", as built. */
ORIN_API const char* orin_version(void);

typedef struct {
  int32_t rows, n, k;
  int32_t group_size; /* 32, 64 or 128 */
  int32_t activation; /* orin_activation */
  const void* x;      /* fp16 [rows, k] */
  const void* weight; /* int32 [n / 8, k / 128, 8, 4, 4] */
  const void* scales; /* fp16 [k / group_size, n] */
  const void* bias;   /* fp16 [n], or NULL */
  void* y;            /* fp16 [rows, n], or [rows, n / 2] with ORIN_ACTIVATION_SILU_GATE */
} orin_int4_linear_args;

/* Bytes of workspace for `rows` rows or fewer on the current device. */
ORIN_API size_t orin_int4_linear_workspace(int32_t rows, int32_t n, int32_t k);
ORIN_API orin_status orin_int4_linear(const orin_int4_linear_args* args, void* workspace, size_t bytes,
                                      orin_stream stream);

typedef struct {
  int32_t batch, tokens; /* tokens <= 8 takes the decode path */
  int32_t num_heads, kv_num_heads, head_dim, max_len, max_positions;
  int32_t int8_cache;
  float scale, norm_epsilon;
  const void* qkv;              /* fp16 [batch, tokens, (num_heads + 2 kv_num_heads) * head_dim] */
  void* key_cache;              /* fp16 or int8 [batch, kv_num_heads, max_len, head_dim], written in place */
  void* value_cache;
  const int32_t* past_lengths;  /* [batch] */
  const float* cos;             /* [max_positions, head_dim / 2] */
  const float* sin;
  const void* q_norm;           /* fp16 [head_dim], or NULL; both or neither */
  const void* k_norm;
  const float* key_scale;       /* [kv_num_heads, head_dim], with an int8 cache */
  const float* value_scale;
  void* y;                      /* fp16 [batch, tokens, num_heads * head_dim] */
} orin_kv_attention_args;

ORIN_API size_t orin_kv_attention_workspace(int32_t batch, int32_t tokens, int32_t num_heads, int32_t kv_num_heads,
                                            int32_t head_dim, int32_t max_len);
ORIN_API orin_status orin_kv_attention(const orin_kv_attention_args* args, void* workspace, size_t bytes,
                                       orin_stream stream);

/* sum = x + residual (fp16), y = rms_norm(sum) * weight; residual and sum are both given or both NULL. */
ORIN_API orin_status orin_skip_rms_norm(const void* x, const void* weight, const void* residual, void* y, void* sum,
                                        int32_t rows, int32_t hidden, float epsilon, orin_stream stream);

typedef struct {
  int32_t tokens, vocab, hidden;
  int32_t bits, group_size;
  int32_t layout;      /* orin_layout */
  int32_t fp32_output;
  const int64_t* ids;  /* [tokens]; one outside the table gives a row of zeros */
  const void* table;   /* rows: uint8 [vocab, hidden * bits / 8]; else an int4_linear weight, 4 bits */
  const void* scales;  /* rows: fp16 [vocab, hidden / group_size]; else [hidden / group_size, vocab] */
  void* y;             /* [tokens, hidden] */
} orin_embedding_args;

ORIN_API orin_status orin_embedding_gather(const orin_embedding_args* args, orin_stream stream);

/* Index of the largest logit of each row, the smallest such index; NaN is never it. */
ORIN_API size_t orin_argmax_workspace(int32_t rows, int32_t vocab);
ORIN_API orin_status orin_argmax(const void* logits, int32_t fp16, int32_t rows, int32_t vocab, int64_t* index,
                                 void* workspace, size_t bytes, orin_stream stream);

#ifdef __cplusplus
}
#endif
