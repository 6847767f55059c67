// What the kernels of kv_attention share: their arguments, and new tokens as the cache gets them.
#pragma once

#include "common/attention_split.h"
#include "common/cuda.cuh"
#include "common/mma.cuh"

namespace fastinfer {

struct AttentionTokens {  // [B, T, heads, D], strides in elements
  const void* data = nullptr;
  int64_t row = 0, token = 0, head = 0;
  bool packs = false;  // every eight elements can be loaded at once
};

struct AttentionRotation {  // [B or 1, T, R], strides in elements; a row's stride is 0 where all share it
  const void* data = nullptr;
  int64_t row = 0, token = 0;
};

struct AttentionArgs {
  AttentionTokens q, k, v;
  AttentionRotation cos, sin;
  Element rotation_type{};
  bool rotation_packs = false;
  int half = 0;                                         // R / 2
  void *k_cache = nullptr, *v_cache = nullptr;          // [B, G, L, D]
  float *k_scale = nullptr, *v_scale = nullptr;         // [B, G, L] beside an int8 cache
  const int32_t *lengths = nullptr, *starts = nullptr;  // [B]; starts may be null
  void* y = nullptr;                                    // [B, T, H, D]
  float scale = 0.f, softcap = 0.f;
  int window = 0, b = 0, t = 0, g = 0, d = 0, positions = 0;
  int group = 0, rows = 0;  // query heads that share a head of the cache; queries that do, row t · group + head

  // Of kv_attention_tile.cuh.
  int chunks = 0;               // of a block's queries, in `rows`
  int units = 0;                // of a group
  int ranks = 0;                // blocks of a cluster, a unit each; or 1: a block does all units of a group
  int max_groups = 0;           // that a row is split into
  int groups = 0;               // that the grid has room for
  float* partials = nullptr;    // of groups
  unsigned* arrived = nullptr;  // counters of the blocks that have left partials; 0 before and after
};

constexpr float kLog2E = 1.4426950408889634f;

// ---- new tokens -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load8(const float* p, bool packs, float (&out)[8]) {
  if (packs) {
    const auto low = *reinterpret_cast<const Pack<float, 4>*>(p),
               high = *reinterpret_cast<const Pack<float, 4>*>(p + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = low.v[i], out[i + 4] = high.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = p[i];
  }
}
template <typename T>
__device__ __forceinline__ void load8(const T* p, bool packs, float (&out)[8]) {
  Pack<T, 8> v;
  if (packs) {
    v = *reinterpret_cast<const Pack<T, 8>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v.v[i] = p[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = to_float(v.v[i]);
}

// Products are rounded before the sum, as in torch.
__device__ __forceinline__ float rotated(float x, float other, float cos, float sin) {
  return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(other, sin));
}

// Dimensions 8 · chunk … 8 · chunk + 7 of head `head` of token (b, t), rotated in fp32.
template <typename T>
__device__ __forceinline__ void load_rotated(const AttentionArgs& a, const AttentionTokens& from, int b, int t,
                                             int head, int chunk, float (&out)[8]) {
  const T* x = static_cast<const T*>(from.data) + b * from.row + t * from.token + head * from.head;
  const int at = 8 * chunk, half = a.half;
  load8(x + at, from.packs, out);
  if (at >= 2 * half) return;
  const int64_t cos_at = b * a.cos.row + t * a.cos.token, sin_at = b * a.sin.row + t * a.sin.token;
  if (half % 8 == 0 && a.rotation_packs) {
    const float sign = at < half ? -1.f : 1.f;
    float other[8], cos[8], sin[8];
    load8(x + (at < half ? at + half : at - half), from.packs, other);
    if (a.rotation_type == Element::kFloat) {
      load8(static_cast<const float*>(a.cos.data) + cos_at + at, true, cos);
      load8(static_cast<const float*>(a.sin.data) + sin_at + at, true, sin);
    } else {
      load8(static_cast<const T*>(a.cos.data) + cos_at + at, true, cos);
      load8(static_cast<const T*>(a.sin.data) + sin_at + at, true, sin);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = rotated(out[i], sign * other[i], cos[i], sin[i]);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int j = at + i;
    if (j >= 2 * half) break;
    const float other = j < half ? -to_float(x[j + half]) : to_float(x[j - half]);
    const float value = rotated(to_float(x[j]), other, load_float(a.cos.data, a.rotation_type, cos_at + j),
                                load_float(a.sin.data, a.rotation_type, sin_at + j));
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = k == i ? value : out[k];
  }
}

// One row of D = 8 · active lanes as the cache holds it: int8 and its scale, as int8_quantize rounds. All lanes call it.
__device__ __forceinline__ float quantize_lanes(const float (&v)[8], bool active, uint2& out) {
  float largest = 0.f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    finite = finite && fabsf(v[i]) <= 3.402823466e38f;  // false for NaN too
    largest = fmaxf(largest, fabsf(v[i]));
  }
  if (!active) largest = 0.f, finite = true;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  finite = __all_sync(~0u, finite);
  const float scale = __fdiv_rn(largest, 127.f);
  const bool zero = !finite || scale == 0.f;
  uint32_t bytes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float q = zero ? 0.f : rintf(__fdiv_rn(v[i], scale));
    bytes[i] = static_cast<uint32_t>(static_cast<int>(fminf(fmaxf(q, -127.f), 127.f))) & 0xFF;
  }
  out.x = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
  out.y = bytes[4] | bytes[5] << 8 | bytes[6] << 16 | bytes[7] << 24;
  return finite ? scale : __int_as_float(0x7FC00000);
}

template <typename T>
__device__ __forceinline__ Pack<T, 8> pack8(const float (&v)[8]) {
  Pack<T, 8> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = from_float<T>(v[i]);
  return out;
}

// What is known of row b on the device alone. The loads are issued where this stands, and waited for where it is used.
struct RowLimits {
  int length, start = 0;
  __device__ __forceinline__ RowLimits(const AttentionArgs& a, int b) {
    length = load_at_once(a.lengths + b);
    if (a.starts != nullptr) start = load_at_once(a.starts + b);
  }
};

__device__ __forceinline__ KeySplit split_row(const AttentionArgs& a, const RowLimits& row) {
  const int length = larger(0, smaller(row.length, a.positions - a.t));  // never outside of the cache
  return split_keys(length, row.start, a.window, a.t, a.units, a.max_groups);
}

// ---- kernels ------------------------------------------------------------------------------------------------------------

// 16-bit queries over a cache of 16-byte aligned rows; fills in the rest of `args`, allocates beside `like`.
template <typename T>
void launch_tile_attention(const char* op, AttentionArgs args, bool int8, const Tensor& like,
                           const LaunchContext& context);

// `count` counters that are 0 and that no launch in flight has.
unsigned* take_counters(int64_t count, const LaunchContext& context);
constexpr int64_t kMostCounters = 1 << 13;  // of one launch

}  // namespace fastinfer
