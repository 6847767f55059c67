// Compiles one kernel header once per instruction set, each in its own namespace, with no global -march: the library
// loads on any x86-64 and chooses at run time (isa.h). Before including this file an op defines
//   FASTINFER_KERNEL  the header to compile; it may include others of the kind "included once per instruction set",
//                     must not include standard headers, and holds no lambdas (gcc compiles those without the target).
// Inside, FASTINFER_AVX512 is 0 or 1, and simd_avx2.h or simd_avx512.h gives the vector types.

#include <immintrin.h>

#include "cpu/matmul.h"

#include <cmath>
#include <cstring>

#define FI_INLINE inline __attribute__((always_inline))
#define FI_NOINLINE __attribute__((noinline))  // a hot loop gets the registers to itself
#define FI_UNROLL _Pragma("GCC unroll 16")     // so that arrays of vectors live in registers

#pragma GCC diagnostic ignored "-Wignored-attributes"   // vector types as template arguments
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in gcc 12's own intrinsics headers
#pragma GCC diagnostic ignored "-Wuninitialized"

#define FASTINFER_AVX512 0
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fastinfer::avx2 {
#include "cpu/simd_avx2.h"
#include FASTINFER_KERNEL
}  // namespace fastinfer::avx2
#pragma GCC pop_options
#undef FASTINFER_AVX512

#define FASTINFER_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace fastinfer::avx512 {
#include "cpu/simd_avx512.h"
#include FASTINFER_KERNEL
}  // namespace fastinfer::avx512
#pragma GCC pop_options
#undef FASTINFER_AVX512
