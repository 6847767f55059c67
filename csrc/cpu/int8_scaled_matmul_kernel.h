// int8 weights times int8 activations, quantised here a row at a time. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

#include "cpu/panel_matmul.h"

#if FASTINFER_AVX512
#include "cpu/dot_avx512.h"
#else
#include "cpu/dot_avx2.h"
#endif

#include "cpu/quantize_row.h"

struct Int8ScaledOp : DotOp {
  template <Dtype T>
  static void pack_row(const Job& job, int64_t row, X* target, int64_t stride) {
    job.x_scale[row] = quantize_row<T>(job.x + row * job.k * bytes_in(T), job.k, target, stride);
  }

  static void copy_row(const Job& job, int64_t row, X* target, int64_t stride) {
    const auto* q = reinterpret_cast<const int8_t*>(job.x) + row * job.k;
    job.x_scale[row] = job.quantised_scale[row];
    for (int64_t left = job.k; left > 0; left -= kChunk, q += kChunk, target += stride) {
      alignas(16) int8_t chunk[kChunk] = {};
      std::memcpy(chunk, q, left < kChunk ? left : kChunk);
      store_quantised(target, chunk);
    }
  }
};

constexpr Kernels kInt8ScaledMatmul = PanelMatmul<Int8ScaledOp>::kernels();
