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
  bool early = false;           // lengths and what the cache has are read before the previous kernel has finished
  int ranks = 0;                // blocks of a cluster, a unit each; or 1: a block does all units of a group
  int most_units = 0;           // of a row
  unsigned per_group = 0;       // 2^32 / group, rounded up; 0 for a group of one
  int groups = 0;               // that the grid has room for
  float* partials = nullptr;    // of groups
  unsigned* arrived = nullptr;  // counters of the blocks that have left partials; 0 before and after
};

// The token of a row of the queries: row / group.
__device__ __forceinline__ int token_of(const AttentionArgs& a, int row) {
  return a.per_group == 0 ? row : static_cast<int>(__umulhi(row, a.per_group));
}

constexpr float kLog2E = 1.4426950408889634f;

// ---- new tokens -------------------------------------------------------------------------------------------------------

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

// Eight elements as they are: of T, or of fp32.
struct Raw8 {
  uint4 v[2];

  template <typename T>
  __device__ __forceinline__ void load(const T* p) {
    v[0] = *reinterpret_cast<const uint4*>(p);
    if constexpr (sizeof(T) == 4) v[1] = *reinterpret_cast<const uint4*>(p + 4);
  }
  template <typename T>
  __device__ __forceinline__ void get(float (&out)[8]) const {
    if constexpr (sizeof(T) == 4) {
      const uint32_t words[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(words[i]);
    } else {
      const auto pack = *reinterpret_cast<const Pack<T, 8>*>(&v[0]);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = to_float(pack.v[i]);
    }
  }
};

// Dimensions 8 · chunk … 8 · chunk + 7 of a head of a token, rotated in fp32: loads where it is made, where that can be by
// packs (never where not kPacks), and the rest in get().
template <typename T, bool kPacks = true>
struct RotatedChunk {
  enum class State { kNone, kPlain, kRotated, kSlow };
  State state = State::kNone;
  const T* x;
  int64_t cos_at, sin_at;
  int at;
  Raw8 own, other, cos, sin;

  __device__ __forceinline__ RotatedChunk() {}
  __device__ __forceinline__ void load(const AttentionArgs& a, const AttentionTokens& from, int b, int t, int head,
                                       int chunk) {
    x = static_cast<const T*>(from.data) + b * from.row + t * from.token + head * from.head;
    at = 8 * chunk;
    cos_at = b * a.cos.row + t * a.cos.token, sin_at = b * a.sin.row + t * a.sin.token;
    const bool rotates = at < 2 * a.half;
    state = !from.packs || (rotates && !a.rotation_packs) ? State::kSlow : rotates ? State::kRotated : State::kPlain;
    if (!kPacks) state = State::kSlow;
    if (state == State::kSlow) return;
    own.load(x + at);
    if (!rotates) return;
    other.load(x + (at < a.half ? at + a.half : at - a.half));
    if (a.rotation_type == Element::kFloat) {
      cos.load(static_cast<const float*>(a.cos.data) + cos_at + at);
      sin.load(static_cast<const float*>(a.sin.data) + sin_at + at);
    } else {
      cos.load(static_cast<const T*>(a.cos.data) + cos_at + at);
      sin.load(static_cast<const T*>(a.sin.data) + sin_at + at);
    }
  }
  __device__ __forceinline__ void get(const AttentionArgs& a, float (&out)[8]) const {
    if (state == State::kNone) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = 0.f;
    } else if (state == State::kSlow) {
      get_slow(a, out);
    } else {
      own.get<T>(out);
      if (state == State::kPlain) return;
      const float sign = at < a.half ? -1.f : 1.f;
      float partner[8], c[8], s[8];
      other.get<T>(partner);
      if (a.rotation_type == Element::kFloat) {
        cos.get<float>(c), sin.get<float>(s);
      } else {
        cos.get<T>(c), sin.get<T>(s);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = rotated(out[i], sign * partner[i], c[i], s[i]);
    }
  }
  __device__ __forceinline__ void get_slow(const AttentionArgs& a, float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = to_float(x[at + i]);
#pragma unroll 1
    for (int i = 0; i < 8 && at + i < 2 * a.half; ++i) {
      const int j = at + i;
      const float partner = j < a.half ? -to_float(x[j + a.half]) : to_float(x[j - a.half]);
      const float value = rotated(to_float(x[j]), partner, load_float(a.cos.data, a.rotation_type, cos_at + j),
                                  load_float(a.sin.data, a.rotation_type, sin_at + j));
#pragma unroll
      for (int k = 0; k < 8; ++k) out[k] = k == i ? value : out[k];
    }
  }
};

// The transform of keys and queries beside an int8 cache, LAYOUTS.md#kv-cache, of the rows' n dimensions each: n / 8 lanes,
// aligned, hold eight neighbouring ones each. All lanes of the warp call it.
__device__ __forceinline__ void hadamard(float (&v)[8], int n) {
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const float a = v[i], b = v[i + distance];
      v[i] = a + b, v[i + distance] = a - b;
    }
  }
#pragma unroll 1
  for (int distance = 1; distance < n / 8; distance *= 2) {
    const float sign = threadIdx.x & distance ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = fmaf(v[i], sign, __shfl_xor_sync(~0u, v[i], distance));  // a + b or a - b
  }
}

// How many dimensions it mixes: the largest power of two that divides D.
__device__ __forceinline__ int transform_size(const AttentionArgs& a) { return a.d & -a.d; }

// Queries get it times 1 / n.
__device__ __forceinline__ void hadamard_query(const AttentionArgs& a, float (&v)[8]) {
  hadamard(v, transform_size(a));
  const float inverse = 1.f / static_cast<float>(transform_size(a));
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= inverse;
}

// Rows as an int8 cache holds them, each by kLanes neighbouring lanes with eight elements each: the codes and the scale, as
// int8_quantize rounds. All lanes of the warp call it; what inactive ones hold does not count.
template <int kLanes>
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
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  const unsigned bad = __ballot_sync(~0u, !finite), lanes = ~0u >> (32 - kLanes);
  finite = (bad >> (threadIdx.x % 32 / kLanes * kLanes) & lanes) == 0;
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
  return split_keys(length, larger(0, row.start), a.window, a.t, a.units, a.most_units);
}

// ---- kernels ------------------------------------------------------------------------------------------------------------

// 16-bit queries over a cache of 16-byte aligned rows; fills in the rest of `args`, allocates beside `like`.
// False where the GPU has too little shared memory.
template <typename T>
bool launch_tile_attention(const char* op, AttentionArgs args, bool int8, const Tensor& like,
                           const LaunchContext& context);

// `count` counters that are 0 and that no launch in flight has, unless that was so many launches ago that all counters have
// been taken since (kv_attention.cu): such launches may not run at the same time.
unsigned* take_counters(int64_t count, const LaunchContext& context);
constexpr int64_t kMostCounters = 1 << 13;  // of one launch

}  // namespace fastinfer
