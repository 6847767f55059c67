// int4_matmul: y = act(x[M,K] · ((q[N,K] − w_zero) · w_scale)ᵀ + bias) + residual, groups of G columns, in fp32
// Source    group-wise weights as in Frantar et al., GPTQ, arXiv 2210.17323, §4
// Layout    LAYOUTS.md#int4-row, #panel16 (faster: read in place)
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   panel_matmul.h; threads over (192 rows × panel)
// Bound     memory for M ≤ 2: N·K/2 bytes and the scales; above, fp32 multiply-add throughput
// Verified  tests/test_int4_matmul.py

#define FASTINFER_KERNEL "cpu/int4_matmul_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

Tensor int4_matmul_cpu(const Tensor& x, const Tensor& w, const Tensor& w_scale, const Tensor& w_zero,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                       const std::string& activation, const std::string& layout) {
  constexpr const char* kOp = "int4_matmul";
  const MatmulShape shape = check_int4_matmul(kOp, x, w, w_scale, w_zero);
  Matmul matmul(kOp, shape, x, w, {bias, residual, activation, x.scalar_type()}, layout);
  matmul.job.group_scale = static_cast<const char*>(w_scale.const_data_ptr());
  matmul.job.group_zero = static_cast<const char*>(w_zero.const_data_ptr());
  matmul.job.group_dtype = dtype_of(w_scale);
  matmul.job.group_shift = __builtin_ctzll(matmul.job.k / w_scale.size(1));
  run(cpu_isa() == Isa::kAvx512Vnni ? avx512::kInt4Matmul : avx2::kInt4Matmul, matmul.job);
  return matmul.y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("int4_matmul", TORCH_BOX(&fastinfer::int4_matmul_cpu)); }
