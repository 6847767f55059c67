// gemv_fp32: y[M,N] = x[M,K] · dequant(w)ᵀ for fp32 x and M ≤ 8, on the ordinary fp32 units
// Source    –
// Layout    LAYOUTS.md#int8-row, #int4-row
// Requires  sm80+; rows of x 16-byte and rows of w 4-byte aligned, whole words of w
// Mapping   a warp owns one weight row; a lane takes every 32nd 4-byte word of it; x comes from L1
// Bound     fp32 arithmetic above M ≈ 2, memory below
// Verified  tests/test_int8_matmul.py, tests/test_int4_matmul.py (fp32)
#pragma once

#include "common/cuda.cuh"
#include "cuda/matmul_tile.cuh"

namespace fastinfer {

struct Int8Words {  // four weights a word
  static constexpr int kCount = 4;
  static __device__ void unpack(const TileArgs&, int64_t, int, uint32_t word, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
  }
  static __device__ float row_scale(const TileArgs& args, int64_t row) {
    return static_cast<const float*>(args.w_scale)[row];
  }
};

struct Int4Words {  // eight weights a word, all of one group
  static constexpr int kCount = 8;
  static __device__ void unpack(const TileArgs& args, int64_t row, int column, uint32_t word, float (&out)[8]) {
    const int64_t group = row * args.groups + (column >> args.group_shift);
    const float scale = load_float(args.w_scale, args.scale_type, group);
    const float zero = load_float(args.w_zero, args.scale_type, group);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = (static_cast<float>(word >> (4 * i) & 15) - zero) * scale;
  }
  static __device__ float row_scale(const TileArgs&, int64_t) { return 1.f; }
};

constexpr int kGemvWarps = 4;

template <class Words, int kTokens>
__global__ void __launch_bounds__(32 * kGemvWarps) gemv_fp32_kernel(const __grid_constant__ TileArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kGemvWarps + threadIdx.x / 32;
  if (row >= args.n) return;
  const auto* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(args.w) + row * args.w_stride);
  float sums[kTokens] = {};
#pragma unroll 2
  for (int i = lane; i < args.k / Words::kCount; i += 32) {
    float w[Words::kCount];
    Words::unpack(args, row, i * Words::kCount, __ldg(words + i), w);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {  // tokens past the end repeat the last one and are not stored
      const char* x_row = static_cast<const char*>(args.x) + min(m, args.m - 1) * args.x_stride;
#pragma unroll
      for (int j = 0; j < Words::kCount; j += 4) {
        const float4 x = __ldg(reinterpret_cast<const float4*>(x_row) + (i * Words::kCount + j) / 4);
        sums[m] = fmaf(x.x, w[j], fmaf(x.y, w[j + 1], fmaf(x.z, w[j + 2], fmaf(x.w, w[j + 3], sums[m]))));
      }
    }
  }
  const float scale = Words::row_scale(args, row);
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], offset);
    if (lane != 0 || m >= args.m) continue;
    static_cast<float*>(args.y)[int64_t(m) * args.n + row] = with_bias(args, sums[m] * scale, row);
  }
}

template <class Words>
void launch_gemv_fp32(const char* op, const TileArgs& args, const LaunchContext& context) {
  const auto kernel = args.m == 1   ? gemv_fp32_kernel<Words, 1>
                      : args.m == 2 ? gemv_fp32_kernel<Words, 2>
                      : args.m <= 4 ? gemv_fp32_kernel<Words, 4>
                                    : gemv_fp32_kernel<Words, 8>;
  kernel<<<(args.n + kGemvWarps - 1) / kGemvWarps, 32 * kGemvWarps, 0, context.stream()>>>(args);
  check_launch(op);
}

}  // namespace fastinfer
