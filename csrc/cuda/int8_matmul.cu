// int8_matmul: y = act(x[M,K] · (w[N,K] · w_scale[N])ᵀ + bias[N]) + residual, int8 weights, fp32 accumulation
// Source    own; the kernel is matmul_tile.cuh, its int8-to-half conversion is named in common/mma.cuh
// Layout    LAYOUTS.md#int8-row, #tile-w8a16
// Requires  sm80+; rows whose length is no multiple of 16 are copied into aligned memory first
// Mapping   tile layout: tile_matmul.cuh. Row layout, few rows: matmul_tile (fp32 x up to 8: gemv_fp32); else dequantise + torch's linear;
//           activation and residual after either of them by apply_epilogue
// Bound     memory below M ≈ 100: N·K bytes
// Verified  tests/test_int8_matmul.py

#include "common/matmul_checks.h"
#include "cuda/apply_epilogue.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/gemv_fp32.cuh"
#include "cuda/matmul_tile.cuh"
#include "cuda/tile_matmul.cuh"

namespace fastinfer {

constexpr int64_t kInt8DenseRows = 192;  // from here on dequantising and cuBLAS win, measured on an H200

// w [N, K] in the layout tile_w8a16.
static Tensor int8_matmul_tiles(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                                const EpilogueArguments& arguments, Gate gate, const MatmulShape& shape,
                                const std::string& layout, const LaunchContext& context) {
  check_tile_layout(op, shape, layout, context);
  FASTINFER_CHECK(op, is_aligned16(w), "w must start on a 16-byte boundary in layout \"", layout, "\"");
  if (x.scalar_type() == ScalarType::Float) {
    const LaterEpilogue epilogue{op, arguments.residual, gate, arguments.y_type};
    return epilogue.apply(dense_linear(x, dequantize_int8_tiles(op, w, w_scale, x, context), arguments.bias), context);
  }
  const Tensor y = empty_output(x, out_features(gate, shape.n)), rows_x = aligned_rows(as_matrix(x, shape), 1);
  TileProblem p{op, TileKind::kW8A16, rows_x, w.const_data_ptr()};
  p.epilogue = make_epilogue(y, shape, arguments, gate);
  p.epilogue.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
  p.m = static_cast<int>(shape.m), p.n = static_cast<int>(shape.n), p.k = static_cast<int>(shape.k);
  if (x.scalar_type() == ScalarType::Half) {
    run_tile_matmul<Int8Decode<__half>, Int8Wgmma<__half>, __half>(p, context);
  } else {
    run_tile_matmul<Int8Decode<__nv_bfloat16>, Int8Wgmma<__nv_bfloat16>, __nv_bfloat16>(p, context);
  }
  return y;
}

Tensor int8_matmul_cuda(const Tensor& x, const Tensor& w, const Tensor& w_scale, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, std::string activation, std::string layout) {
  constexpr const char* op = "int8_matmul";
  check_x(op, x);
  const MatmulShape shape = check_int8_matmul(op, x, w, w_scale);
  const EpilogueArguments arguments{bias, residual, activation, x.scalar_type()};
  const Gate gate = check_epilogue(op, arguments, x, shape.n);
  check_cuda_layout(op, layout, "tile_w8a16");
  const LaunchContext context(op, x);
  const bool fp32 = x.scalar_type() == ScalarType::Float;
  if (shape.m == 0 || shape.n == 0) return empty_output(x, out_features(gate, shape.n));
  if (layout != "row") return int8_matmul_tiles(op, x, w, w_scale, arguments, gate, shape, layout, context);
  const LaterEpilogue epilogue{op, residual, gate, x.scalar_type()};
  if (shape.m >= kInt8DenseRows || (fp32 && shape.m > 8)) {
    return epilogue.apply(dense_linear(x, dequantize_int8(op, w, w_scale, x, context), bias), context);
  }

  const Tensor v = empty_output(x, shape.n, epilogue.v_type());
  const Tensor rows_x = aligned_rows(as_matrix(x, shape), 16), rows_w = aligned_rows(w, 16);
  const TileArgs args = matmul_args(op, rows_x, rows_w, w_scale, bias, v, shape);
  if (fp32) {
    launch_gemv_fp32<Int8Words>(op, args, context);
  } else if (x.scalar_type() == ScalarType::Half) {
    launch_matmul<Int8Half<__half>>(op, args, context);
  } else {
    launch_matmul<Int8Half<__nv_bfloat16>>(op, args, context);
  }
  return epilogue.apply(v, context);
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("int8_matmul", TORCH_BOX(&fastinfer::int8_matmul_cuda)); }
