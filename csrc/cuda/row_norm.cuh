// What kernels that give each row of x a block share: the RMS of a row, the weight of a norm, the launch.
#pragma once

#include "common/cuda.cuh"
#include "cuda/dependent_launch.cuh"

namespace fastinfer {

// Pack `pack` of a norm's weight of `type`, which is fp32, fp16 or bf16.
template <int kCount>
__device__ __forceinline__ void load_norm_weight(const void* weight, Element type, int pack, float (&out)[kCount]) {
  if (type == Element::kFloat) {
    const auto w = static_cast<const Pack<float, kCount>*>(weight)[pack];
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = w.v[i];
    return;
  }
  const auto w = static_cast<const Pack<uint16_t, kCount>*>(weight)[pack];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    out[i] = type == Element::kHalf ? __half2float(__ushort_as_half(w.v[i]))
                                    : __bfloat162float(__ushort_as_bfloat16(w.v[i]));
  }
}

// In fp64, so that no order of the sum shows in the fp32 mean.
template <typename T, int kCount>
__device__ __forceinline__ void add_squares(const Pack<T, kCount>& values, double& sum) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const double v = to_float(values.v[j]);
    sum = fma(v, v, sum);
  }
}

// Once a kernel; all threads of the block call it.
template <int kWarps>
__device__ __forceinline__ double block_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  if constexpr (kWarps == 1) return v;
  __shared__ double warp_sums[kWarps];
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += warp_sums[i];
  return sum;
}

// 1 / sqrt(mean + eps) of K squares.
__device__ __forceinline__ float rms_factor(double sum_of_squares, int64_t k, float eps) {
  const float mean = __fdiv_rn(static_cast<float>(sum_of_squares), static_cast<float>(k));
  return __frcp_rn(__fsqrt_rn(__fadd_rn(mean, eps)));
}

// A block a row; may start early inside of dependent_launch.
template <typename Args>
void launch_rows(const char* op, void (*kernel)(Args), int64_t rows, int threads, const Args& args,
                 const LaunchContext& context) {
  if (context.limits().capability == 90) {
    launch_clusters(op, kernel, rows, threads, 1, 0, take_dependent_launch(), args, context);
  } else {
    kernel<<<static_cast<unsigned>(rows), threads, 0, context.stream()>>>(args);
    check_launch(op);
  }
}

}  // namespace fastinfer
