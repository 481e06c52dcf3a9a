// orin_int4_linear: checks, and which kernel.
#include "int4_linear.cuh"

namespace orin {
namespace {

orin_status check(const orin_int4_linear_args& args) {
  const char* name = "orin_int4_linear";
  bool gate = args.activation == ORIN_ACTIVATION_SILU_GATE;
  ORIN_REQUIRE(gate || args.activation == ORIN_ACTIVATION_NONE,
               "%s: activation is %d, want %d (none) or %d (silu_gate)", name, args.activation, ORIN_ACTIVATION_NONE,
               ORIN_ACTIVATION_SILU_GATE);
  ORIN_REQUIRE(args.rows >= 0, "%s: rows is %d, want 0 or more", name, args.rows);
  int rows = gate ? 2 * kTileRows : kTileRows;
  ORIN_REQUIRE(args.n > 0 && args.n % rows == 0, "%s: n is %d, want a multiple of %d", name, args.n, rows);
  ORIN_REQUIRE(args.n <= kMaxGridY * kGemmN, "%s: n is %d, want %d at most", name, args.n, kMaxGridY * kGemmN);
  ORIN_REQUIRE(args.k > 0 && args.k % kBlockK == 0, "%s: k is %d, want a multiple of %d", name, args.k, kBlockK);
  ORIN_REQUIRE(args.group_size == 32 || args.group_size == 64 || args.group_size == 128,
               "%s: group_size is %d, want 32, 64 or 128", name, args.group_size);
  if (args.rows == 0) return ORIN_OK;
  ORIN_REQUIRE_POINTER(name, args.x);
  ORIN_REQUIRE_POINTER(name, args.weight);
  ORIN_REQUIRE_POINTER(name, args.scales);
  ORIN_REQUIRE_POINTER(name, args.y);
  ORIN_REQUIRE(aligned_16(args.bias), "%s: args.bias is not aligned to 16 bytes", name);
  return ORIN_OK;
}

}  // namespace
}  // namespace orin

extern "C" size_t orin_int4_linear_workspace(int32_t rows, int32_t n, int32_t k) {
  using namespace orin;
  int sms = 0;
  if (rows <= kGemvMaxRows || n <= 0 || k < kBlockK || multiprocessors(&sms) != ORIN_OK) return 0;
  return gemm_largest_workspace(rows, n, k, sms);
}

extern "C" orin_status orin_int4_linear(const orin_int4_linear_args* given, void* workspace, size_t bytes,
                                        orin_stream stream) {
  using namespace orin;
  ORIN_REQUIRE(given != nullptr, "orin_int4_linear: args is NULL");
  ORIN_RETURN_IF_FAILED(check(*given));
  if (given->rows == 0) return ORIN_OK;
  LinearArgs args{given->rows,
                  given->n,
                  given->k,
                  given->activation == ORIN_ACTIVATION_SILU_GATE,
                  static_cast<const __half*>(given->x),
                  static_cast<const uint32_t*>(given->weight),
                  static_cast<const __half*>(given->scales),
                  static_cast<const __half*>(given->bias),
                  static_cast<__half*>(given->y)};
  int sms = 0, groups = kBlockK / given->group_size;
  ORIN_RETURN_IF_FAILED(multiprocessors(&sms));
  if (args.rows <= kGemvMaxRows) return launch_gemv(args, groups, sms, stream);
  ORIN_REQUIRE_WORKSPACE("orin_int4_linear", workspace, bytes, gemm_workspace(args.rows, args.n, args.k, sms));
  return launch_gemm(args, groups, sms, static_cast<float*>(workspace), stream);
}
