// rms_norm: y[M,K] = s / sqrt(mean(s²) + eps) · (offset + weight[K]) for each row of s; s = x, or x + residual
// Source    Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, §4
// Layout    plain rows
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   threads over rows; a row's passes (add, squares, scale) find it in L1 or L2
// Bound     memory for large M
// Numerics  csrc/cuda/rms_norm.cu rounds alike, bit for bit
// Verified  tests/test_rms_norm.py

#include "cpu/matmul.h"

namespace fastinfer {

struct RmsNormJob {
  int64_t k;
  const char* x;         // [M, K]
  const char* residual;  // [M, K], or null
  Dtype dtype;           // of all but weight
  const char* weight;    // [K], or null
  Dtype weight_dtype;
  float eps, offset;
  char* sum;  // [M, K], or null beside no residual
  char* y;    // [M, K]
};

}  // namespace fastinfer

#define FASTINFER_KERNEL "cpu/rms_norm_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

// `sum` and `residual` are both there or both not.
static Tensor rms_norm_into(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                            const std::optional<Tensor>& residual, double offset, const std::optional<Tensor>& sum) {
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  std::optional<Tensor> residual_rows;
  RmsNormJob job{x.size(x.dim() - 1), static_cast<const char*>(rows.const_data_ptr()), nullptr, dtype_of(x)};
  if (residual) {
    residual_rows = torch::stable::contiguous(*residual);
    job.residual = static_cast<const char*>(residual_rows->const_data_ptr());
    job.sum = static_cast<char*>(sum->mutable_data_ptr());
  }
  if (weight) job.weight = static_cast<const char*>(weight->const_data_ptr()), job.weight_dtype = dtype_of(*weight);
  job.eps = static_cast<float>(eps), job.offset = static_cast<float>(offset);
  job.y = static_cast<char*>(y.mutable_data_ptr());
  const auto norm = cpu_isa() == Isa::kAvx512Vnni ? avx512::rms_norm_rows : avx2::rms_norm_rows;
  parallel(rows_of(x), 8 * job.k, [&](int64_t begin, int64_t end) { norm(job, begin, end); });
  return y;
}

Tensor rms_norm_cpu(const Tensor& x, const std::optional<Tensor>& weight, double eps, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_rms_norm(kOp, x, weight, std::nullopt);
  check_isa(kOp);
  return rms_norm_into(x, weight, eps, std::nullopt, offset, std::nullopt);
}

std::tuple<Tensor, Tensor> rms_norm_residual_cpu(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                                                 const Tensor& residual, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_rms_norm(kOp, x, weight, residual);
  check_isa(kOp);
  const Tensor sum = torch::stable::new_empty(x, x.sizes());
  return {rms_norm_into(x, weight, eps, residual, offset, sum), sum};
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&fastinfer::rms_norm_cpu));
  m.impl("rms_norm.residual", TORCH_BOX(&fastinfer::rms_norm_residual_cpu));
}
