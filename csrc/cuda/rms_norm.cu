// rms_norm: y[M,K] = s / sqrt(mean(s²) + eps) · (offset + weight[K]) for each row of s; s = x, or x + residual
// Source    Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, §4
// Layout    plain rows
// Requires  sm80+
// Mapping   a block a row, of 32 threads for K ≤ 256, 128 for K ≤ 1024, else 512; a thread takes every 512th pack of 8
//           columns (1 where rows are not 16-byte aligned) and keeps up to 4 of them in registers, so that K ≤ 16384 is
//           read once; longer rows go by batches of 4 packs, and s is read again
// Bound     latency for few rows (one load, one block-wide reduction); memory for many
// Numerics  s is rounded to the dtype of x; the rest is fp32, cast once, but squares, which are summed in fp64, so that no
//           order of the sum shows in the fp32 mean. csrc/cpu/rms_norm_kernel.h rounds alike, bit for bit
// Verified  tests/test_rms_norm.py

#include "common/hopper.cuh"
#include "common/matmul_checks.h"
#include "cuda/row_norm.cuh"

namespace fastinfer {

struct RmsNormArgs {
  const void* x = nullptr;         // [M, K]
  const void* residual = nullptr;  // [M, K], or null
  const void* weight = nullptr;    // [K] of weight_type, or null
  void* sum = nullptr;             // [M, K], or null beside no residual
  void* y = nullptr;               // [M, K]
  Element weight_type{};
  float eps = 0.f, offset = 0.f;
  int64_t k = 0;
};

// What columns are multiplied by: offset + weight, 1 where there is no weight.
template <int kCount>
__device__ __forceinline__ void load_scales(const RmsNormArgs& args, int pack, float (&out)[kCount]) {
  if (args.weight != nullptr) load_norm_weight(args.weight, args.weight_type, pack, out);
#pragma unroll
  for (int j = 0; j < kCount; ++j) out[j] = args.weight != nullptr ? __fadd_rn(args.offset, out[j]) : 1.f;
}

// A thread holds kPacks packs at a time. They are all of its row where kWhole; otherwise s is read again for y.
template <typename T, int kCount, int kThreads, int kPacks, bool kWhole>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ RmsNormArgs args) {
  using Values = Pack<T, kCount>;
  const int packs = static_cast<int>(args.k / kCount);
  const int64_t row = int64_t(blockIdx.x) * packs;
  const auto* gmem_x = static_cast<const Values*>(args.x) + row;
  const auto* gmem_residual = static_cast<const Values*>(args.residual) + row;
  auto* gmem_sum = static_cast<Values*>(args.sum) + row;
  auto* gmem_y = static_cast<Values*>(args.y) + row;
  const bool add = args.residual != nullptr;
  Values s[kPacks];
  float scales[kPacks][kCount];

  // Calls f(p, i) for the packs i that a thread holds at once, from its first on.
  const auto each_held = [&](int first, auto&& f) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = first + p * kThreads;
      if (i < packs) f(p, i);
    }
  };
  const auto each_batch = [&](auto&& f) {
    if constexpr (kWhole) {
      f(static_cast<int>(threadIdx.x));
    } else {
      for (int first = threadIdx.x; first < packs; first += kPacks * kThreads) f(first);
    }
  };

  if (kWhole) each_held(threadIdx.x, [&](int p, int i) { load_scales(args, i, scales[p]); });
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  wait_for_previous_kernel();  // weights do not depend on it
#endif

  double squares = 0.0;
  each_batch([&](int first) {
    each_held(first, [&](int p, int i) { s[p] = gmem_x[i]; });
    if (add) {
      Values residual[kPacks];  // all loads before the first store, which the compiler would not move them over
      each_held(first, [&](int p, int i) { residual[p] = gmem_residual[i]; });
      each_held(first, [&](int p, int i) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          s[p].v[j] = from_float<T>(__fadd_rn(to_float(s[p].v[j]), to_float(residual[p].v[j])));
        }
        gmem_sum[i] = s[p];
      });
    }
    each_held(first, [&](int p, int) { add_squares(s[p], squares); });
  });
  const float factor = rms_factor(block_sum<kThreads / 32>(squares), args.k, args.eps);

  each_batch([&](int first) {
    if constexpr (!kWhole) {
      const Values* gmem_s = add ? gmem_sum : gmem_x;  // each thread reads what it wrote itself
      each_held(first, [&](int p, int i) {
        s[p] = gmem_s[i];
        load_scales(args, i, scales[p]);
      });
    }
    each_held(first, [&](int p, int i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        s[p].v[j] = from_float<T>(__fmul_rn(__fmul_rn(to_float(s[p].v[j]), factor), scales[p][j]));
      }
      gmem_y[i] = s[p];
    });
  });
}

struct RmsNormKernel {
  void (*kernel)(RmsNormArgs);
  int threads;
};

template <typename T, int kCount, int kThreads, int kPacks, bool kWhole>
static RmsNormKernel kernel_of() {
  return {rms_norm_kernel<T, kCount, kThreads, kPacks, kWhole>, kThreads};
}

template <typename T>
static RmsNormKernel choose_kernel(int64_t k, bool wide) {
  if (!wide) return kernel_of<T, 1, 512, 4, false>();
  if (k <= 8 * 32) return kernel_of<T, 8, 32, 1, true>();
  if (k <= 8 * 128) return kernel_of<T, 8, 128, 1, true>();
  if (k <= 8 * 512) return kernel_of<T, 8, 512, 1, true>();
  if (k <= 8 * 1024) return kernel_of<T, 8, 512, 2, true>();
  return k <= 8 * 2048 ? kernel_of<T, 8, 512, 4, true>() : kernel_of<T, 8, 512, 4, false>();
}

// `sum` and `residual` are both there or both not.
static Tensor rms_norm_into(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                            const std::optional<Tensor>& residual, double offset, const std::optional<Tensor>& sum) {
  constexpr const char* op = "rms_norm";
  const LaunchContext context(op, x);
  const MatmulShape shape{rows_of(x), 0, x.size(x.dim() - 1)};
  const Tensor y = empty_output(x, shape.k);
  if (shape.m == 0 || shape.k == 0) return y;
  const Tensor x_rows = torch::stable::contiguous(as_matrix(x, shape));
  std::optional<Tensor> residual_rows;
  RmsNormArgs args;
  if (residual.has_value()) {
    residual_rows = torch::stable::contiguous(as_matrix(*residual, shape));
    args.residual = residual_rows->const_data_ptr();
    args.sum = sum->mutable_data_ptr();
  }
  args.x = x_rows.const_data_ptr();
  args.weight = data_or_null(weight);
  args.weight_type = weight.has_value() ? element_of(weight->scalar_type()) : Element::kFloat;
  args.y = y.mutable_data_ptr();
  args.eps = static_cast<float>(eps), args.offset = static_cast<float>(offset);
  args.k = shape.k;
  const auto aligned = [](const std::optional<Tensor>& t) { return !t.has_value() || is_aligned16(*t); };
  const bool wide = shape.k % 8 == 0 && aligned(x_rows) && aligned(residual_rows) && aligned(weight);
  dispatch_float(x.scalar_type(), [&](auto zero) {
    const RmsNormKernel chosen = choose_kernel<decltype(zero)>(shape.k, wide);
    launch_rows(op, chosen.kernel, shape.m, chosen.threads, args, context);
  });
  return y;
}

Tensor rms_norm_cuda(const Tensor& x, const std::optional<Tensor>& weight, double eps, double offset) {
  check_rms_norm("rms_norm", x, weight, std::nullopt);
  return rms_norm_into(x, weight, eps, std::nullopt, offset, std::nullopt);
}

std::tuple<Tensor, Tensor> rms_norm_residual_cuda(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                                                  const Tensor& residual, double offset) {
  check_rms_norm("rms_norm", x, weight, residual);
  const Tensor sum = empty_output(x, x.size(x.dim() - 1));
  return {rms_norm_into(x, weight, eps, residual, offset, sum), sum};
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&fastinfer::rms_norm_cuda));
  m.impl("rms_norm.residual", TORCH_BOX(&fastinfer::rms_norm_residual_cuda));
}
