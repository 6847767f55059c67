// int8_scaled_matmul: y[M,N] = act(q(x)[M,K] · w[N,K]ᵀ · x_scale[M] · w_scale[N] + bias[N]) + residual, exact int32 sums
// Source    per-token activation scales as in Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 2.1, without outliers
// Layout    LAYOUTS.md#int8-row, #tile-w8a8
// Requires  sm80+, K ≤ 131072 (int32 sums); rows whose length is no multiple of 16 are copied into aligned memory first
// Mapping   int8_quantize; then, tile layout: tile_matmul.cuh; row layout, few rows: matmul_tile; many rows: cuBLAS's
//           int8 matmul and a kernel for the scales; activation and residual after either of them by apply_epilogue
// Bound     memory below M ≈ 200: N·K bytes
// Verified  tests/test_int8_scaled_matmul.py

#include "common/matmul_checks.h"
#include "cuda/apply_epilogue.cuh"
#include "cuda/int8_quantize.cuh"
#include "cuda/matmul_tile.cuh"
#include "cuda/tile_matmul.cuh"

namespace fastinfer {

// y = sums · x_scale · w_scale + bias, sums [M, N] int32; a thread takes four columns of every gridDim.y-th row
template <typename T>
__global__ void scale_sums_kernel(const int32_t* sums, const __grid_constant__ TileArgs args) {
  constexpr int kCount = 4;
  const int n = (blockIdx.x * blockDim.x + threadIdx.x) * kCount;
  if (n >= args.n) return;
  const auto w_scale = *reinterpret_cast<const Pack<float, kCount>*>(static_cast<const float*>(args.w_scale) + n);
#pragma unroll 4
  for (int m = blockIdx.y; m < args.m; m += gridDim.y) {
    const int64_t i = int64_t(m) * args.n + n;
    const auto values = *reinterpret_cast<const Pack<int32_t, kCount>*>(sums + i);
    Pack<T, kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      out.v[j] = from_float<T>(with_bias(args, scaled_sum(values.v[j], args.x_scale[m], w_scale.v[j]), n + j));
    }
    *reinterpret_cast<Pack<T, kCount>*>(static_cast<T*>(args.y) + i) = out;
  }
}

// cuBLAS's int8 matmul and a second kernel for the scales; N in multiples of 8.
void launch_dense_int8(const char* op, const TileArgs& args, const Tensor& q, const Tensor& w, ScalarType y_type,
                       const LaunchContext& context) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(q),
                                    torch::stable::detail::from(torch::stable::transpose(w, 0, 1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_int_mm", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor sums = torch::stable::detail::to<Tensor>(stack[0]);
  constexpr int kThreads = 128, kRowsPerThread = 8;
  const dim3 grid((args.n / 4 + kThreads - 1) / kThreads,
                  std::clamp((args.m + kRowsPerThread - 1) / kRowsPerThread, 1, 65535));
  dispatch_float(y_type, [&](auto zero) {
    scale_sums_kernel<decltype(zero)>
        <<<grid, kThreads, 0, context.stream()>>>(static_cast<const int32_t*>(sums.const_data_ptr()), args);
  });
  check_launch(op);
}

struct Activations {
  Tensor q;        // [M, padded K] int8, 16-byte aligned
  Tensor x_scale;  // [M]
};

static Activations int8_activations(const char* op, const Tensor& x, const std::optional<Tensor>& x_scale,
                                    const MatmulShape& shape, int64_t padded_k, const LaunchContext& context) {
  const Tensor rows = as_matrix(x, shape);
  if (x_scale.has_value()) return {aligned_rows(rows, 16), *x_scale};
  Activations out{torch::stable::new_empty(x, {shape.m, padded_k}, ScalarType::Char),
                  torch::stable::new_empty(x, {shape.m}, ScalarType::Float)};
  launch_int8_quantize(op, torch::stable::contiguous(rows), std::nullopt, 0.0, out.q, out.x_scale, context);
  return out;
}

Tensor int8_scaled_matmul_cuda(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                               std::string activation, std::string layout, const std::optional<Tensor>& x_scale,
                               std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "int8_scaled_matmul";
  const ScalarType y_type = check_scaled_activations(op, x, x_scale, out_dtype);
  const MatmulShape shape = check_int8_matmul(op, x, w, w_scale);
  const EpilogueArguments arguments{bias, residual, activation, y_type};
  const Gate gate = check_epilogue(op, arguments, x, shape.n);
  check_cuda_layout(op, layout, "tile_w8a8");
  FASTINFER_CHECK(op, shape.k <= 131072, "K must be at most 131072 for exact int32 sums, got ", shape.k);
  const LaunchContext context(op, x);
  const bool tiles = layout != "row";
  if (tiles) {
    check_tile_layout(op, shape, layout, context);
    FASTINFER_CHECK(op, is_aligned16(w), "w must start on a 16-byte boundary in layout \"", layout, "\"");
  }
  if (shape.m == 0 || shape.n == 0) return empty_output(x, out_features(gate, shape.n), y_type);

  const Tensor rows_w = tiles ? w : aligned_rows(w, 16);
  const Activations activations = int8_activations(op, x, x_scale, shape, rows_w.size(1), context);
  const auto* scale = static_cast<const float*>(activations.x_scale.const_data_ptr());
  if (tiles) {
    const Tensor y = empty_output(x, out_features(gate, shape.n), y_type);
    TileProblem p{op, TileKind::kW8A8, activations.q, w.const_data_ptr()};
    p.epilogue = make_epilogue(y, shape, arguments, gate);
    p.epilogue.x_scale = scale;
    p.epilogue.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
    p.m = static_cast<int>(shape.m), p.n = static_cast<int>(shape.n), p.k = static_cast<int>(shape.k);
    dispatch_float(y_type, [&](auto zero) { run_tile_matmul<Int8x8Decode, Int8x8Wgmma, decltype(zero)>(p, context); });
    return y;
  }

  const LaterEpilogue epilogue{op, residual, gate, y_type};
  const Tensor v = empty_output(x, shape.n, epilogue.v_type());
  TileArgs args = matmul_args(op, activations.q, rows_w, w_scale, bias, v, shape);
  args.x_scale = scale;
  // cuBLAS wins from here on, measured on an H200; it takes N in multiples of 8.
  const bool many = shape.m > (is_narrow(args, context) ? 64 : 32);
  if (many && shape.n % 8 == 0 && shape.k > 0 && is_aligned16(w_scale)) {
    launch_dense_int8(op, args, activations.q, rows_w, v.scalar_type(), context);
  } else {
    launch_matmul<Int8Int8>(op, args, context);
  }
  return epilogue.apply(v, context);
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) {
  m.impl("int8_scaled_matmul", TORCH_BOX(&fastinfer::int8_scaled_matmul_cuda));
}
