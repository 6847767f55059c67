// int8_matmul: y = act(x[M,K] · (w[N,K] · w_scale)ᵀ + bias) + residual, x in fp32, bf16 or fp16, computed in fp32
// Source    weight-only int8 as in Dettmers et al., LLM.int8(), arXiv 2208.07339, §2; no outlier columns
// Layout    LAYOUTS.md#int8-row, #panel16 (faster: read in place)
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   panel_matmul.h; threads over (192 rows × panel)
// Bound     memory for M ≤ 4: N·K bytes; above, fp32 multiply-add throughput
// Verified  tests/test_int8_matmul.py

#define FASTINFER_KERNEL "cpu/int8_matmul_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

Tensor int8_matmul_cpu(const Tensor& x, const Tensor& w, const Tensor& w_scale, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const std::string& activation,
                       const std::string& layout) {
  constexpr const char* kOp = "int8_matmul";
  check_x(kOp, x);
  const EpilogueArguments epilogue{bias, residual, activation, x.scalar_type()};
  Matmul matmul(kOp, check_int8_matmul(kOp, x, w, w_scale), x, w, epilogue, layout);
  matmul.job.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
  run(cpu_isa() == Isa::kAvx512Vnni ? avx512::kInt8Matmul : avx2::kInt8Matmul, matmul.job);
  return matmul.y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("int8_matmul", TORCH_BOX(&fastinfer::int8_matmul_cpu)); }
