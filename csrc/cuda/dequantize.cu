// dequantize: w[N,K] in fp32, bf16 or fp16 from int8 or int4 weights, for torch's dense matmul
// Source    –
// Layout    LAYOUTS.md#int8-row, #int4-row, #tile-w8a16, #tile-w4a16 (fp32 only)
// Requires  sm80+
// Mapping   a thread makes 8 neighbouring weights of a row (16 bytes of fp16), or 1 where rows are not 8-byte aligned; of
//           tiles what a lane has; rows behind them by a launch of the kernel for rows
// Bound     memory: N·K·(weight bytes + output bytes)
// Verified  tests/test_int8_matmul.py, tests/test_int4_matmul.py (many rows, fp32)

#include "cuda/dequantize.cuh"

#include "common/torch_linear.h"

namespace fastinfer {

// grid: x over a row's packs, y over rows (strided, N may exceed the grid's limit)
template <typename T, int kCount>
__global__ void dequantize_int8_kernel(const int8_t* w, const float* w_scale, T* out, int64_t n, int64_t k) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kCount;
  if (column >= k) return;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    const float scale = w_scale[row];
    const auto q = *reinterpret_cast<const Pack<int8_t, kCount>*>(w + row * k + column);
    Pack<T, kCount> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.v[i] = from_float<T>(static_cast<float>(q.v[i]) * scale);
    *reinterpret_cast<Pack<T, kCount>*>(out + row * k + column) = values;
  }
}

template <typename T>
__global__ void dequantize_int4_kernel(const uint32_t* w, const void* w_scale, const void* w_zero, Element scale_type,
                                       T* out, int64_t n, int64_t k, int group_shift) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (column >= k) return;
  for (int64_t row = blockIdx.y; row < n; row += gridDim.y) {
    const int64_t group = row * (k >> group_shift) + (column >> group_shift);
    const float scale = load_float(w_scale, scale_type, group), zero = load_float(w_zero, scale_type, group);
    const uint32_t q = w[(row * k + column) / 8];
    Pack<T, 8> values;
#pragma unroll
    for (int i = 0; i < 8; ++i) values.v[i] = from_float<T>((static_cast<float>(q >> (4 * i) & 15) - zero) * scale);
    *reinterpret_cast<Pack<T, 8>*>(out + row * k + column) = values;
  }
}

static dim3 dequantize_grid(int64_t n, int64_t packs, int threads) {
  return dim3(static_cast<unsigned>((packs + threads - 1) / threads),
              static_cast<unsigned>(std::min<int64_t>(n, 65535)));
}

Tensor dequantize_int8(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& x,
                       const LaunchContext& context) {
  constexpr int kThreads = 128;
  const int64_t n = w.size(0), k = w.size(1);
  Tensor out = torch::stable::new_empty(x, {n, k});
  if (n == 0 || k == 0) return out;
  const bool wide = k % 8 == 0 && is_aligned16(w);
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = wide ? dequantize_int8_kernel<T, 8> : dequantize_int8_kernel<T, 1>;
    kernel<<<dequantize_grid(n, wide ? k / 8 : k, kThreads), kThreads, 0, context.stream()>>>(
        static_cast<const int8_t*>(w.const_data_ptr()), static_cast<const float*>(w_scale.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()), n, k);
  });
  check_launch(op);
  return out;
}

Tensor dequantize_int4(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& w_zero, const Tensor& x,
                       const LaunchContext& context) {
  constexpr int kThreads = 128;
  const int64_t n = w.size(0), k = 2 * w.size(1);
  Tensor out = torch::stable::new_empty(x, {n, k});
  if (n == 0) return out;
  const Tensor words = aligned_rows(w, 1);
  const int group_shift = __builtin_ctzll(k / w_scale.size(1));
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    dequantize_int4_kernel<T><<<dequantize_grid(n, k / 8, kThreads), kThreads, 0, context.stream()>>>(
        static_cast<const uint32_t*>(words.const_data_ptr()), w_scale.const_data_ptr(), w_zero.const_data_ptr(),
        element_of(w_scale.scalar_type()), static_cast<T*>(out.mutable_data_ptr()), n, k, group_shift);
  });
  check_launch(op);
  return out;
}

// A thread unpacks the 16 bytes of one lane (LAYOUTS.md#tile-w4a16, #tile-w8a16): pairs of neighbours in two rows.
__global__ void dequantize_int4_tiles_kernel(const uint4* w, const void* w_scale, const void* w_zero,
                                             Element scale_type, float* out, int64_t pieces, int blocks, int groups) {
  const int64_t piece = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const int lane = piece % 32, g = lane / 4, t = lane % 4, block = piece / 32 % blocks, k = 64 * blocks;
  const int64_t tile = piece / 32 / blocks;
  const uint4 v = w[piece];
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 16; ++i) {
    const int step = i / 4, column = 64 * block + 16 * step + 8 * (i / 2 % 2) + 2 * t, group = column / (k / groups);
    const int64_t at = (tile * groups + group) * 16 + 2 * g + i % 2;
    const float scale = load_float(w_scale, scale_type, at), zero = load_float(w_zero, scale_type, at);
    const uint32_t low = words[step] >> (4 * (i % 4)) & 15, high = words[step] >> (4 * (i % 4) + 16) & 15;
    const float2 values{(static_cast<float>(low) - zero) * scale, (static_cast<float>(high) - zero) * scale};
    *reinterpret_cast<float2*>(out + (tile * 16 + g + 8 * (i % 2)) * k + column) = values;
  }
}

__global__ void dequantize_int8_tiles_kernel(const uint4* w, const float* w_scale, float* out, int64_t pieces,
                                             int blocks) {
  const int64_t piece = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  const int lane = piece % 32, g = lane / 4, t = lane % 4, block = piece / 32 % blocks, k = 32 * blocks;
  const int64_t tile = piece / 32 / blocks;
  const uint4 v = w[piece];
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 8; ++i) {
    const int64_t row = tile * 16 + g + 8 * (i % 2);
    const int column = 32 * block + 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * t;
    const float low = static_cast<int8_t>(words[i / 2] >> (8 * (i % 2)));
    const float high = static_cast<int8_t>(words[i / 2] >> (8 * (i % 2) + 16));
    *reinterpret_cast<float2*>(out + row * k + column) = {low * w_scale[row], high * w_scale[row]};
  }
}

Tensor dequantize_int4_tiles(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& w_zero,
                             const Tensor& x, const LaunchContext& context) {
  constexpr int kThreads = 128;
  const int64_t n = w.size(0), k = 2 * w.size(1), tail = n % 16, whole = n - tail, pieces = whole * k / 32;
  const int64_t groups = w_scale.size(1);
  Tensor out = torch::stable::new_empty(x, {n, k});
  dequantize_int4_tiles_kernel<<<(pieces + kThreads - 1) / kThreads, kThreads, 0, context.stream()>>>(
      static_cast<const uint4*>(w.const_data_ptr()), w_scale.const_data_ptr(), w_zero.const_data_ptr(),
      element_of(w_scale.scalar_type()), static_cast<float*>(out.mutable_data_ptr()), pieces, static_cast<int>(k / 64),
      static_cast<int>(groups));
  if (tail > 0) {
    const auto rows_of = [&](const Tensor& t, int64_t row_bytes) {
      return static_cast<const char*>(t.const_data_ptr()) + whole * row_bytes;
    };
    const int64_t scale_bytes = groups * static_cast<int64_t>(w_scale.element_size());
    dequantize_int4_kernel<float><<<dequantize_grid(tail, k / 8, kThreads), kThreads, 0, context.stream()>>>(
        reinterpret_cast<const uint32_t*>(rows_of(w, k / 2)), rows_of(w_scale, scale_bytes),
        rows_of(w_zero, scale_bytes), element_of(w_scale.scalar_type()),
        static_cast<float*>(out.mutable_data_ptr()) + whole * k, tail, k, __builtin_ctzll(k / groups));
  }
  check_launch(op);
  return out;
}

Tensor dequantize_int8_tiles(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& x,
                             const LaunchContext& context) {
  constexpr int kThreads = 128;
  const int64_t n = w.size(0), k = w.size(1), tail = n % 16, whole = n - tail, pieces = whole * k / 16;
  Tensor out = torch::stable::new_empty(x, {n, k});
  const auto* scales = static_cast<const float*>(w_scale.const_data_ptr());
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  dequantize_int8_tiles_kernel<<<(pieces + kThreads - 1) / kThreads, kThreads, 0, context.stream()>>>(
      static_cast<const uint4*>(w.const_data_ptr()), scales, values, pieces, static_cast<int>(k / 32));
  if (tail > 0) {
    dequantize_int8_kernel<float, 8><<<dequantize_grid(tail, k / 8, kThreads), kThreads, 0, context.stream()>>>(
        static_cast<const int8_t*>(w.const_data_ptr()) + whole * k, scales + whole, values + whole * k, tail, k);
  }
  check_launch(op);
  return out;
}

Tensor dense_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  const bool cast = bias.has_value() && bias->scalar_type() != x.scalar_type();
  return torch_linear(x, w, cast ? torch::stable::to(*bias, x.scalar_type()) : bias);
}

}  // namespace fastinfer
