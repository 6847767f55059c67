// int8 weights times int8 activations, quantised here a row at a time. Included once per instruction set by each_isa.h.

#include "cpu/panel_matmul.h"

#if FASTINFER_AVX512
#include "cpu/dot_avx512.h"
#else
#include "cpu/dot_avx2.h"
#endif

struct Int8ScaledOp : DotOp {
  static constexpr uint32_t kInfinity = 0x7f800000;
  static constexpr float kSmallestNormal = 0x1p-126f;

  // The largest of the bits of |x|: they order like the numbers, NaN above infinity above all finite ones.
  template <Dtype T>
  static FI_INLINE uint32_t largest_bits(const char* x, int64_t left) {
    Int top[kLineVecs];
    Float values[kLineVecs];
    for (int v = 0; v < kLineVecs; ++v) top[v] = zero_int();
    for (; left >= kChunk; left -= kChunk, x += kChunk * bytes_in(T)) {
      load_chunk<T>(x, values);
      FI_UNROLL
      for (int v = 0; v < kLineVecs; ++v) top[v] = max_int(top[v], magnitude_bits(values[v]));
    }
    load_some<T>(x, left, values);
    for (int v = 0; v < kLineVecs; ++v) top[0] = max_int(top[0], max_int(top[v], magnitude_bits(values[v])));
    return reduce_max(top[0]);
  }

  // Below the normal numbers a scale is rounded so coarsely that x / scale can exceed 127: MODE kClamp.
  enum Mode { kZero, kRound, kClamp };

  template <Mode MODE>
  static FI_INLINE void quantise_chunk(const Float* values, Float divisor, X* target) {
    Int q[kLineVecs];
    FI_UNROLL
    for (int v = 0; v < kLineVecs; ++v) {
      const Float scaled = div(values[v], divisor);
      q[v] = MODE == kZero ? zero_int() : round_to_int(MODE == kClamp ? clamp(scaled, 127.0f) : scaled);
    }
    store_quantised(target, q);
  }

  template <Dtype T, Mode MODE>
  static FI_INLINE void quantise(const char* x, int64_t left, float scale, X* target, int64_t stride) {
    const Float divisor = broadcast(scale);
    Float values[kLineVecs];
    for (; left >= kChunk; left -= kChunk, x += kChunk * bytes_in(T), target += stride) {
      load_chunk<T>(x, values);
      quantise_chunk<MODE>(values, divisor, target);
    }
    if (left == 0) return;
    load_some<T>(x, left, values);
    quantise_chunk<MODE>(values, divisor, target);
  }

  // x_scale = max|x| / 127, q = round(x / x_scale) to even; a row with NaN or infinity gets x_scale NaN and q = 0.
  template <Dtype T>
  static void pack_row(const Job& job, int64_t row, X* target, int64_t stride) {
    const char* x = job.x + row * job.k * bytes_in(T);
    const uint32_t bits = largest_bits<T>(x, job.k);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool finite = bits < kInfinity;
    const float scale = largest / 127.0f;
    job.x_scale[row] = finite ? scale : __builtin_nanf("");
    if (!finite || !(scale > 0)) {
      quantise<T, kZero>(x, job.k, 1.0f, target, stride);
    } else if (scale < kSmallestNormal) {
      quantise<T, kClamp>(x, job.k, scale, target, stride);
    } else {
      quantise<T, kRound>(x, job.k, scale, target, stride);
    }
  }
};

constexpr Kernels kInt8ScaledMatmul = PanelMatmul<Int8ScaledOp>::kernels();
