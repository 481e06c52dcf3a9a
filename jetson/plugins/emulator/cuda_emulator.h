// Enough of CUDA's device language for g++ to compile this library's .cu files and run them on a CPU: every thread of a
// block is a fiber, blocks run one after the other. For tests of index arithmetic, numerics and control flow. It knows
// nothing of races in general, of memory ordering or of speed; see jetson/README.md.
//
// What it does catch: a __syncthreads or warp operation that some lanes never reach, shared memory read before it was
// written (it is filled with NaN) or written behind its end, a missing wait after cp.async (the copy is made at the
// wait and not before), a misaligned 16-byte access, and, with a seed, many a missing barrier: warps, lanes and blocks
// then run in a shuffled order.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace orin::emulator {

constexpr int kLanes = 32;

// Says what a kernel did wrong and ends the launch; does not return to the fiber.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs a grid. False: `error()` says why.
bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
const char* error();
int sms();

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

void sync_threads();

// A lane comes to a warp operation with its operands in `mine`. True for the last lane of `mask`: it finds all lanes'
// operands in `lanes`, writes the results there and calls `release`. The others return false once that is done.
bool arrive(uint32_t mask, const char* operation, void* mine, void** lanes);
void release(uint32_t mask);

template <typename T, typename Compute>
void collective(uint32_t mask, const char* operation, T& mine, Compute compute) {
  void* lanes[kLanes];
  if (!arrive(mask, operation, &mine, lanes)) return;
  compute(reinterpret_cast<T**>(lanes));
  release(mask);
}

int lane();

void copy_async(void* to, const void* from, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

inline void check_aligned(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("%s at an address that is no multiple of %zu", what, bytes);
}

// ldmatrix: `count` matrices, and mma.m16n8k16; src/ptx.cuh says which lane holds what.
void load_matrices(uint32_t* results, const void* row, int count, bool transpose);
struct Left {
  uint32_t of[4];
};
struct Right {
  uint32_t of[2];
};
void multiply_16816(float* c, Left a, Right b);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

template <typename T>
struct Exchanged {
  T value;
  int from;
};

template <typename T>
T shuffle(uint32_t mask, T value, int from, const char* operation) {
  Exchanged<T> mine{value, from};
  collective(mask, operation, mine, [&](Exchanged<T>** lanes) {
    T values[kLanes] = {};
    for (int i = 0; i < kLanes; ++i)
      if (lanes[i]) values[i] = lanes[i]->value;
    for (int i = 0; i < kLanes; ++i) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->from]) fail("%s: lane %d reads lane %d, outside the mask", operation, i, lanes[i]->from);
      lanes[i]->value = values[lanes[i]->from];
    }
  });
  return mine.value;
}

inline uint32_t ballot(uint32_t mask, bool predicate) {
  struct Vote {
    uint32_t bits;
  } mine{predicate};
  collective(mask, "__ballot_sync", mine, [](Vote** lanes) {
    uint32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= lanes[i] ? lanes[i]->bits << i : 0u;
    for (int i = 0; i < kLanes; ++i)
      if (lanes[i]) lanes[i]->bits = all;
  });
  return mine.bits;
}

}  // namespace orin::emulator

// ---- half: stored as bits, computed in fp32 or fp64 and rounded to nearest even ----

struct alignas(2) __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;

#ifdef __F16C__
inline float __half2float(__half a) { return _cvtsh_ss(a.bits); }
inline __half __float2half_rn(float a) { return {static_cast<uint16_t>(_cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT))}; }
#else
inline float __half2float(__half a) { return orin::emulator::half_to_float(a.bits); }
inline __half __float2half_rn(float a) { return {orin::emulator::float_to_half(a)}; }
#endif
inline __half __float2half(float a) { return __float2half_rn(a); }
inline __half __ushort_as_half(uint16_t a) { return {a}; }
inline uint16_t __half_as_ushort(__half a) { return a.bits; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __float2half2_rn(float a) { return __half2half2(__float2half_rn(a)); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
inline float __low2float(__half2 a) { return __half2float(a.x); }
inline float __high2float(__half2 a) { return __half2float(a.y); }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
// Sums and products of two halves are exact in fp64, and so is a * b + c but for extremes; one rounding to fp32 with
// 13 spare bits before that to half could differ from the hardware's single one in the last place, very rarely.
inline __half __hadd(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
inline __half __hsub(__half a, __half b) { return __float2half_rn(__half2float(a) - __half2float(b)); }
inline __half __hmul(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }
inline __half __hfma(__half a, __half b, __half c) {
  return __float2half_rn(float(double(__half2float(a)) * __half2float(b) + __half2float(c)));
}
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

// ---- intrinsics ----

template <typename To, typename From>
inline To orin_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float a) { return orin_bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return orin_bit_cast<float>(a); }
inline int __float_as_int(float a) { return orin_bit_cast<int>(a); }
inline float __int_as_float(int a) { return orin_bit_cast<float>(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
template <typename T>
inline T __ldg(const T* p) { return *p; }
template <typename T>
inline T atomicAdd(T* p, T value) {
  T old = *p;
  *p = old + value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __syncthreads() { orin::emulator::sync_threads(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  int nothing = 0;
  orin::emulator::collective(mask, "__syncwarp", nothing, [](int**) {});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return orin::emulator::ballot(mask, predicate != 0); }
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  int lane = orin::emulator::lane();
  return orin::emulator::shuffle(mask, value, (lane & ~(width - 1)) | (from & (width - 1)), "__shfl_sync");
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  int lane = orin::emulator::lane(), from = lane ^ bits;
  return orin::emulator::shuffle(mask, value, from / width > lane / width ? lane : from, "__shfl_xor_sync");
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32) {
  int lane = orin::emulator::lane();
  return orin::emulator::shuffle(mask, value, lane % width + by < width ? lane + by : lane, "__shfl_down_sync");
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32) {
  int lane = orin::emulator::lane();
  return orin::emulator::shuffle(mask, value, lane % width >= by ? lane - by : lane, "__shfl_up_sync");
}
