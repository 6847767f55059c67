// int8_quantize: q[M,K] = round(v / x_scale[M]), x_scale = max|v| / 127 of each row; v = x, or its RMS norm · norm_weight
// Source    per-token scales as in Yao et al., ZeroQuant, arXiv 2206.01861, §3.1; norm: Zhang and Sennrich, arXiv 1910.07467
// Layout    plain rows
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   threads over rows; a row's passes (squares, norm, maximum, quantise) find it in L1 or L2
// Bound     memory for large M
// Numerics  csrc/cuda/int8_quantize.cu rounds alike, bit for bit
// Verified  tests/test_int8_quantize.py

#include "cpu/matmul.h"

namespace fastinfer {

struct QuantizeJob {
  int64_t k;
  const char* x;  // [M, K]
  Dtype x_dtype;
  const char* norm_weight;  // [K], or null
  Dtype norm_dtype;
  float eps;
  int8_t* q;       // [M, K]
  float* x_scale;  // [M]
};

}  // namespace fastinfer

#define FASTINFER_KERNEL "cpu/int8_quantize_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

std::tuple<Tensor, Tensor> int8_quantize_cpu(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps) {
  constexpr const char* kOp = "int8_quantize";
  check_int8_quantize(kOp, x, norm_weight);
  check_isa(kOp);
  const Tensor rows = torch::stable::contiguous(x);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor q = torch::stable::new_empty(x, {sizes.data(), sizes.size()}, ScalarType::Char);
  Tensor x_scale = torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, ScalarType::Float);
  QuantizeJob job{sizes.back(), static_cast<const char*>(rows.const_data_ptr()), dtype_of(x), nullptr, Dtype::kFloat};
  if (norm_weight) {
    job.norm_weight = static_cast<const char*>(norm_weight->const_data_ptr());
    job.norm_dtype = dtype_of(*norm_weight);
  }
  job.eps = static_cast<float>(eps);
  job.q = static_cast<int8_t*>(q.mutable_data_ptr());
  job.x_scale = static_cast<float*>(x_scale.mutable_data_ptr());
  const auto quantize = cpu_isa() == Isa::kAvx512Vnni ? avx512::quantize_rows : avx2::quantize_rows;
  parallel(rows_of(x), 8 * job.k, [&](int64_t begin, int64_t end) { quantize(job, begin, end); });
  return {q, x_scale};
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("int8_quantize", TORCH_BOX(&fastinfer::int8_quantize_cpu)); }
