// kv_attention: new keys and values into a static cache, keys rotated on the way; then y = softmax(q · keysᵀ) · values
// Source    as in kv_attention_tile.cuh, which 16-bit queries take; here fp32 ones, caches that are not aligned,
//           and heads too large for the shared memory of the GPU
// Layout    LAYOUTS.md#kv-cache
// Requires  sm80+
// Mapping   two launches: a warp appends a token of a head of the cache, lane i its dimensions 8i … 8i + 7; then a block of
//           4 warps a query, warp w taking every fourth key, a running softmax each, folded in order at the end
// Bound     latency: a key is a reduction over the warp. For tests and for models that are small enough for fp32
// Numerics  fp32; the parts of a sum depend on the row's own length alone
// Verified  tests/test_kv_attention.py

#include "cuda/kv_attention.cuh"

#include <atomic>

#include "common/attention_checks.h"
#include "common/hopper.cuh"
#include "cuda/dependent_launch.cuh"

namespace fastinfer {

// ---- counters -----------------------------------------------------------------------------------------------------------

// Zeroed when the library is loaded, and again by who counts to the end. Launches get them in turn: those of a graph keep
// theirs for as long as it lives, so that ordinary launches, many at a time, have another half. A step of a model of 32
// layers with 8 heads takes 2^11 at batch 1: the 129th one that is captured shares those of the first. That is right as
// long as the two do not run at the same time, as graphs of one memory pool never do; of different models they may.
constexpr int64_t kCounters = 1 << 18;
__device__ unsigned counters[2 * kCounters];

unsigned* take_counters(int64_t count, const LaunchContext& context) {
  static std::array<unsigned*, 64> addresses{};
  static std::array<int64_t, 2> next{};
  static std::mutex mutex;
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(context.stream(), &status));
  const int kind = status == cudaStreamCaptureStatusNone ? 0 : 1;
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& address = addresses.at(context.device());
  if (address == nullptr) {  // may load the library's code, which a capture in its usual mode forbids
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    void* found = nullptr;
    const cudaError_t error = cudaGetSymbolAddress(&found, counters);
    STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    STD_CUDA_CHECK(error);
    address = static_cast<unsigned*>(found);
  }
  if (next[kind] + count > kCounters) next[kind] = 0;
  unsigned* out = address + kind * kCounters + next[kind];
  next[kind] += count;
  return out;
}

// ---- plain kernels --------------------------------------------------------------------------------------------------------

constexpr int kPlainWarps = 4;

// Block: a token of a row; its warps take the heads of the cache.
template <typename T, bool kInt8>
__global__ void __launch_bounds__(32 * kPlainWarps) append_tokens_kernel(const __grid_constant__ AttentionArgs args) {
  const int lane = threadIdx.x % 32, b = blockIdx.x / args.t, t = blockIdx.x % args.t;
  const bool active = lane < args.d / 8;
  const int length = split_row(args, RowLimits(args, b)).length;
#pragma unroll 1
  for (int head = threadIdx.x / 32; head < args.g; head += kPlainWarps) {
    const int64_t position = (int64_t(b) * args.g + head) * args.positions + length + t;
    float k[8] = {}, v[8] = {};
    if (active) {
      RotatedChunk<T, false> chunk;
      chunk.load(args, args.k, b, t, head, lane);
      chunk.get(args, k);
      load8(static_cast<const T*>(args.v.data) + b * args.v.row + t * args.v.token + head * args.v.head + 8 * lane,
            false, v);
    }
    if constexpr (kInt8) {
      hadamard(k, transform_size(args));
      uint2 k_bytes, v_bytes;
      const float k_scale = quantize_lanes<32>(k, active, k_bytes), v_scale = quantize_lanes<32>(v, active, v_bytes);
      if (lane == 0) args.k_scale[position] = k_scale, args.v_scale[position] = v_scale;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!active) break;
        const int64_t at = position * args.d + 8 * lane + i;
        static_cast<int8_t*>(args.k_cache)[at] = static_cast<int8_t>((i < 4 ? k_bytes.x : k_bytes.y) >> (8 * (i % 4)));
        static_cast<int8_t*>(args.v_cache)[at] = static_cast<int8_t>((i < 4 ? v_bytes.x : v_bytes.y) >> (8 * (i % 4)));
      }
    } else {
#pragma unroll
      for (int i = 0; active && i < 8; ++i) {
        static_cast<T*>(args.k_cache)[position * args.d + 8 * lane + i] = from_float<T>(k[i]);
        static_cast<T*>(args.v_cache)[position * args.d + 8 * lane + i] = from_float<T>(v[i]);
      }
    }
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// Block: a query.
template <typename T, bool kInt8>
__global__ void __launch_bounds__(32 * kPlainWarps) plain_attention_kernel(const __grid_constant__ AttentionArgs args) {
  using Stored = std::conditional_t<kInt8, int8_t, T>;
  __shared__ float tops[kPlainWarps], sums[kPlainWarps], values[kPlainWarps][kMaxHead];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, heads = args.group * args.g;
  const int head = blockIdx.x % heads, t = blockIdx.x / heads % args.t, b = blockIdx.x / heads / args.t;
  const bool active = lane < args.d / 8;
  const KeySplit keys = split_row(args, RowLimits(args, b));
  const int64_t pair = (int64_t(b) * args.g + head / args.group) * args.positions;
  float q[8] = {}, v[8] = {}, top = -__builtin_inff(), sum = 0.f;
  RotatedChunk<T, false> query;
  if (active) query.load(args, args.q, b, t, head, lane);
  query.get(args, q);
  if constexpr (kInt8) hadamard_query(args, q);

  for (int at = larger(keys.lowest(t), keys.first) + warp; at <= keys.length + t; at += kPlainWarps) {
    const int64_t row = (pair + at) * args.d + 8 * lane;
    float product = 0.f;
#pragma unroll
    for (int i = 0; active && i < 8; ++i) {
      product = fmaf(q[i], to_float(static_cast<const Stored*>(args.k_cache)[row + i]), product);
    }
    float score = warp_sum(product) * args.scale;
    if (kInt8) score *= args.k_scale[pair + at];
    if (args.softcap > 0.f) score = args.softcap * tanhf(score / args.softcap);
    const float larger_top = fmaxf(top, score), base = larger_top == -__builtin_inff() ? 0.f : larger_top;
    const float factor = expf(top - base);
    float weight = expf(score - base);
    top = larger_top, sum = fmaf(sum, factor, weight);
    if (kInt8) weight *= args.v_scale[pair + at];
#pragma unroll
    for (int i = 0; active && i < 8; ++i) {
      v[i] = fmaf(weight, to_float(static_cast<const Stored*>(args.v_cache)[row + i]), v[i] * factor);
    }
  }
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
#pragma unroll
  for (int i = 0; active && i < 8; ++i) values[warp][8 * lane + i] = v[i];
  __syncthreads();

  float total = 0.f, factors[kPlainWarps];
  top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
  for (int w = 0; w < kPlainWarps; ++w) {
    factors[w] = expf(tops[w] - (top == -__builtin_inff() ? 0.f : top));
    total = fmaf(sums[w], factors[w], total);
  }
  T* y = static_cast<T*>(args.y) + int64_t(blockIdx.x) * args.d;
  for (int i = threadIdx.x; i < args.d; i += 32 * kPlainWarps) {
    float out = 0.f;
    for (int w = 0; w < kPlainWarps; ++w) out = fmaf(values[w][i], factors[w], out);
    y[i] = from_float<T>(total == 0.f ? 0.f : out / total);
  }
}

template <typename T, bool kInt8>
static void launch_plain_as(const char* op, AttentionArgs args, const LaunchContext& context) {
  args.units = args.most_units = 1;
  append_tokens_kernel<T, kInt8><<<args.b * args.t, 32 * kPlainWarps, 0, context.stream()>>>(args);
  check_launch(op);
  const int queries = args.b * args.t * args.group * args.g;
  plain_attention_kernel<T, kInt8><<<queries, 32 * kPlainWarps, 0, context.stream()>>>(args);
  check_launch(op);
}

static void launch_plain(const char* op, const AttentionArgs& args, ScalarType type, bool int8,
                         const LaunchContext& context) {
  take_dependent_launch();  // both wait for the kernel before
  dispatch_float(type, [&](auto zero) {
    using T = decltype(zero);
    int8 ? launch_plain_as<T, true>(op, args, context) : launch_plain_as<T, false>(op, args, context);
  });
}

// ---- the op -------------------------------------------------------------------------------------------------------------

static AttentionTokens tokens_of(const Tensor& t) {
  AttentionTokens out{t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  const int64_t pack = 8, strides[] = {out.row, out.token, out.head};
  out.packs = is_aligned16(t) && std::all_of(strides, strides + 3, [&](int64_t s) { return s % pack == 0; });
  return out;
}

static AttentionRotation rotation_of(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1)};
}

static AttentionArgs make_args(const AttentionTensors& a, const AttentionShape& s, const Tensor& y) {
  AttentionArgs args;
  args.q = tokens_of(a.q), args.k = tokens_of(a.k), args.v = tokens_of(a.v);
  if (a.cos && s.r > 0) {
    args.cos = rotation_of(*a.cos), args.sin = rotation_of(*a.sin);
    args.rotation_type = element_of(a.cos->scalar_type());
    args.half = static_cast<int>(s.r / 2);
    const int64_t strides[] = {args.cos.row, args.cos.token, args.sin.row, args.sin.token};
    args.rotation_packs = args.half % 8 == 0 && is_aligned16(*a.cos) && is_aligned16(*a.sin) &&
                          std::all_of(strides, strides + 4, [](int64_t stride) { return stride % 8 == 0; });
  }
  args.k_cache = a.k_cache.mutable_data_ptr(), args.v_cache = a.v_cache.mutable_data_ptr();
  if (a.k_scale) {
    args.k_scale = static_cast<float*>(a.k_scale->mutable_data_ptr());
    args.v_scale = static_cast<float*>(a.v_scale->mutable_data_ptr());
  }
  args.lengths = static_cast<const int32_t*>(a.lengths.const_data_ptr());
  if (a.starts) args.starts = static_cast<const int32_t*>(a.starts->const_data_ptr());
  args.y = y.mutable_data_ptr();
  args.b = static_cast<int>(s.b), args.t = static_cast<int>(s.t), args.g = static_cast<int>(s.g);
  args.d = static_cast<int>(s.d), args.positions = static_cast<int>(s.l);
  args.per_group = s.group() == 1 ? 0 : static_cast<unsigned>((int64_t(1) << 32) / s.group() + 1);
  args.group = static_cast<int>(s.group()), args.rows = static_cast<int>(s.rows());
  return args;
}

Tensor kv_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& lengths, const std::optional<Tensor>& k_scale,
                         const std::optional<Tensor>& v_scale, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin, const std::optional<Tensor>& starts, double scale,
                         int64_t window, double softcap) {
  constexpr const char* op = "kv_attention";
  const AttentionTensors tensors{q, k, v, k_cache, v_cache, lengths, k_scale, v_scale, cos, sin, starts};
  const AttentionShape s = check_kv_attention(op, tensors, window, softcap);
  constexpr int64_t kMost = 1 << 29;  // sums of two positions are an int
  FASTINFER_CHECK(op, s.l <= kMost, "k_cache must have at most ", kMost, " positions, got ", s.l);
  const LaunchContext context(op, q);
  Tensor y = torch::stable::new_empty(q, {s.b, s.t, s.h, s.d});
  if (y.numel() == 0) return y;
  AttentionArgs args = make_args(tensors, s, y);
  args.window = static_cast<int>(std::min(window, kMost));
  const bool int8 = k_scale.has_value();
  if (q.scalar_type() != ScalarType::Float && is_aligned16(k_cache) && is_aligned16(v_cache)) {
    // Scores to base 2; capped ones as kv_attention_tile.cuh computes tanh.
    args.scale = static_cast<float>(softcap > 0 ? 2 * kLog2E * scale / softcap : kLog2E * scale);
    args.softcap = static_cast<float>(kLog2E * softcap);
    const auto launch =
        q.scalar_type() == ScalarType::Half ? launch_tile_attention<__half> : launch_tile_attention<__nv_bfloat16>;
    if (launch(op, args, int8, q, context)) return y;
  }
  args.scale = static_cast<float>(scale), args.softcap = static_cast<float>(softcap);
  launch_plain(op, args, q.scalar_type(), int8, context);
  return y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("kv_attention", TORCH_BOX(&fastinfer::kv_attention_cuda)); }
