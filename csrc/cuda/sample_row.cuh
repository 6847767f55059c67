// What sample's kernels do with one row of logits: scores, the likeliest, cuts by count and by share, the draw.
// A cluster of `ranks` blocks has a row, each block a contiguous part of it; below compute capability 9.0 there is one.
#pragma once

#include "common/cuda.cuh"
#include "common/hopper.cuh"
#include "common/sample.h"

namespace fastinfer {

constexpr int kSampleThreads = 1024, kSampleWarps = kSampleThreads / 32;
constexpr int kMaxRanks = 8;                 // blocks of a portable cluster
constexpr int kBins = 2048;                  // of a histogram
constexpr int kListed = 2 * kSampleThreads;  // tokens that a block can sort
constexpr int kKeyLevels = 4, kLevels = 6;   // see SearchPath
constexpr int kCollections = 16;             // at most: one before the levels of a search and one a level, twice
constexpr uint32_t kNanKey = 0xFFFFFFFF;     // above all numbers
constexpr unsigned kAllLanes = 0xFFFFFFFF;

struct SampleArgs {
  const void* logits = nullptr;   // [B, V], rows at row_stride elements
  const bool* seen = nullptr;     // [B, V], or null where nothing is penalised
  const int64_t* seed = nullptr;  // [1]
  const int64_t* offset = nullptr;
  float* scores = nullptr;  // [B, ranks · part], or null where a part fits into shared memory
  int64_t* tokens = nullptr;
  int64_t row_stride = 0;
  int vocabulary = 0, ranks = 1, part = 0;
  int top_k = 0;  // 0: off
  float temperature = 1.f, penalty = 1.f, min_p = 0.f;
  double removed_share = 0.0;  // 1 − top_p; 0: off
};

// ---- blocks of a cluster ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void sync_row() {
#if __CUDA_ARCH__ >= 900
  cluster_sync();
#else
  __syncthreads();
#endif
}

// The same place in the shared memory of another block of the row.
template <typename T>
__device__ __forceinline__ T* at_rank(T* smem, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(smem, rank));
#else
  return smem;
#endif
}

struct Message {
  uint64_t first, second;
};

// What every block of a row tells all others; two of each, since a block may be one exchange ahead of another.
struct Inbox {
  Message from[2][kMaxRanks];
};

// A block's place in its row. All threads of the cluster call the same functions in the same order.
struct Place {
  int rank, ranks, turn = 0;

  // `message` is that of the one thread which `sends`. Returns the messages of all ranks; they hold until the exchange
  // after the next.
  __device__ const Message* exchange(Inbox& smem_inbox, bool sends, const Message& message) {
    turn ^= 1;
    if (sends) {
#pragma unroll 1
      for (int r = 0; r < ranks; ++r) at_rank(&smem_inbox, r)->from[turn][rank] = message;
    }
    __syncwarp();
    sync_row();
    return smem_inbox.from[turn];
  }
};

// ---- scores -------------------------------------------------------------------------------------------------------------

// Bits that order like the numbers; there is no −0 among the scores.
__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) return kNanKey;
  const uint32_t bits = __float_as_uint(score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

__device__ __forceinline__ float score_of(const SampleArgs& args, float logit, bool penalised) {
  float s = logit;
  if (penalised) s = s < 0.f ? __fmul_rn(s, args.penalty) : __fdiv_rn(s, args.penalty);
  if (args.temperature != 1.f) s = __fdiv_rn(s, args.temperature);
  return __fadd_rn(s, 0.f);  // −0 becomes 0: they are equal, their bits are not
}

// e^(score − highest) as fastinfer/ops/sample.py spells it out.
__device__ __forceinline__ float exponential(float score, float highest) {
  if (score == highest) return 1.f;  // infinite ones too
  const float d = fmaxf(__fsub_rn(score, highest), -kFarthest);
  const float n = rintf(__fmul_rn(d, 1.44269504f));
  const float r = __fadd_rn(__fsub_rn(d, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
  float e = __fadd_rn(__fmul_rn(r, 1.f / 5040), 1.f / 720);
  e = __fadd_rn(__fmul_rn(e, r), 1.f / 120);
  e = __fadd_rn(__fmul_rn(e, r), 1.f / 24);
  e = __fadd_rn(__fmul_rn(e, r), 1.f / 6);
  e = __fadd_rn(__fmul_rn(e, r), 0.5f);
  e = __fadd_rn(__fmul_rn(e, r), 1.f);
  e = __fadd_rn(__fmul_rn(e, r), 1.f);
  return __fmul_rn(e, __int_as_float((static_cast<int>(n) + 127) << 23));
}
__device__ __forceinline__ uint64_t weight_of(float e) { return static_cast<uint64_t>(__fmul_rn(e, kWeightOne)); }

// ---- the likeliest ------------------------------------------------------------------------------------------------------

// The highest key, and the first index that has it, or of the first pack of tokens that has it.
struct Best {
  uint32_t key, index;
};

__device__ __forceinline__ Best best_of_warp(const Best& best) {
  const uint32_t key = __reduce_max_sync(kAllLanes, best.key);
  return {key, __reduce_min_sync(kAllLanes, best.key == key ? best.index : ~0u)};
}

__device__ __forceinline__ Best best_of_block(Best best, Best (&smem_best)[kSampleWarps]) {
  best = best_of_warp(best);
  if (threadIdx.x % 32 == 0) smem_best[threadIdx.x / 32] = best;
  __syncthreads();
  return best_of_warp(smem_best[threadIdx.x % 32]);
}

// NaN where one of them is.
__device__ __forceinline__ float larger(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The tokens of a block: `count` of a row from `begin` on.
struct Part {
  int64_t row;
  int begin, count;
};

// The best of this thread's packs of kCount tokens; its index is that of a pack. All scores go to `scores` where there is
// that. kPlain: logits are scores.
template <typename T, int kCount, bool kPlain>
__device__ __forceinline__ Best best_pack(const SampleArgs& args, const Part& part, float* scores) {
  constexpr int kBatch = kCount == 1 ? 8 : kCount == 4 || kPlain ? 4 : 2;  // loads in flight
  const auto* gmem = reinterpret_cast<const Pack<T, kCount>*>(static_cast<const T*>(args.logits) +
                                                              part.row * args.row_stride + part.begin);
  using Marks = std::conditional_t<
      kCount == 8, uint64_t,
      std::conditional_t<kCount == 4, uint32_t, uint8_t>>;  // a byte a token; unpacked they would take registers
  const auto* gmem_seen = reinterpret_cast<const Marks*>(args.seen + part.row * args.vocabulary + part.begin);
  const int packs = part.count / kCount;
  Best best{0, threadIdx.x == 0 ? part.begin : ~0u};
  for (int first = threadIdx.x; first < packs; first += kBatch * kSampleThreads) {
    Pack<T, kCount> logits[kBatch];
    Marks seen[kBatch] = {};
#pragma unroll
    for (int p = 0; p < kBatch; ++p) {
      const int i = first + p * kSampleThreads;
      if (i < packs) logits[p] = gmem[i];
      if (!kPlain && i < packs && args.seen != nullptr) seen[p] = gmem_seen[i];
    }
#pragma unroll
    for (int p = 0; p < kBatch; ++p) {
      const int i = first + p * kSampleThreads;
      if (i >= packs) break;
      Pack<float, kCount> s;
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float logit = to_float(logits[p].v[j]);
        s.v[j] = kPlain ? __fadd_rn(logit, 0.f) : score_of(args, logit, (seen[p] >> 8 * j & 1) != 0);
        highest = larger(highest, s.v[j]);
      }
      const uint32_t key = key_of(highest);
      if (key > best.key) best = {key, static_cast<uint32_t>(part.begin + i * kCount)};
      if (scores != nullptr) reinterpret_cast<Pack<float, kCount>*>(scores)[i] = s;
    }
  }
  return best;
}

// The first index of the pack that starts at `index` whose token has the key.
template <typename T>
__device__ __forceinline__ uint32_t first_in_pack(const SampleArgs& args, int64_t row, Best best) {
  const T* logits = static_cast<const T*>(args.logits) + row * args.row_stride;
#pragma unroll 1
  for (uint32_t i = best.index; i < args.vocabulary; ++i) {
    const bool seen = args.seen != nullptr && args.seen[row * args.vocabulary + i];
    if (key_of(score_of(args, to_float(logits[i]), seen)) == best.key) return i;
  }
  return best.index;  // of a block without tokens
}

// The best of the row, an exchange. kMayBePlain: there is a faster way for logits that are scores, at more code.
template <typename T, int kCount, bool kMayBePlain>
__device__ __forceinline__ Best best_of_row(const SampleArgs& args, const Part& part, Place& place, Inbox& smem_inbox,
                                            Best (&smem_best)[kSampleWarps], float* scores) {
  const bool plain = kMayBePlain && args.seen == nullptr && args.temperature == 1.f;
  const Best mine =
      plain ? best_pack<T, kCount, true>(args, part, scores) : best_pack<T, kCount, false>(args, part, scores);
  Best best = best_of_block(mine, smem_best);
  const bool sends = mine.key == best.key && mine.index == best.index;
  if (sends) best.index = first_in_pack<T>(args, part.row, best);
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  cluster_wait();  // the other blocks have started
#endif
  const uint64_t packed = uint64_t{best.key} << 32 | static_cast<uint32_t>(~best.index);  // a lower index is better
  const Message* from = place.exchange(smem_inbox, sends, {packed, 0});
  uint64_t highest = 0;
  for (int r = 0; r < place.ranks; ++r) highest = max(highest, from[r].first);
  return {static_cast<uint32_t>(highest >> 32), ~static_cast<uint32_t>(highest)};
}

// ---- sums and sorting in a block ------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t scan_warp(uint64_t v) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t before = __shfl_up_sync(kAllLanes, v, distance);
    if (threadIdx.x % 32 >= distance) v += before;
  }
  return v;
}

// The sum over this thread and those before it; `total` becomes that over all.
__device__ __forceinline__ uint64_t scan_block(uint64_t v, uint64_t (&smem_sums)[kSampleWarps], uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = scan_warp(v);
  __syncthreads();  // the sums of a scan before have been read
  if (lane == 31) smem_sums[warp] = v;
  __syncthreads();
  const uint64_t sums = scan_warp(smem_sums[lane]);
  total = __shfl_sync(kAllLanes, sums, 31);
  const uint64_t before = __shfl_sync(kAllLanes, sums, warp == 0 ? 0 : warp - 1);
  return warp == 0 ? v : v + before;
}

// Bitonic, the highest first; `n` is a power of two up to kListed. Begins and ends with a barrier.
__device__ __forceinline__ void sort_block(uint64_t* smem_list, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
#pragma unroll 1
      for (int t = threadIdx.x; t < n / 2; t += kSampleThreads) {
        const int i = 2 * t - (t & (stride - 1));
        const uint64_t a = smem_list[i], b = smem_list[i + stride];
        if ((a < b) == ((i & size) == 0)) smem_list[i] = b, smem_list[i + stride] = a;
      }
    }
  }
  __syncthreads();
}

// ---- the sampler --------------------------------------------------------------------------------------------------------

// Sums of a count or of weights, in two words, since shared memory has no 64-bit addition.
struct Histogram {
  uint32_t low[kBins], high[kBins];

  __device__ __forceinline__ void add(uint32_t bin, uint64_t v) {
    const uint32_t v_low = static_cast<uint32_t>(v);
    const uint32_t sum = atomicAdd(&low[bin], v_low) + v_low;
    const uint32_t rest = static_cast<uint32_t>(v >> 32) + (sum < v_low ? 1 : 0);
    if (rest != 0) atomicAdd(&high[bin], rest);
  }
  __device__ __forceinline__ uint64_t sum(int bin) const { return uint64_t{high[bin]} << 32 | low[bin]; }
};

struct SampleSmem {
  Inbox inbox;
  Histogram histogram;
  union {
    uint64_t list[kListed];  // of rank 0: key << 32 | index
    uint64_t merged[kBins];  // this rank's bins, summed over all ranks
  };
  uint64_t sums[kSampleWarps];
  Best best[kSampleWarps];
  uint64_t found, padding;
  uint32_t listed[kCollections];  // of rank 0: how many tokens each call of collect found
};
static_assert(sizeof(SampleSmem) % 16 == 0, "scores follow it");

// What a search for a threshold has settled: one of kBins bins a level. Bins count downwards, from the highest score on.
// Level 0 is the distance from the highest score, 1/64 a bin, which tells apart what the float's first bits would not;
// 1 to 3 are digits of the key; 4 and 5 of the index: of equal scores those of higher index come first.
struct SearchPath {
  uint32_t distance = 0, key = 0, key_mask = 0, index = 0, index_mask = 0;

  __device__ static uint32_t distance_bin(float score, float highest) {
    return score == highest ? 0 : static_cast<uint32_t>(fminf(__fmul_rn(__fsub_rn(highest, score), 64.f), kBins - 1));
  }
  __device__ static int shift(int level) { return level == 1 ? 21 : level == 2 || level == 4 ? 10 : 0; }
  __device__ static uint32_t mask(int level) { return level == 1 || level == 2 ? 2047 : 1023; }

  // Whether the token is in the bins that levels below `level` have settled; `bin` becomes the one it has at `level`.
  __device__ bool contains(int level, float score, float highest, uint32_t i, uint32_t& bin) const {
    bin = distance_bin(score, highest);
    if (level == 0) return true;
    const uint32_t keys = ~key_of(score), indices = ~i;
    if (bin != distance || ((keys ^ key) & key_mask) != 0 || ((indices ^ index) & index_mask) != 0) return false;
    bin = (level < kKeyLevels ? keys : indices) >> shift(level) & mask(level);
    return true;
  }
  __device__ void settle(int level, uint32_t bin) {
    if (level == 0) {
      distance = bin;
    } else if (level < kKeyLevels) {
      key |= bin << shift(level), key_mask |= mask(level) << shift(level);
    } else {
      index |= bin << shift(level), index_mask |= mask(level) << shift(level);
    }
  }
};

// The tokens that are kept: higher scores, and equal ones from an index on.
struct Threshold {
  float score = -INFINITY;
  uint32_t index = 0;

  __device__ bool keeps(float s, uint32_t i) const { return s > score || (s == score && i >= index); }
};

// Draws a row's token. Every method is called by all threads of the row's blocks, but those that say rank 0.
struct RowSampler {
  const SampleArgs& args;
  SampleSmem& smem;
  Part part;
  Place place;
  const float* scores;  // of the part
  float highest;
  Threshold kept{};
  int collections = 0;

  __device__ float exponential_at(float score) const { return exponential(score, highest); }
  // The weight of a token that no cut has removed.
  __device__ uint64_t kept_weight(float score, uint32_t i) const {
    if (!kept.keeps(score, i)) return 0;
    const float e = exponential_at(score);
    return e < args.min_p ? 0 : weight_of(e);
  }
  __device__ uint64_t target_of(uint64_t total) const {
    return share_of(random_word(*args.seed, *args.offset, part.row), total);
  }

  // Calls f(score, index, whether there is such a token) for the part's tokens; all lanes of a warp together.
  template <typename F>
  __device__ void each_token(F&& f) const {
    const int rounded = (part.count + 31) / 32 * 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < rounded; i += kSampleThreads) {
      f(i < part.count ? scores[i] : 0.f, static_cast<uint32_t>(part.begin + i), i < part.count);
    }
  }

  // The bins of `level` for the tokens on `path`: how many, or the sums of their weights before min-p.
  __device__ void fill_histogram(bool weighted, const SearchPath& path, int level) {
#pragma unroll 1
    for (int bin = threadIdx.x; bin < kBins; bin += kSampleThreads) {
      smem.histogram.low[bin] = 0, smem.histogram.high[bin] = 0;
    }
    __syncthreads();
    each_token([&](float score, uint32_t i, bool there) {
      uint32_t bin;
      const bool counts = path.contains(level, score, highest, i, bin) && there && kept.keeps(score, i);
      if (!weighted) {
        if (counts) atomicAdd(&smem.histogram.low[bin], 1u);
        return;
      }
      const uint64_t weight = counts ? weight_of(exponential_at(score)) : 0;
      int same;
      __match_all_sync(kAllLanes, weight == 0 ? static_cast<uint32_t>(kBins) : bin, &same);
      if (same == 0) {
        if (weight != 0) smem.histogram.add(bin, weight);
        return;
      }
      const uint64_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(weight) & 0xFFFFFF);
      const uint64_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(weight >> 24));
      if (weight != 0 && threadIdx.x % 32 == 0) smem.histogram.add(bin, (high << 24) + low);
    });
  }

  // The first bin at which the sum over the bins of all ranks reaches `need`; `above` grows by the sum before it. At
  // level 0 of a search by weight, `need` follows from the total.
  __device__ uint32_t find_bin(bool share, uint64_t& need, uint64_t& above, uint64_t& total) {
    sync_row();  // all histograms are full
    const int bins = kBins / place.ranks, first = place.rank * bins, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int bin = threadIdx.x; bin < bins; bin += kSampleThreads) {
      uint64_t sum = 0;
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {  // all loads in flight
        if (r < place.ranks) sum += at_rank(&smem.histogram, r)->sum(first + bin);
      }
      smem.merged[bin] = sum;
    }
    __syncthreads();
    uint64_t lane_sum = 0;
    if (threadIdx.x < 32) {
      for (int j = 0; j < bins / 32; ++j) lane_sum += smem.merged[lane * (bins / 32) + j];
    }
    const uint64_t lane_end = scan_warp(lane_sum);
    const Message* sums = place.exchange(smem.inbox, threadIdx.x == 31, {lane_end, 0});
    if (share) {
      total = 0;
      for (int r = 0; r < place.ranks; ++r) total += sums[r].first;
      need = needed_of(total);
    }
    int owner = 0;
    bool finds = false;
    for (; owner < place.ranks - 1 && above + sums[owner].first < need; ++owner) above += sums[owner].first;
    if (place.rank == owner && threadIdx.x < 32) {
      const int lane_found = __ffs(__ballot_sync(kAllLanes, above + lane_end >= need)) - 1;
      finds = lane == lane_found;
    }
    Message found{};
    if (finds) {
      found = {above + lane_end - lane_sum, static_cast<uint64_t>(lane * (bins / 32))};
      while (found.first + smem.merged[found.second] < need) found.first += smem.merged[found.second++];
      found.second += first;
    }
    found = place.exchange(smem.inbox, finds, found)[owner];
    above = found.first;
    return static_cast<uint32_t>(found.second);
  }
  __device__ uint64_t needed_of(uint64_t total) const {
    const double removed = __dmul_rn(static_cast<double>(static_cast<int64_t>(total)), args.removed_share);
    return max(total - static_cast<uint64_t>(removed), uint64_t{1});
  }

  // Puts the tokens that `wanted(score, index)` says into rank 0's list, in any order, if they fit; returns how many.
  template <typename F>
  __device__ uint32_t collect(F&& wanted) {
    uint32_t* listed = at_rank(&smem.listed[collections++], 0);
    uint64_t* list = at_rank(smem.list, 0);
    uint32_t mine = 0;
    each_token([&](float score, uint32_t i, bool there) { mine += there && wanted(score, i); });
    const int lane = threadIdx.x % 32;
    const uint32_t end = static_cast<uint32_t>(scan_warp(mine)), in_warp = __shfl_sync(kAllLanes, end, 31);
    uint32_t slot = 0;
    if (lane == 0 && in_warp != 0) slot = atomicAdd(listed, in_warp);
    slot = __shfl_sync(kAllLanes, slot, 0) + end - mine;
    if (in_warp != 0 && slot + mine <= kListed) {
      each_token([&](float score, uint32_t i, bool there) {
        if (there && wanted(score, i)) list[slot++] = uint64_t{key_of(score)} << 32 | i;
      });
    }
    sync_row();
    return *listed;
  }

  // Rank 0: sorts the `n` tokens that are listed, the highest score first, and of equal ones the highest index. Returns
  // the length of the list with its padding of zeros.
  __device__ int sort_listed(int n) {
    int padded = 2;
    while (padded < n) padded *= 2;
    for (int i = n + threadIdx.x; i < padded; i += kSampleThreads) smem.list[i] = 0;
    sort_block(smem.list, padded);
    return padded;
  }
  __device__ uint64_t listed_weight(uint64_t item, float least) const {
    if (item == 0) return 0;
    const float e = exponential_at(score_of_key(static_cast<uint32_t>(item >> 32)));
    return e < least ? 0 : weight_of(e);
  }

  // Rank 0: draws from the list, which holds all that may be kept; `by_count`: the best top_k are still to be chosen.
  __device__ void draw_from_list(int n, bool by_count, uint64_t total) {
    const int padded = sort_listed(n), at = 2 * threadIdx.x;
    const bool mine = at < padded;
    uint64_t item[2] = {mine ? smem.list[at] : 0, mine ? smem.list[at + 1] : 0}, weight[2];
    const uint64_t lowest = by_count ? smem.list[args.top_k - 1] >> 32 : 0;  // ties stay
    for (int j = 0; j < 2; ++j) {
      if (item[j] >> 32 < lowest) item[j] = 0;
      weight[j] = listed_weight(item[j], 0.f);
    }
    if (args.removed_share > 0.0) {
      uint64_t sum;
      uint64_t before = scan_block(weight[0] + weight[1], smem.sums, sum) - weight[0] - weight[1];
      const uint64_t need = needed_of(by_count ? sum : total);
      for (int j = 0; j < 2; ++j) {
        if (before >= need) item[j] = 0;
        before += weight[j];
      }
    }
    __syncthreads();  // all have read the list
    for (int j = 0; j < 2; ++j) {
      const bool drawn = listed_weight(item[j], args.min_p) != 0;
      if (mine) smem.list[at + j] = drawn ? (~item[j] << 32 | item[j] >> 32) : 0;  // by index, the lowest first
    }
    sort_block(smem.list, padded);
    for (int j = 0; j < 2; ++j) {
      const uint64_t v = mine ? smem.list[at + j] : 0;
      item[j] = v << 32 | v >> 32;  // key and complement of the index
      weight[j] = listed_weight(v == 0 ? 0 : item[j], 0.f);
    }
    uint64_t sum;
    uint64_t before = scan_block(weight[0] + weight[1], smem.sums, sum) - weight[0] - weight[1];
    const uint64_t target = target_of(sum);
    for (int j = 0; j < 2; ++j) {
      if (before <= target && target < before + weight[j]) args.tokens[part.row] = ~static_cast<uint32_t>(item[j]);
      before += weight[j];
    }
  }

  // Rank 0: where in the list of `n` tokens the sum of counts or weights, over `above` before them, reaches `need`.
  __device__ void find_in_list(int n, bool weighted, uint64_t need, uint64_t above) {
    const int padded = sort_listed(n), at = 2 * threadIdx.x;
    if (!weighted) {  // ties stay
      if (threadIdx.x == 0) smem.found = smem.list[need - above - 1] >> 32 << 32;
      return;
    }
    const bool mine = at < padded;
    const uint64_t item[2] = {mine ? smem.list[at] : 0, mine ? smem.list[at + 1] : 0};
    const uint64_t weight[2] = {listed_weight(item[0], 0.f), listed_weight(item[1], 0.f)};
    uint64_t sum;
    uint64_t before = above + scan_block(weight[0] + weight[1], smem.sums, sum) - weight[0] - weight[1];
    for (int j = 0; j < 2; ++j) {
      if (before < need && need <= before + weight[j]) smem.found = item[j];
      before += weight[j];
    }
  }

  // Keeps the best top_k, or the share that top_p leaves. Returns whether the token is drawn already: from the list,
  // where all that may be kept fits into it.
  __device__ bool cut(bool weighted) {
    uint64_t need = weighted ? 0 : args.top_k, above = 0, total = 0;
    SearchPath path;
    for (int level = 0;; ++level) {
      fill_histogram(weighted, path, level);
      path.settle(level, find_bin(weighted && level == 0, need, above, total));
      if (level == 0) {
        const uint32_t n = collect([&](float score, uint32_t i) {
          return SearchPath::distance_bin(score, highest) <= path.distance && kept.keeps(score, i);
        });
        if (n <= kListed) {
          if (place.rank == 0) draw_from_list(n, !weighted, total);
          return true;
        }
      }
      if (level + 1 == (weighted ? kLevels : kKeyLevels)) {
        kept = {score_of_key(~path.key), weighted ? ~path.index & static_cast<uint32_t>(kMaxVocabulary - 1) : 0};
        return false;
      }
      const uint32_t n = collect([&](float score, uint32_t i) {
        uint32_t bin;
        return path.contains(kLevels, score, highest, i, bin) && kept.keeps(score, i);
      });
      if (n > kListed) continue;
      if (place.rank == 0) find_in_list(n, weighted, need, above);
      __syncthreads();
      const uint64_t item = place.exchange(smem.inbox, threadIdx.x == 0, {smem.found, 0})[0].first;
      kept = {score_of_key(static_cast<uint32_t>(item >> 32)), static_cast<uint32_t>(item)};
      return false;
    }
  }

  // Draws from the whole row. A warp has a contiguous piece of the part, so that sums go by index.
  __device__ void draw_from_row() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int piece = (part.count + kSampleThreads - 1) / kSampleThreads * 32;
    const int first = warp * piece, last = min(first + piece, part.count);
    const auto weight_at = [&](int i) { return i < last ? kept_weight(scores[i], part.begin + i) : 0; };
    uint64_t sum = 0, total;
#pragma unroll 1
    for (int i = first + lane; i < last; i += 32) sum += weight_at(i);
    const uint64_t end = scan_block(sum, smem.sums, total);
    const uint64_t warp_end = __shfl_sync(kAllLanes, end, 31);
    const Message* from = place.exchange(smem.inbox, threadIdx.x == 0, {total, 0});
    uint64_t of_row = 0, before = 0;
    for (int r = 0; r < place.ranks; ++r) {
      if (r == place.rank) before = of_row;
      of_row += from[r].first;
    }
    const uint64_t target = target_of(of_row), in_warp = scan_warp(sum);
    before += warp_end - __shfl_sync(kAllLanes, in_warp, 31);
    if (target < before || target >= before + __shfl_sync(kAllLanes, in_warp, 31)) return;
#pragma unroll 1
    for (int i = first; i < last; i += 32) {
      const uint64_t weight = weight_at(i + lane), upto = before + scan_warp(weight);
      if (target < upto && target >= upto - weight) args.tokens[part.row] = part.begin + i + lane;
      before = __shfl_sync(kAllLanes, upto, 31);
    }
  }
};

}  // namespace fastinfer
