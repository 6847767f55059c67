// int8_quantize: q[M,K] = round(v / x_scale[M]), x_scale = max|v| / 127 of each row; v = x, or its RMS norm · norm_weight
// Source    per-token scales as in Yao et al., ZeroQuant, arXiv 2206.01861, §3.1; norm: Zhang and Sennrich, arXiv 1910.07467
// Layout    plain rows
// Requires  sm80+
// Mapping   a block of 512 threads a row; a thread takes every 512th pack of 8 columns (1 where rows are not 16-byte
//           aligned) and keeps up to 4 of them in registers, so that K ≤ 16384 is read once; longer rows are read again
// Bound     latency for few rows (two or three block-wide reductions); memory for many
// Numerics  squares are summed in fp64, so that no order of the sum shows in the fp32 mean; the norm is rounded to the
//           dtype of x before and after norm_weight. csrc/cpu/int8_quantize_kernel.h rounds alike, bit for bit
// Verified  tests/test_int8_quantize.py, tests/test_int8_scaled_matmul.py

#include "cuda/int8_quantize.cuh"

#include "common/hopper.cuh"
#include "common/matmul_checks.h"
#include "cuda/row_norm.cuh"

namespace fastinfer {

constexpr int kQuantizeThreads = 512, kQuantizeWarps = kQuantizeThreads / 32;

struct QuantizeArgs {
  const void* x = nullptr;            // [M, K]
  const void* norm_weight = nullptr;  // [K] of norm_type, or null
  Element norm_type{};
  float eps = 0.f;
  int8_t* q = nullptr;       // [M, padded_k], zero from column K on
  float* x_scale = nullptr;  // [M]; NaN for a row of v with NaN or infinity
  int64_t k = 0, padded_k = 0;
};

// The largest of the threads' values; `all` becomes whether it was true in each of them.
__device__ __forceinline__ float block_max(float v, bool& all) {
  __shared__ float warp_largest[kQuantizeWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, offset));
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = v;
  all = __syncthreads_and(all);
#pragma unroll
  for (int i = 0; i < kQuantizeWarps; ++i) v = fmaxf(v, warp_largest[i]);
  return v;
}

// kKept packs stay in a thread's registers and are all of its row; with 0 each pass reads the row again.
template <typename T, int kCount, int kKept>
__global__ void __launch_bounds__(kQuantizeThreads) int8_quantize_kernel(const __grid_constant__ QuantizeArgs args) {
  constexpr int kPacks = kKept > 0 ? kKept : 1;
  const auto* x_row = static_cast<const Pack<T, kCount>*>(args.x) + blockIdx.x * (args.k / kCount);
  const int packs = static_cast<int>(args.k / kCount), padded_packs = static_cast<int>(args.padded_k / kCount);
  const bool norm = args.norm_weight != nullptr;
  Pack<T, kCount> kept[kPacks] = {};
  float weight[kPacks][kCount];
  if (kKept > 0 && norm) {  // weights do not depend on the kernel before
#pragma unroll
    for (int p = 0; p < kKept; ++p) {
      const int i = threadIdx.x + p * kQuantizeThreads;
      if (i < packs) load_norm_weight(args.norm_weight, args.norm_type, i, weight[p]);
    }
  }
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  wait_for_previous_kernel();
#endif
#pragma unroll
  for (int p = 0; p < kKept; ++p) {
    const int i = threadIdx.x + p * kQuantizeThreads;
    if (i < packs) kept[p] = x_row[i];
  }

  float factor = 0.f;  // 1 / sqrt(mean(x²) + eps), once it is known
  const auto normalise = [&](Pack<T, kCount>& v, const float (&w)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float normed = to_float(from_float<T>(__fmul_rn(to_float(v.v[j]), factor)));
      v.v[j] = from_float<T>(__fmul_rn(normed, w[j]));
    }
  };
  // Calls f(i, v) for each pack i of this thread; `normed` says whether v is to be the norm where the row is read again.
  const auto each_pack = [&](bool normed, auto&& f) {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int p = 0; p < kKept; ++p) {
        const int i = threadIdx.x + p * kQuantizeThreads;
        if (i < padded_packs) f(i, kept[p]);
      }
    } else {
#pragma unroll 2
      for (int i = threadIdx.x; i < padded_packs; i += kQuantizeThreads) {
        Pack<T, kCount> v{};
        if (i < packs) {
          v = x_row[i];
          if (normed) {
            load_norm_weight(args.norm_weight, args.norm_type, i, weight[0]);
            normalise(v, weight[0]);
          }
        }
        f(i, v);
      }
    }
  };

  if (norm) {
    double sum = 0.0;
    each_pack(false, [&](int, const Pack<T, kCount>& v) { add_squares(v, sum); });
    factor = rms_factor(block_sum<kQuantizeWarps>(sum), args.k, args.eps);
#pragma unroll
    for (int p = 0; p < kKept; ++p) {
      if (threadIdx.x + p * kQuantizeThreads < packs) normalise(kept[p], weight[p]);
    }
  }

  float largest = 0.f;
  bool finite = true;
  each_pack(norm, [&](int, const Pack<T, kCount>& values) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float v = fabsf(to_float(values.v[j]));
      finite = finite && v <= 3.402823466e38f;  // false for NaN too
      largest = fmaxf(largest, v);
    }
  });
  largest = block_max(largest, finite);
  const float scale = __fdiv_rn(largest, 127.f);
  if (threadIdx.x == 0) args.x_scale[blockIdx.x] = finite ? scale : __int_as_float(0x7FC00000);
  const bool zero = !finite || scale == 0.f;
  auto* q_row = reinterpret_cast<Pack<int8_t, kCount>*>(args.q) + blockIdx.x * (args.padded_k / kCount);
  each_pack(norm, [&](int i, const Pack<T, kCount>& values) {
    Pack<int8_t, kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float v = zero ? 0.f : rintf(__fdiv_rn(to_float(values.v[j]), scale));
      out.v[j] = static_cast<int8_t>(fminf(fmaxf(v, -127.f), 127.f));
    }
    q_row[i] = out;
  });
}

template <typename T>
static auto choose_kernel(const QuantizeArgs& args, bool wide) {
  const int64_t kept = (args.padded_k / 8 + kQuantizeThreads - 1) / kQuantizeThreads;
  return !wide       ? int8_quantize_kernel<T, 1, 0>
         : kept <= 1 ? int8_quantize_kernel<T, 8, 1>
         : kept <= 2 ? int8_quantize_kernel<T, 8, 2>
         : kept <= 4 ? int8_quantize_kernel<T, 8, 4>
                     : int8_quantize_kernel<T, 8, 0>;
}

void launch_int8_quantize(const char* op, const Tensor& x, const std::optional<Tensor>& norm_weight, double eps,
                          const Tensor& q, const Tensor& x_scale, const LaunchContext& context) {
  QuantizeArgs args;
  args.x = x.const_data_ptr();
  args.norm_weight = data_or_null(norm_weight);
  args.norm_type = norm_weight.has_value() ? element_of(norm_weight->scalar_type()) : Element::kFloat;
  args.eps = static_cast<float>(eps);
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.x_scale = static_cast<float*>(x_scale.mutable_data_ptr());
  args.k = x.size(1), args.padded_k = q.size(1);
  const bool wide = args.k % 8 == 0 && args.padded_k % 8 == 0 && is_aligned16(x) &&
                    (!norm_weight.has_value() || is_aligned16(*norm_weight));
  dispatch_float(x.scalar_type(), [&](auto zero) {
    launch_rows(op, choose_kernel<decltype(zero)>(args, wide), x.size(0), kQuantizeThreads, args, context);
  });
}

std::tuple<Tensor, Tensor> int8_quantize_cuda(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps) {
  constexpr const char* op = "int8_quantize";
  check_int8_quantize(op, x, norm_weight);
  const LaunchContext context(op, x);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const std::vector<int64_t> rows(sizes.begin(), sizes.end() - 1);
  const Tensor q = torch::stable::new_empty(x, sizes, ScalarType::Char);
  const Tensor x_scale = torch::stable::new_empty(x, rows, ScalarType::Float);
  const MatmulShape shape{rows_of(x), 0, sizes.back()};
  if (shape.m == 0) return {q, x_scale};
  const Tensor x_rows = torch::stable::contiguous(as_matrix(x, shape));
  const Tensor q_rows = torch::stable::view(q, {shape.m, shape.k});
  launch_int8_quantize(op, x_rows, norm_weight, eps, q_rows, x_scale, context);
  return {q, x_scale};
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("int8_quantize", TORCH_BOX(&fastinfer::int8_quantize_cuda)); }
