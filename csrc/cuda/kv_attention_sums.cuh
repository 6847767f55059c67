// Softmaxes over some of the keys, and how two of them become one: for kv_attention_tile.cuh.
#pragma once

#include "common/mma.cuh"

namespace fastinfer {

// A softmax over some keys, of one query: the largest score (base 2), Σ 2^(score − largest).
struct Stats {
  float top = -__builtin_inff(), sum = 0.f;
};

__device__ __forceinline__ float4 pair_of(const Stats (&stats)[2]) {
  return {stats[0].top, stats[0].sum, stats[1].top, stats[1].sum};
}

// What two parts' sums are multiplied by when they become one.
struct Fold {
  float ours, theirs;

  // Makes `into` the stats of both parts.
  __device__ __forceinline__ Fold(Stats& into, const Stats& part) {
    const float top = fmaxf(into.top, part.top), base = top == -__builtin_inff() ? 0.f : top;
    ours = exp2_fast(into.top - base), theirs = exp2_fast(part.top - base);
    into.sum = (*this)(into.sum, part.sum);
    into.top = top;
  }
  // One rounding for all places where parts meet: the compiler may not choose.
  __device__ __forceinline__ float operator()(float a, float b) const {
    return __fmaf_rn(b, theirs, __fmul_rn(a, ours));
  }
};

// Part of the sums of two queries: a lane's share of 16 dimensions × 8 queries, its columns' stats beside it.
struct PartOfSums {
  Stats stats[2];
  float v[4];

  __device__ __forceinline__ void fold(const float4& their_stats, const float4& theirs) {
    const Fold first(stats[0], {their_stats.x, their_stats.y}), second(stats[1], {their_stats.z, their_stats.w});
    v[0] = first(v[0], theirs.x), v[1] = second(v[1], theirs.y);
    v[2] = first(v[2], theirs.z), v[3] = second(v[3], theirs.w);
  }
  __device__ __forceinline__ void set(const float4& s, const float4& values) {
    stats[0] = {s.x, s.y}, stats[1] = {s.z, s.w};
    v[0] = values.x, v[1] = values.y, v[2] = values.z, v[3] = values.w;
  }
};

}  // namespace fastinfer
