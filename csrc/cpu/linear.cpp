// linear: y = act(x[M,K] · w[N,K]ᵀ + bias) + residual, x and w of one float dtype
// Source    –
// Layout    plain rows; where gated those of the gate, then those of what it is multiplied with
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   torch's linear, then one pass over its result, in parallel over rows
// Bound     torch's linear
// Numerics  the result of torch's linear is of the dtype of x; what follows is fp32, cast once
// Verified  tests/test_linear.py

#define FASTINFER_KERNEL "cpu/linear_kernel.h"
#include "cpu/each_isa.h"

#include "common/torch_linear.h"

namespace fastinfer {

Tensor linear_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::string& activation) {
  constexpr const char* kOp = "linear";
  const MatmulShape shape = check_linear(kOp, x, w);
  check_isa(kOp);
  const bool torch_adds_bias = bias.has_value() && bias->scalar_type() == x.scalar_type();
  const Gate gate = check_epilogue(kOp, {bias, residual, activation, x.scalar_type()}, x, shape.n);
  const Tensor v = torch_linear(x, w, torch_adds_bias ? bias : std::nullopt);
  const std::optional<Tensor> own_bias = torch_adds_bias ? std::nullopt : bias;
  if (gate == Gate::kNone && !own_bias && !residual) return v;

  Tensor y;
  const Output out = make_output(kOp, {own_bias, residual, activation, x.scalar_type()}, x, shape.n, y);
  const auto apply = cpu_isa() == Isa::kAvx512Vnni ? avx512::apply_epilogue : avx2::apply_epilogue;
  const Tensor rows = torch::stable::contiguous(v);
  const char* data = static_cast<const char*>(rows.const_data_ptr());
  parallel(shape.m, 16 * shape.n, [&](int64_t begin, int64_t end) { apply(out, data, begin, end); });
  return y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("linear", TORCH_BOX(&fastinfer::linear_cpu)); }
