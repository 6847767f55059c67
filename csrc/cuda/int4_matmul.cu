// int4_matmul: y = act(x[M,K] · ((w[N,K] − w_zero[N,K/G]) · w_scale[N,K/G])ᵀ + bias[N]) + residual, fp32 accumulation
// Source    own; the kernel is matmul_tile.cuh, its 4-bit-to-half conversion is named in common/mma.cuh
// Layout    LAYOUTS.md#int4-row, #tile-w4a16
// Requires  sm80+; G = 32, 64 or 128
// Mapping   tile layout: tile_matmul.cuh. Row layout, few rows: matmul_tile (above 16 after prepare_x, fp32 x up to 8: gemv_fp32); else dequantise + torch's
//           linear; activation and residual after any of them by apply_epilogue
// Bound     memory below M ≈ 50: N·K/2 bytes of weights + 2·N·K/G elements of scales and zero points
// Numerics  a group contributes w_scale · (Σ q·x − w_zero · Σ x), products exact, sums fp32; an infinite x gives NaN
// Verified  tests/test_int4_matmul.py

#include "common/matmul_checks.h"
#include "cuda/apply_epilogue.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/gemv_fp32.cuh"
#include "cuda/int4_tile.cuh"
#include "cuda/matmul_tile.cuh"

namespace fastinfer {

constexpr int64_t kInt4DenseRows = 128;  // from here on dequantising and cuBLAS win, measured on an H200

// x [M, K] in the order of the weights' nibbles (pair_with_fourth_next), and its sums over each `fold` columns:
// x_sums[K / fold, sums_stride]. A thread takes eight columns of a row, fold / 8 neighbouring threads make a sum.
template <typename T>
__global__ void prepare_x_kernel(const uint4* x, uint4* out, float* x_sums, int m, int pieces, int fold,
                                 int sums_stride) {
  const int piece = blockIdx.x * blockDim.x + threadIdx.x;
  for (int row = blockIdx.y; row < m; row += gridDim.y) {
    const bool inside = piece < pieces;
    const uint4 v = inside ? x[int64_t(row) * pieces + piece] : uint4{};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += to_float(reinterpret_cast<const T*>(&v)[i]);
    for (int offset = 1; offset < fold / 8; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (inside) out[int64_t(row) * pieces + piece] = pair_with_fourth_next(v);
    if (inside && piece % (fold / 8) == 0) x_sums[int64_t(piece / (fold / 8)) * sums_stride + row] = sum;
  }
}

template <typename T, typename S, int kFoldBlocks>
void launch_prepared(const char* op, TileArgs args, const Tensor& x, const LaunchContext& context) {
  constexpr int kThreads = 128, kFold = 32 * kFoldBlocks;
  args.sums_stride = (args.m + 63) / 64 * 64;  // whole token tiles: columns past M are read, never used
  const Tensor prepared = torch::stable::new_empty(x, {args.m, args.k});
  const Tensor x_sums = torch::stable::new_empty(x, {args.k / kFold, args.sums_stride}, ScalarType::Float);
  const int pieces = args.k / 8;
  const dim3 grid((pieces + kThreads - 1) / kThreads, std::min(args.m, 65535));
  prepare_x_kernel<T><<<grid, kThreads, 0, context.stream()>>>(
      static_cast<const uint4*>(args.x), static_cast<uint4*>(prepared.mutable_data_ptr()),
      static_cast<float*>(x_sums.mutable_data_ptr()), args.m, pieces, kFold, args.sums_stride);
  check_launch(op);
  args.x = prepared.const_data_ptr();
  args.x_sums = static_cast<const float*>(x_sums.const_data_ptr());
  launch_many_tokens<Int4Half<T, S, kFoldBlocks, true>>(op, args, context);
}

// A whole chunk is one group when G = 128: one fold a chunk. Smaller groups fold by 32.
template <typename T, typename S>
void launch_int4(const char* op, const TileArgs& args, const Tensor& x, const LaunchContext& context) {
  const bool whole_chunk = args.group_shift == 7;
  if (args.m > 16) {
    whole_chunk ? launch_prepared<T, S, 4>(op, args, x, context) : launch_prepared<T, S, 1>(op, args, x, context);
  } else if (whole_chunk) {
    launch_few_tokens<Int4Half<T, S, 4, false>>(op, args, context);
  } else {
    launch_few_tokens<Int4Half<T, S, 1, false>>(op, args, context);
  }
}

// w [N, K/2] and its scales in the layout tile_w4a16.
static Tensor int4_matmul_tiles(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                                const Tensor& w_zero, const EpilogueArguments& arguments, Gate gate,
                                const MatmulShape& shape, const std::string& layout, const LaunchContext& context) {
  check_tile_layout(op, shape, layout, context);
  FASTINFER_CHECK(op, w_scale.scalar_type() != ScalarType::Float, "w_scale must be float16 or bfloat16 in layout \"",
                  layout, "\"");
  FASTINFER_CHECK(op, is_aligned16(w) && is_aligned16(w_scale) && is_aligned16(w_zero),
                  "w, w_scale and w_zero must start on 16-byte boundaries in layout \"", layout, "\"");
  if (x.scalar_type() == ScalarType::Float) {
    const LaterEpilogue epilogue{op, arguments.residual, gate, arguments.y_type};
    const Tensor weight = dequantize_int4_tiles(op, w, w_scale, w_zero, x, context);
    return epilogue.apply(dense_linear(x, weight, arguments.bias), context);
  }
  const Tensor y = empty_output(x, out_features(gate, shape.n)), rows_x = aligned_rows(as_matrix(x, shape), 1);
  TileProblem p{op, TileKind::kW4A16, rows_x, w.const_data_ptr(), w_scale.const_data_ptr(), w_zero.const_data_ptr()};
  p.scale_type = element_of(w_scale.scalar_type());
  p.groups = static_cast<int>(w_scale.size(1));
  p.epilogue = make_epilogue(y, shape, arguments, gate);
  p.m = static_cast<int>(shape.m), p.n = static_cast<int>(shape.n), p.k = static_cast<int>(shape.k);
  x.scalar_type() == ScalarType::Half ? int4_tile_matmul_half(p, context) : int4_tile_matmul_bf16(p, context);
  return y;
}

Tensor int4_matmul_cuda(const Tensor& x, const Tensor& w, const Tensor& w_scale, const Tensor& w_zero,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                        std::string activation, std::string layout) {
  constexpr const char* op = "int4_matmul";
  const MatmulShape shape = check_int4_matmul(op, x, w, w_scale, w_zero);
  const EpilogueArguments arguments{bias, residual, activation, x.scalar_type()};
  const Gate gate = check_epilogue(op, arguments, x, shape.n);
  check_cuda_layout(op, layout, "tile_w4a16");
  const LaunchContext context(op, x);
  const bool fp32 = x.scalar_type() == ScalarType::Float;
  if (shape.m == 0 || shape.n == 0) return empty_output(x, out_features(gate, shape.n));
  if (layout != "row") return int4_matmul_tiles(op, x, w, w_scale, w_zero, arguments, gate, shape, layout, context);
  const LaterEpilogue epilogue{op, residual, gate, x.scalar_type()};
  if (shape.m >= kInt4DenseRows || (fp32 && shape.m > 8)) {
    return epilogue.apply(dense_linear(x, dequantize_int4(op, w, w_scale, w_zero, x, context), bias), context);
  }

  const Tensor v = empty_output(x, shape.n, epilogue.v_type());
  const Tensor rows_x = aligned_rows(as_matrix(x, shape), 1), rows_w = aligned_rows(w, 1);
  TileArgs args = matmul_args(op, rows_x, rows_w, w_scale, bias, v, shape);
  args.k = static_cast<int>(shape.k);
  args.w_zero = w_zero.const_data_ptr();
  args.scale_type = element_of(w_scale.scalar_type());
  args.groups = static_cast<int>(w_scale.size(1));
  args.group_shift = __builtin_ctzll(shape.k / w_scale.size(1));
  if (fp32) {
    launch_gemv_fp32<Int4Words>(op, args, context);
  } else {
    dispatch_float(w_scale.scalar_type(), [&](auto scale_zero) {
      using S = decltype(scale_zero);
      if (x.scalar_type() == ScalarType::Half) {
        launch_int4<__half, S>(op, args, x, context);
      } else {
        launch_int4<__nv_bfloat16, S>(op, args, x, context);
      }
    });
  }
  return epilogue.apply(v, context);
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("int4_matmul", TORCH_BOX(&fastinfer::int4_matmul_cuda)); }
