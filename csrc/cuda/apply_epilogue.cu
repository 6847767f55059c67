// apply_epilogue: y[M,N_out] = gate(v[M,N] + bias[N]) + residual[M,N_out], after matmuls that have no epilogue
// Source    –
// Layout    LAYOUTS.md#gate-up where gated, or halves (epilogue.cuh)
// Requires  sm80+
// Mapping   a thread makes 8 neighbouring columns of y (of 16 columns of v where gated), or 1 where they are not aligned;
//           grid: x over a row's packs, y over rows (strided)
// Bound     memory: M·N reads and M·N_out writes, most of them in L2
// Verified  tests/test_linear.py, and the epilogue tests of the quantised matmuls

#include "cuda/apply_epilogue.cuh"

namespace fastinfer {

struct ApplyArgs {
  const void* v = nullptr;  // [M, N]
  Epilogue epilogue;
  int64_t m = 0;
};

// kCount columns of v as floats, with the bias.
template <typename V, int kCount>
__device__ __forceinline__ void load_columns(const ApplyArgs& args, int64_t row, int column, float (&out)[kCount]) {
  const Epilogue& e = args.epilogue;
  const auto values = *reinterpret_cast<const Pack<V, kCount>*>(static_cast<const V*>(args.v) + row * e.n + column);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    out[i] = to_float(values.v[i]);
    if (e.bias != nullptr) out[i] += load_float(e.bias, e.bias_type, column + i);
  }
}

template <typename V, typename Y, int kCount>
__global__ void apply_epilogue_kernel(const __grid_constant__ ApplyArgs args) {
  const Epilogue& e = args.epilogue;
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kCount;
  if (column >= e.y_stride) return;
  const bool gated = e.gate != Gate::kNone;
  const int from = gated && !e.halves ? column / 8 * 16 + column % 8 : column,
            up_from = from + (e.halves ? e.n / 2 : 8);
  for (int64_t row = blockIdx.y; row < args.m; row += gridDim.y) {
    float v[kCount];
    load_columns<V, kCount>(args, row, from, v);
    if (gated) {
      float up[kCount];
      load_columns<V, kCount>(args, row, up_from, up);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = gate_value(e.gate, v[i]) * up[i];
    }
    const int64_t at = row * e.y_stride + column;
    if (e.residual != nullptr) {
      const auto residual = *reinterpret_cast<const Pack<Y, kCount>*>(static_cast<const Y*>(e.residual) + at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] += to_float(residual.v[i]);
    }
    Pack<Y, kCount> out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) out.v[i] = from_float<Y>(v[i]);
    *reinterpret_cast<Pack<Y, kCount>*>(static_cast<Y*>(e.y) + at) = out;
  }
}

Tensor apply_epilogue(const char* op, const Tensor& v, const EpilogueArguments& arguments, Gate gate,
                      const LaunchContext& context) {
  constexpr int kThreads = 128;
  const int64_t m = rows_of(v), n = v.size(v.dim() - 1), columns = out_features(gate, n);
  Tensor y = empty_output(v, columns, arguments.y_type);
  if (m == 0 || n == 0) return y;
  FASTINFER_CHECK(op, n < (int64_t(1) << 30), "N must be below 2^30");
  const Tensor rows = torch::stable::contiguous(v);
  const ApplyArgs args{rows.const_data_ptr(), make_epilogue(y, {m, n, 0}, arguments, gate), m};
  const auto& residual = arguments.residual;
  const bool wide = n % 8 == 0 && is_aligned16(rows) && (!residual.has_value() || is_aligned16(*residual));
  const int64_t packs = wide ? columns / 8 : columns;
  const dim3 grid(static_cast<unsigned>((packs + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(m, 65535)));
  dispatch_float(arguments.y_type, [&](auto zero) {
    using Y = decltype(zero);
    const auto launch = [&](auto v_zero) {
      using V = decltype(v_zero);
      const auto kernel = wide ? apply_epilogue_kernel<V, Y, 8> : apply_epilogue_kernel<V, Y, 1>;
      kernel<<<grid, kThreads, 0, context.stream()>>>(args);
    };
    v.scalar_type() == ScalarType::Float ? launch(float{}) : launch(Y{});
  });
  check_launch(op);
  return y;
}

Tensor LaterEpilogue::apply(const Tensor& v, const LaunchContext& context) const {
  if (!needed()) return v;
  return apply_epilogue(op, v, {std::nullopt, residual, "", y_type}, gate, context);
}

}  // namespace fastinfer
