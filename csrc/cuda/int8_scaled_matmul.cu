// int8_scaled_matmul: y[M,N] = q(x)[M,K] · w[N,K]ᵀ · x_scale[M] · w_scale[N] + bias[N], exact int32 accumulation
// Source    per-token activation scales as in Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 2.1, without outliers
// Layout    LAYOUTS.md#int8-row, #tile-w8a8
// Requires  sm80+, K ≤ 131072 (int32 sums); rows whose length is no multiple of 16 are copied into aligned memory first
// Mapping   quantize_rows: a block a row, two passes; then, tile layout: tile_matmul.cuh; row layout, few rows: matmul_tile; many rows: cuBLAS's int8 matmul and a
//           kernel for the scales
// Bound     memory below M ≈ 200: N·K bytes
// Verified  tests/test_int8_scaled_matmul.py

#include "common/matmul_checks.h"
#include "cuda/matmul_tile.cuh"
#include "cuda/tile_matmul.cuh"

namespace fastinfer {

constexpr int kQuantizeThreads = 512;

// q = clamp(rint(x / x_scale), −127, 127) with x_scale = max|x| / 127; x_scale is NaN for a row with NaN or infinity, and
// columns K … padded_k are zero. A thread takes every 512th pack of kCount columns; kCount > 1 needs padded_k = k.
template <typename T, int kCount>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const T* x, int8_t* q, float* x_scale, int64_t k, int64_t padded_k) {
  const auto* x_row = reinterpret_cast<const Pack<T, kCount>*>(x + blockIdx.x * k);
  auto* q_row = reinterpret_cast<Pack<int8_t, kCount>*>(q + blockIdx.x * padded_k);
  const int packs = static_cast<int>(k / kCount), padded_packs = static_cast<int>(padded_k / kCount);
  float largest = 0.f;
  bool finite = true;
#pragma unroll 4
  for (int i = threadIdx.x; i < packs; i += kQuantizeThreads) {
    const Pack<T, kCount> values = x_row[i];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float v = fabsf(to_float(values.v[j]));
      finite = finite && v <= 3.402823466e38f;  // false for NaN too
      largest = fmaxf(largest, v);
    }
  }
  __shared__ float warp_largest[kQuantizeThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = largest;
  finite = __syncthreads_and(finite);
#pragma unroll
  for (int i = 0; i < kQuantizeThreads / 32; ++i) largest = fmaxf(largest, warp_largest[i]);

  const float scale = __fdiv_rn(largest, 127.f);
  if (threadIdx.x == 0) x_scale[blockIdx.x] = finite ? scale : __int_as_float(0x7FC00000);
  const bool zero = !finite || scale == 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < padded_packs; i += kQuantizeThreads) {
    Pack<T, kCount> values{};
    if (i < packs) values = x_row[i];
    Pack<int8_t, kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float v = zero ? 0.f : rintf(__fdiv_rn(to_float(values.v[j]), scale));
      out.v[j] = static_cast<int8_t>(fminf(fmaxf(v, -127.f), 127.f));
    }
    q_row[i] = out;
  }
}

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

Tensor int8_scaled_matmul_cuda(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                               const std::optional<Tensor>& bias, std::string layout) {
  constexpr const char* op = "int8_scaled_matmul";
  const MatmulShape shape = check_int8_matmul(op, x, w, w_scale, bias);
  check_cuda_layout(op, layout, "tile_w8a8");
  FASTINFER_CHECK(op, shape.k <= 131072, "K must be at most 131072 for exact int32 sums, got ", shape.k);
  const LaunchContext context(op, x);
  if (layout != "row") check_tile_layout(op, shape, layout, context);
  Tensor y = empty_output(x, shape.n);
  if (shape.m == 0 || shape.n == 0) return y;

  const Tensor rows_w = aligned_rows(w, 16);
  const int64_t padded_k = rows_w.size(1);
  const Tensor rows_x = torch::stable::contiguous(x);
  Tensor q = torch::stable::new_empty(x, {shape.m, padded_k}, ScalarType::Char);
  Tensor x_scale = torch::stable::new_empty(x, {shape.m}, ScalarType::Float);
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool wide = shape.k == padded_k && is_aligned16(rows_x);
    const auto kernel = wide ? quantize_rows_kernel<T, 8> : quantize_rows_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(shape.m), kQuantizeThreads, 0, context.stream()>>>(
        static_cast<const T*>(rows_x.const_data_ptr()), static_cast<int8_t*>(q.mutable_data_ptr()),
        static_cast<float*>(x_scale.mutable_data_ptr()), shape.k, padded_k);
  });
  check_launch(op);

  if (layout != "row") {
    TileProblem p{op, q, rows_w.const_data_ptr()};
    p.epilogue = tile_epilogue(y, shape, bias);
    p.epilogue.x_scale = static_cast<const float*>(x_scale.const_data_ptr());
    p.epilogue.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
    p.m = static_cast<int>(shape.m), p.n = static_cast<int>(shape.n), p.k = static_cast<int>(shape.k);
    dispatch_float(x.scalar_type(),
                   [&](auto zero) { run_tile_matmul<Int8x8Decode, Int8x8Wgmma, decltype(zero)>(p, context); });
    return y;
  }

  TileArgs args = matmul_args(op, q, rows_w, w_scale, bias, y, shape);
  args.x_scale = static_cast<const float*>(x_scale.const_data_ptr());
  // cuBLAS wins from here on, measured on an H200; it takes N in multiples of 8.
  const bool many = shape.m > (is_narrow(args, context) ? 64 : 32);
  if (many && shape.n % 8 == 0 && shape.k > 0 && is_aligned16(w_scale)) {
    launch_dense_int8(op, args, q, rows_w, x.scalar_type(), context);
  } else {
    launch_matmul<Int8Int8>(op, args, context);
  }
  return y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) {
  m.impl("int8_scaled_matmul", TORCH_BOX(&fastinfer::int8_scaled_matmul_cuda));
}
