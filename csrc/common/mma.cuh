// Device building blocks of the matmul kernels: asynchronous copies, tensor-core products, integer to half conversion.
// All of it is PTX of compute capability 8.0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fastinfer {

// ---- asynchronous copies ----------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, global to shared; `bytes` (16 or 0) are read and the rest is zero-filled. _stream bypasses L1 (weights, read
// once); _cached keeps the line there (activations, read by every block on the multiprocessor).
__device__ __forceinline__ void copy16_stream(uint32_t smem, const void* gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem), "l"(gmem), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy16_cached(uint32_t smem, const void* gmem, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem), "l"(gmem), "r"(bytes) : "memory");
}
// The same, always all of them.
__device__ __forceinline__ void copy16_stream(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(smem), "l"(gmem) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(smem), "l"(gmem) : "memory");
}
// 8 or 4 bytes, of which `bytes` are read.
__device__ __forceinline__ void copy8(uint32_t smem, const void* gmem, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(smem), "l"(gmem), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t smem, const void* gmem, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(smem), "l"(gmem), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `pending` (0, 1 or 2; 2 or more count as 2) of this thread's newest copy groups are unfinished.
__device__ __forceinline__ void copy_wait(int pending) {
  if (pending <= 0) {
    asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;\n" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;\n" ::: "memory");
  }
}
// The same where it is known how many.
template <int kPending>
__device__ __forceinline__ void copy_wait_for() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Barrier among `threads` threads of the block; `id` 1 … 15 (0 is __syncthreads).
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- shared-memory reads ----------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_smem16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_smem4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_smem_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ float load_smem_float(uint32_t address) { return __uint_as_float(load_smem4(address)); }
__device__ __forceinline__ float4 load_smem_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_smem_float4(uint32_t address, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_smem8(uint32_t address, const uint2& v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};\n" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

// ---- global memory, arithmetic ----------------------------------------------------------------------------------------

// The load is issued where it stands; what needs it waits, where that stands. From the L2: an L1 may still have what was
// there before the kernel before, for kernels that start early.
__device__ __forceinline__ int load_at_once(const int* gmem) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(v) : "l"(gmem));
  return v;
}
// Returns what was there. Releases what this thread has seen written (by its block before a barrier, too), acquires what
// those that came before have released.
__device__ __forceinline__ unsigned add_in_order(unsigned* gmem, unsigned v) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;\n" : "=r"(before) : "l"(gmem), "r"(v) : "memory");
  return before;
}
__device__ __forceinline__ float exp2_fast(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(out) : "f"(v));
  return out;
}

// ---- tensor cores: c[16, 8] += a[16, k] · b[k, 8] -----------------------------------------------------------------------
// Lane 4g + t holds a rows g (registers 0, 2) and g + 8 (1, 3), b column g, and c[g][2t, 2t+1], c[g + 8][2t, 2t+1].

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k32_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T>
constexpr uint32_t kOnes = 0;  // a pair of ones
template <>
constexpr uint32_t kOnes<__half> = 0x3C003C00;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3F803F80;

// ---- integers to halves -----------------------------------------------------------------------------------------------
// The method of Kim, Henry, Fahim, Awadalla, "Who Says Elephants Can't Run", arXiv 2211.10017: put the integer's bits in
// the mantissa of a float with a known exponent, then take that offset away.

template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return out;
}
constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;  // (a & b) | c

__device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ __half2 as_half2(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }
__device__ __forceinline__ __nv_bfloat162 as_bfloat162(uint32_t v) { return *reinterpret_cast<__nv_bfloat162*>(&v); }
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  return bits(__floats2bfloat162_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  return bits(__floats2half2_rn(low, high));
}

// The int8 in the low byte of each half: seven mantissa bits hold b & 127; the sign bit turns the subtrahend from 128 to 256.
__device__ __forceinline__ uint32_t low_bytes_to_bfloat162(uint32_t v) {
  const uint32_t low = lop3<kAndOr>(v, 0x007F007F, 0x43004300);
  const uint32_t sign = lop3<kAndOr>(v, 0x00800080, 0x43004300);
  return bits(__hsub2(as_bfloat162(low), as_bfloat162(sign)));
}

// Four int8 b0 … b3 to two pairs: out[0] = (b0, b1), out[1] = (b2, b3); exact.
template <typename T>
__device__ __forceinline__ void int8x4_to_pairs(uint32_t w, uint32_t (&out)[2]);

template <>
__device__ __forceinline__ void int8x4_to_pairs<__half>(uint32_t w, uint32_t (&out)[2]) {
  w ^= 0x80808080;  // b + 128, put below an exponent that makes it 1024 + b + 128
  const __half2 offset = as_half2(0x64806480);
  out[0] = bits(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4140)), offset));
  out[1] = bits(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4342)), offset));
}
template <>
__device__ __forceinline__ void int8x4_to_pairs<__nv_bfloat16>(uint32_t w, uint32_t (&out)[2]) {
  out[0] = low_bytes_to_bfloat162(__byte_perm(w, 0, 0x4140));
  out[1] = low_bytes_to_bfloat162(__byte_perm(w, 0, 0x4342));
}

// Four int8 b0 … b3 to the pairs (b0, b2) and (b1, b3), which take no permutation; exact.
template <typename T>
__device__ __forceinline__ void int8x4_to_interleaved_pairs(uint32_t w, uint32_t& first, uint32_t& second);

template <>
__device__ __forceinline__ void int8x4_to_interleaved_pairs<__half>(uint32_t w, uint32_t& first, uint32_t& second) {
  w ^= 0x80808080;
  const __half2 offset = as_half2(0x64806480);
  first = bits(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4240)), offset));
  second = bits(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4341)), offset));
}
template <>
__device__ __forceinline__ void int8x4_to_interleaved_pairs<__nv_bfloat16>(uint32_t w, uint32_t& first,
                                                                           uint32_t& second) {
  first = low_bytes_to_bfloat162(w);
  second = low_bytes_to_bfloat162(w >> 8);
}

// Eight 4-bit q0 … q7 (q0 lowest) to four pairs: out[i] = (q_i, q_(i+4)) + kInt4Offset<T>; exact.
// In bf16 the offset stays in: the caller takes offset · Σx away together with the zero point, in fp32.
template <typename T>
constexpr float kInt4Offset = 0.f;
template <>
constexpr float kInt4Offset<__nv_bfloat16> = 128.f;

template <typename T>
__device__ __forceinline__ void int4x8_to_pairs(uint32_t w, uint32_t (&out)[4]);

template <>
__device__ __forceinline__ void int4x8_to_pairs<__half>(uint32_t w, uint32_t (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t v = w >> (8 * i);
    const uint32_t low = lop3<kAndOr>(v, 0x000F000F, 0x64006400);   // 1024 + q
    const uint32_t high = lop3<kAndOr>(v, 0x00F000F0, 0x64006400);  // 1024 + 16 q
    out[2 * i] = bits(__hsub2(as_half2(low), as_half2(0x64006400)));
    out[2 * i + 1] = bits(__hfma2(as_half2(high), as_half2(0x2C002C00), as_half2(0xD400D400)));  // · 1/16 − 64
  }
}
template <>
__device__ __forceinline__ void int4x8_to_pairs<__nv_bfloat16>(uint32_t w, uint32_t (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = lop3<kAndOr>(w >> (4 * i), 0x000F000F, 0x43004300);
}

// Eight activations in the order int4x8_to_pairs yields.
__device__ __forceinline__ uint4 pair_with_fourth_next(const uint4& v) {
  return {__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
          __byte_perm(v.y, v.w, 0x7632)};
}

}  // namespace fastinfer
