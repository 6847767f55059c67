// embed: x[B,T,K] = w[ids] · w_scale[ids] · factor, and rows of cos and sin at position lengths − starts + t
// Source    –
// Layout    plain rows; int8 w also LAYOUTS.md#panel16 and the tiles
// Requires  sm80+
// Mapping   a block of 512 threads a row of x, and one a row of each pair of tables; element by element: a row is a few
//           KiB, and what takes time is to learn where it lies
// Bound     latency: two loads, of which the second depends on the first
// Numerics  those of the reference, bit for bit: fastinfer/ops/embed.py
// Verified  tests/test_embed.py

#include "common/embed.h"
#include "common/hopper.cuh"
#include "cuda/row_norm.cuh"

namespace fastinfer {

constexpr int kEmbedThreads = 512;

struct EmbedArgs {
  const int64_t* ids = nullptr;    // [tokens]
  const void* w = nullptr;         // [v, k]
  const float* w_scale = nullptr;  // [v], or null beside float w
  void* x = nullptr;               // [tokens, k]
  float factor = 1.f;
  WeightLayout layout{};
  int64_t tokens = 0, t = 0, v = 0, k = 0;
  RotaryRows rotary;
};

template <typename T>
__device__ __forceinline__ void embed_row(const EmbedArgs& args, int64_t token) {
  const int64_t asked = args.ids[token];
  const int64_t id = asked < 0 ? 0 : asked < args.v ? asked : args.v - 1;
  const float factor = to_float(from_float<T>(args.factor));
  const float scale = args.w_scale == nullptr ? 1.f : args.w_scale[id];
  T* x = static_cast<T*>(args.x) + token * args.k;
  const auto value_at = [&](int64_t i) {
    if (args.w_scale == nullptr) return static_cast<const T*>(args.w)[id * args.k + i];
    const int8_t q = static_cast<const int8_t*>(args.w)[packed_index(args.layout, id, i, args.v, args.k)];
    return from_float<T>(__fmul_rn(q, scale));
  };
  constexpr int kBatch = 8;
  for (int64_t first = threadIdx.x; first < args.k; first += kBatch * kEmbedThreads) {
    T values[kBatch];  // all loads before the first store, which the compiler would not move them over
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kEmbedThreads;
      if (i < args.k) values[j] = value_at(i);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t i = first + j * kEmbedThreads;
      if (i < args.k) x[i] = factor == 1.f ? values[j] : from_float<T>(__fmul_rn(to_float(values[j]), factor));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kEmbedThreads) embed_kernel(const __grid_constant__ EmbedArgs args) {
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  wait_for_previous_kernel();
#endif
  if (blockIdx.x < args.tokens) return embed_row<T>(args, blockIdx.x);
  const RotaryRows& rows = args.rotary;
  const int64_t row = blockIdx.x - args.tokens, token = row % args.tokens;
  const int64_t from = row / args.tokens * rows.positions + rows.position(token / args.t, token % args.t);
  for (int64_t i = threadIdx.x; i < rows.r; i += kEmbedThreads) {
    rows.cos_rows[row * rows.r + i] = rows.cos[from * rows.r + i];
    rows.sin_rows[row * rows.r + i] = rows.sin[from * rows.r + i];
  }
}

static Tensor embed_into(const Tensor& ids, const Tensor& w, const std::optional<Tensor>& w_scale, double factor,
                         const EmbedShape& s, const RotaryRows& rotary) {
  const LaunchContext context("embed", w);
  const Tensor x = torch::stable::new_empty(w, {s.b, s.t, s.k}, s.x_type);
  EmbedArgs args;
  args.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  args.w = w.const_data_ptr();
  args.w_scale = static_cast<const float*>(data_or_null(w_scale));
  args.x = x.mutable_data_ptr();
  args.factor = static_cast<float>(factor);
  args.layout = s.layout;
  args.tokens = s.b * s.t, args.t = s.t, args.v = s.v, args.k = s.k;
  args.rotary = rotary;
  if (args.tokens == 0) return x;
  dispatch_float(s.x_type, [&](auto zero) {
    const int64_t blocks = args.tokens * (1 + rotary.tables);
    launch_rows("embed", embed_kernel<decltype(zero)>, blocks, kEmbedThreads, args, context);
  });
  return x;
}

Tensor embed_cuda(const Tensor& ids, const Tensor& w, const std::optional<Tensor>& w_scale, double factor,
                  const std::string& layout, std::optional<ScalarType> out_dtype) {
  return embed_into(ids, w, w_scale, factor, check_embed("embed", ids, w, w_scale, layout, out_dtype), {});
}

std::tuple<Tensor, Tensor, Tensor> embed_rotary_cuda(const Tensor& ids, const Tensor& w,
                                                     const std::optional<Tensor>& w_scale, double factor,
                                                     const std::string& layout, std::optional<ScalarType> out_dtype,
                                                     const Tensor& cos, const Tensor& sin, const Tensor& lengths,
                                                     const std::optional<Tensor>& starts) {
  const EmbedShape s = check_embed("embed", ids, w, w_scale, layout, out_dtype);
  check_rotary_tables("embed", ids, cos, sin, lengths, starts);
  const std::vector<int64_t> sizes = rotary_sizes(ids, cos);
  const Tensor cos_rows = torch::stable::new_empty(cos, sizes), sin_rows = torch::stable::new_empty(cos, sizes);
  const RotaryRows rows = rotary_rows(cos, sin, lengths, starts, cos_rows, sin_rows);
  return {embed_into(ids, w, w_scale, factor, s, rows), cos_rows, sin_rows};
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) {
  m.impl("embed", TORCH_BOX(&fastinfer::embed_cuda));
  m.impl("embed.rotary", TORCH_BOX(&fastinfer::embed_rotary_cuda));
}
