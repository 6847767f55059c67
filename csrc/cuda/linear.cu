// linear: y[M,N] = act(x[M,K] · w[N,K]ᵀ + bias[N]) + residual, x and w of one float dtype
// Source    –
// Layout    plain rows; where gated those of the gate, then those of what it is multiplied with
// Requires  sm80+
// Mapping   up to 16 rows of 16-bit elements on 9.0: decode_matmul.cuh; else torch's linear (cuBLAS), then apply_epilogue where
//           there is something for it
// Bound     memory below M ≈ 300: 2·N·K bytes
// Numerics  decode_matmul: fp32 to the end, cast once. The result of torch's linear is of the dtype of x; what follows is
//           fp32, cast once
// Verified  tests/test_linear.py

#include "common/torch_linear.h"
#include "cuda/apply_epilogue.cuh"
#include "cuda/tile_matmul.cuh"

namespace fastinfer {

// Few rows on compute capability 9.0: makes y and returns true, or leaves the matmul to torch.
static bool try_decode_linear(const char* op, const Tensor& x, const Tensor& w, const EpilogueArguments& arguments,
                              Gate gate, const MatmulShape& shape, const LaunchContext& context, Tensor& y) {
  const bool fits =
      shape.m <= kDecodeTokens && shape.k % 32 == 0 && x.scalar_type() != ScalarType::Float && is_aligned16(w);
  const Tensor rows_x = fits ? aligned_rows(as_matrix(x, shape), 1) : x;
  TileProblem p{op, TileKind::kLinear, rows_x, w.const_data_ptr()};
  p.m = static_cast<int>(shape.m), p.n = static_cast<int>(shape.n), p.k = static_cast<int>(shape.k);
  const TilePlan plan = find_tile_plan(p.kind, 0, p.m, p.n, p.k, context.limits());
  if (!fits) {
    check_not_forced(p, plan);
    return false;
  }
  y = empty_output(x, out_features(gate, shape.n));
  p.epilogue = make_epilogue(y, shape, arguments, gate);
  const bool dependent = take_dependent_launch();
  const auto run = [&](const TilePlan& asked) {
    return x.scalar_type() == ScalarType::Half ? run_decode<RowsDecode<__half>>(p, asked, dependent, context)
                                               : run_decode<RowsDecode<__nv_bfloat16>>(p, asked, dependent, context);
  };
  if (run(plan)) return true;
  check_not_forced(p, plan);
  return run({});
}

Tensor linear_cuda(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, std::string activation) {
  constexpr const char* op = "linear";
  const MatmulShape shape = check_linear(op, x, w);
  const EpilogueArguments arguments{bias, residual, activation, x.scalar_type(), true};
  const Gate gate = check_epilogue(op, arguments, x, shape.n);
  const LaunchContext context(op, x);
  if (context.limits().capability == 90 && shape.m > 0 && shape.n > 0 && shape.k > 0) {
    Tensor y;
    if (try_decode_linear(op, x, w, arguments, gate, shape, context, y)) return y;
  }

  const bool torch_adds_bias = bias.has_value() && bias->scalar_type() == x.scalar_type();
  const std::optional<Tensor> own_bias = torch_adds_bias ? std::nullopt : bias;
  const Tensor v = torch_linear(x, w, torch_adds_bias ? bias : std::nullopt);
  if (gate == Gate::kNone && !own_bias.has_value() && !residual.has_value()) return v;
  return apply_epilogue(op, v, {own_bias, residual, activation, x.scalar_type(), true}, gate, context);
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("linear", TORCH_BOX(&fastinfer::linear_cuda)); }
