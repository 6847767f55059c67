// wgmma: d[64, N] += a[64, k] · b[k, N], a in registers or shared memory, b in shared memory (K-major), d in registers
// Source    PTX ISA, wgmma.mma_async: register fragments; matrix descriptor
// Mapping   warp w of the warpgroup holds rows 16w …; lane 4g + t holds a and d as in mma.m16n8k16 (k32 for int8), d[4j …]
//           being columns 8j + 2t, 8j + 2t + 1 of rows g and g + 8
#pragma once

#include "common/hopper.cuh"

namespace fastinfer {

// Before wgmma reads registers that other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// An operand without a swizzle: core matrices of eight rows × 16 bytes, 128 bytes each. The next 16 bytes of k are `k_stride`
// bytes on, the next eight rows `row_stride`.
__device__ __forceinline__ uint64_t core_matrix_descriptor(uint32_t smem, int k_stride, int row_stride) {
  return uint64_t(row_stride >> 4) << 32 | uint64_t(k_stride >> 4) << 16 | ((smem & 0x3FFFF) >> 4);
}

// Rows of 128 bytes in groups of eight, as a tensor map with the 128-byte swizzle writes them. `smem` is 1024-byte
// aligned; adding 2 to the result moves on by 32 bytes of k.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t smem) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupStride = uint64_t(1024 >> 4) << 32, kUnused = 1ull << 16;
  return kSwizzle128 | kGroupStride | kUnused | ((smem & 0x3FFFF) >> 4);
}

// ---- where sums go ---------------------------------------------------------------------------------------------------

// What store_two_matrices_transposed and store_matrix_transposed store.
__device__ __forceinline__ void load_two_matrices_transposed(uint32_t (&v)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(v[0]), "=r"(v[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t load_matrix_transposed(uint32_t address) {
  uint32_t v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// ---- the product -----------------------------------------------------------------------------------------------------

// The operand lists of an asm statement, eight registers at a time.
#define FASTINFER_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTINFER_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FASTINFER_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FASTINFER_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTINFER_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTINFER_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FASTINFER_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FASTINFER_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FASTINFER_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FASTINFER_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FASTINFER_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTINFER_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FASTINFER_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FASTINFER_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FASTINFER_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FASTINFER_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FASTINFER_REGISTERS_8 FASTINFER_R0
#define FASTINFER_REGISTERS_16 FASTINFER_R0 ", " FASTINFER_R1
#define FASTINFER_REGISTERS_32 FASTINFER_REGISTERS_16 ", " FASTINFER_R2 ", " FASTINFER_R3
#define FASTINFER_REGISTERS_64 \
  FASTINFER_REGISTERS_32 ", " FASTINFER_R4 ", " FASTINFER_R5 ", " FASTINFER_R6 ", " FASTINFER_R7
#define FASTINFER_REGISTERS_128                                                                                       \
  FASTINFER_REGISTERS_64 ", " FASTINFER_R8 ", " FASTINFER_R9 ", " FASTINFER_R10 ", " FASTINFER_R11 ", " FASTINFER_R12 \
                         ", " FASTINFER_R13 ", " FASTINFER_R14 ", " FASTINFER_R15
#define FASTINFER_D8(c, d, i)                                                                           \
  "+" c(d[i + 0]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3]), "+" c(d[i + 4]), "+" c(d[i + 5]), \
      "+" c(d[i + 6]), "+" c(d[i + 7])
#define FASTINFER_OUT_8(c, d, i) FASTINFER_D8(c, d, i)
#define FASTINFER_OUT_16(c, d, i) FASTINFER_OUT_8(c, d, i), FASTINFER_OUT_8(c, d, i + 8)
#define FASTINFER_OUT_32(c, d, i) FASTINFER_OUT_16(c, d, i), FASTINFER_OUT_16(c, d, i + 16)
#define FASTINFER_OUT_64(c, d, i) FASTINFER_OUT_32(c, d, i), FASTINFER_OUT_32(c, d, i + 32)
#define FASTINFER_OUT_128(c, d, i) FASTINFER_OUT_64(c, d, i), FASTINFER_OUT_64(c, d, i + 64)

// `a0` is the number of the first operand after d's.
#define FASTINFER_WGMMA(shape, type, count, a0, a1, a2, a3, desc, keep)                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" keep                                                \
               ", 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" FASTINFER_REGISTERS_##count \
               "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" desc ", add, 1, 1, 0;\n}\n"                     \
               : FASTINFER_OUT_##count("f", d, 0)                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate))                   \
               : "memory")

// T is the type of a and b: __nv_bfloat16 or __half, k = 16. Without `accumulate` d is overwritten.
template <typename T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kColumns == 16) {
    if constexpr (kHalf) {
      FASTINFER_WGMMA("m64n16k16", "f16", 8, "8", "9", "10", "11", "12", "13");
    } else {
      FASTINFER_WGMMA("m64n16k16", "bf16", 8, "8", "9", "10", "11", "12", "13");
    }
  } else if constexpr (kColumns == 32) {
    if constexpr (kHalf) {
      FASTINFER_WGMMA("m64n32k16", "f16", 16, "16", "17", "18", "19", "20", "21");
    } else {
      FASTINFER_WGMMA("m64n32k16", "bf16", 16, "16", "17", "18", "19", "20", "21");
    }
  } else if constexpr (kColumns == 64) {
    if constexpr (kHalf) {
      FASTINFER_WGMMA("m64n64k16", "f16", 32, "32", "33", "34", "35", "36", "37");
    } else {
      FASTINFER_WGMMA("m64n64k16", "bf16", 32, "32", "33", "34", "35", "36", "37");
    }
  } else if constexpr (kColumns == 128) {
    if constexpr (kHalf) {
      FASTINFER_WGMMA("m64n128k16", "f16", 64, "64", "65", "66", "67", "68", "69");
    } else {
      FASTINFER_WGMMA("m64n128k16", "bf16", 64, "64", "65", "66", "67", "68", "69");
    }
  } else if constexpr (kColumns == 256) {
    if constexpr (kHalf) {
      FASTINFER_WGMMA("m64n256k16", "f16", 128, "128", "129", "130", "131", "132", "133");
    } else {
      FASTINFER_WGMMA("m64n256k16", "bf16", 128, "128", "129", "130", "131", "132", "133");
    }
  } else {
    static_assert(kColumns < 0, "no wgmma of this width");
  }
}

#define FASTINFER_WGMMA_SHARED(shape, count, a_operand, b_operand, keep)                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" keep                                    \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned." shape ".s32.s8.s8 {" FASTINFER_REGISTERS_##count \
               "}, %" a_operand ", %" b_operand ", add;\n}\n"                                   \
               : FASTINFER_OUT_##count("r", d, 0)                                               \
               : "l"(a), "l"(b), "r"(int(accumulate))                                           \
               : "memory")

// The same of int8, a in shared memory too, k = 32.
template <int kColumns>
__device__ __forceinline__ void wgmma_int8(int32_t (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (kColumns == 32) {
    FASTINFER_WGMMA_SHARED("m64n32k32", 16, "16", "17", "18");
  } else if constexpr (kColumns == 64) {
    FASTINFER_WGMMA_SHARED("m64n64k32", 32, "32", "33", "34");
  } else if constexpr (kColumns == 128) {
    FASTINFER_WGMMA_SHARED("m64n128k32", 64, "64", "65", "66");
  } else if constexpr (kColumns == 256) {
    FASTINFER_WGMMA_SHARED("m64n256k32", 128, "128", "129", "130");
  } else {
    static_assert(kColumns < 0, "no wgmma of this width");
  }
}

}  // namespace fastinfer
