// int8 weights times int8 activations, quantised here a row at a time. Included once per instruction set by each_isa.h.

#include "cpu/panel_matmul.h"

#if FASTINFER_AVX512
#include "cpu/dot_avx512.h"
#else
#include "cpu/dot_avx2.h"
#endif

struct Int8ScaledOp : DotOp {
  static constexpr uint32_t kInfinity = 0x7f800000;

  // x_scale = max|x| / 127, q = round(x / x_scale) to even; a row with NaN or infinity gets x_scale NaN and q = 0.
  template <Dtype T>
  static void pack_row(const Job& job, int64_t row, X* target, int64_t stride) {
    constexpr int64_t kBytes = T == Dtype::kFloat ? 4 : 2;
    const char* x = job.x + row * job.k * kBytes;
    Float values[kLineVecs];
    Int top = zero_int();  // of the bits of |x|: ordered like the numbers, NaN above infinity above all finite
    for (int64_t k = 0; k < job.k; k += kChunk) {
      load_some<T>(x + k * kBytes, job.k - k, values);
      for (int v = 0; v < kLineVecs; ++v) top = max_int(top, magnitude_bits(values[v]));
    }
    const uint32_t bits = reduce_max(top);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const float scale = largest / 127.0f;
    job.x_scale[row] = bits >= kInfinity ? __builtin_nanf("") : scale;
    const bool zero = bits >= kInfinity || !(scale > 0);
    const Float divisor = broadcast(zero ? 1.0f : scale);
    for (int64_t k = 0; k < job.k; k += kChunk, target += stride) {
      Int q[kLineVecs];
      load_some<T>(x + k * kBytes, job.k - k, values);
      for (int v = 0; v < kLineVecs; ++v) q[v] = zero ? zero_int() : round_to_int(clamp(div(values[v], divisor), 127.0f));
      store_quantised(target, q);
    }
  }
};

constexpr Kernels kInt8ScaledMatmul = PanelMatmul<Int8ScaledOp>::kernels();
