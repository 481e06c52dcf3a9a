// Every PTX instruction that the kernels write out themselves, in one place: inline assembly for nvcc and the same
// thing done by hand for the emulator. All of a warp's 32 lanes call the warp-wide ones together.
// https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include "cuda.cuh"

namespace orin {

#ifndef ORIN_EMULATE
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

__device__ __forceinline__ uint32_t half2_bits(__half2 pair) {
#ifdef ORIN_EMULATE
  return orin_bit_cast<uint32_t>(pair);
#else
  return *reinterpret_cast<uint32_t*>(&pair);
#endif
}

__device__ __forceinline__ __half2 bits_half2(uint32_t bits) {
#ifdef ORIN_EMULATE
  return orin_bit_cast<__half2>(bits);
#else
  return *reinterpret_cast<__half2*>(&bits);
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements from shared memory ----
// Lanes 8 i .. 8 i + 7 give the addresses of matrix i's rows (16 bytes each, aligned); lane 4 g + t receives of each
// matrix elements (g, 2 t) and (g, 2 t + 1), transposed (2 t, g) and (2 t + 1, g). x2 reads lanes 0-15's addresses.

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef ORIN_EMULATE
  emulator::load_matrices(r, row, 4, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef ORIN_EMULATE
  emulator::load_matrices(r, row, 4, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef ORIN_EMULATE
  emulator::load_matrices(r, row, 2, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef ORIN_EMULATE
  emulator::load_matrices(r, row, 2, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// ---- c += a b, with a [16, 16] and b [16, 8] in fp16 and c [16, 8] in fp32 ----
// Lane 4 g + t: a0 is row g, columns 2 t and 2 t + 1; a1 row g + 8, the same columns; a2 row g, columns 2 t + 8 and
// 2 t + 9; a3 row g + 8, those. b0 is column g, rows 2 t and 2 t + 1; b1 rows 2 t + 8, 2 t + 9. c0, c1 are row g,
// columns 2 t and 2 t + 1; c2, c3 row g + 8.
__device__ __forceinline__ void mma_16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
#ifdef ORIN_EMULATE
  emulator::multiply_16816(c, {a0, a1, a2, a3}, {b0, b1});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// ---- cp.async: 16 bytes from global to shared memory; visible to the issuing thread after the wait ----

__device__ __forceinline__ void cp_async_16(void* to_shared, const void* from_global) {
#ifdef ORIN_EMULATE
  emulator::copy_async(to_shared, from_global, 16, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(to_shared)), "l"(from_global)
               : "memory");
#endif
}

// Zeros where not `valid`; the address is then not read.
__device__ __forceinline__ void cp_async_16_or_zero(void* to_shared, const void* from_global, bool valid) {
#ifdef ORIN_EMULATE
  emulator::copy_async(to_shared, from_global, 16, valid ? 16 : 0);
#else
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to_shared)), "l"(from_global),
               "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef ORIN_EMULATE
  emulator::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef ORIN_EMULATE
  emulator::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// ---- 16 bytes at once ----

// What a kernel reads once and never writes: past L1, so that what is read often stays there.
__device__ __forceinline__ uint4 load_streaming_16(const void* address) {
#ifdef ORIN_EMULATE
  emulator::check_aligned(address, 16, "a 16-byte load");
  return *static_cast<const uint4*>(address);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
#endif
}

__device__ __forceinline__ uint4 load_16(const void* address) {
#ifdef ORIN_EMULATE
  emulator::check_aligned(address, 16, "a 16-byte load");
#endif
  return *static_cast<const uint4*>(address);
}

__device__ __forceinline__ void store_16(void* address, uint4 value) {
#ifdef ORIN_EMULATE
  emulator::check_aligned(address, 16, "a 16-byte store");
#endif
  *static_cast<uint4*>(address) = value;
}

// ---- 2^x, within 2 ulp; 2^-inf is 0 ----

__device__ __forceinline__ float exp2_approx(float x) {
#ifdef ORIN_EMULATE
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Eight bytes, and only where the address is a multiple of eight.
__device__ __forceinline__ uint2 load_streaming_8(const void* address) {
#ifdef ORIN_EMULATE
  emulator::check_aligned(address, 8, "an 8-byte load");
  return *static_cast<const uint2*>(address);
#else
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
#endif
}

// ---- prmt: byte i of the result is byte (selector >> 4 i) & 7 of the eight in `low` and `high` ----

__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef ORIN_EMULATE
  uint64_t bytes = low | uint64_t(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
#else
  return __byte_perm(low, high, selector);
#endif
}

}  // namespace orin
