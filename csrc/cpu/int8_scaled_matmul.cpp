// int8_scaled_matmul: y = act((q[M,K] · w[N,K]ᵀ) · x_scale · w_scale + bias) + residual, q = x in int8 per row
// Source    per-token activations as in Yao et al., ZeroQuant, arXiv 2206.01861, §3.1; symmetric
// Layout    LAYOUTS.md#int8-row, #panel16 (faster: read in place)
// Requires  AVX2, FMA, F16C; AVX512-VNNI where there is one; K ≤ 131,072, so that int32 sums cannot overflow
// Mapping   panel_matmul.h; x quantised once a call, in parallel over rows; threads over (192 rows × panel)
// Bound     memory for small M: N·K bytes; above, vpmaddwd (32 multiply-adds a cycle) or vpdpbusd (128)
// Verified  tests/test_int8_scaled_matmul.py

#define FASTINFER_KERNEL "cpu/int8_scaled_matmul_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

constexpr int64_t kMaxColumns = 131072;

Tensor int8_scaled_matmul_cpu(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                              const std::string& activation, const std::string& layout,
                              const std::optional<Tensor>& x_scale, std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "int8_scaled_matmul";
  const ScalarType y_type = check_scaled_activations(kOp, x, x_scale, out_dtype);
  const MatmulShape shape = check_int8_matmul(kOp, x, w, w_scale);
  FASTINFER_CHECK(kOp, shape.k <= kMaxColumns, "w must have at most ", kMaxColumns, " columns, got ", shape_text(w));
  Matmul matmul(kOp, shape, x, w, {bias, residual, activation, y_type}, layout);
  if (x_scale) matmul.job.quantised_scale = static_cast<const float*>(x_scale->const_data_ptr());
  matmul.job.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
  run(cpu_isa() == Isa::kAvx512Vnni ? avx512::kInt8ScaledMatmul : avx2::kInt8ScaledMatmul, matmul.job);
  return matmul.y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) {
  m.impl("int8_scaled_matmul", TORCH_BOX(&fastinfer::int8_scaled_matmul_cpu));
}
