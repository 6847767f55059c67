// decode_matmul: y[M, N] = x[M, K] · dequant(w)[N, K]ᵀ for M ≤ 16, every weight format in its tile layout
// Source    own design
// Layout    LAYOUTS.md#tile-w4a16, #tile-w8a16, #tile-w8a8
// Requires  sm90a; K % 128 == 0, N in whole tiles of 16 rows; 16-byte aligned operands
// Mapping   weights are wgmma's 64-row operand, made in registers; tokens are its 8 or 16 columns. A unit is 64 rows × 128 k.
//           The ranks of a cluster split K, the clusters share the blocks of 64 rows. In a CTA one warp copies chunks of units
//           into a ring, three warpgroups multiply every third unit each, and one warp finishes: it adds up the sums of the
//           outputs that its rank owns, which all warpgroups of the cluster have sent there, always in the same order.
//
//              K →      rank 0              rank 1            blocks: cluster c takes c, c + clusters, …
//                   ┌────┬────┬────┐   ┌────┬────┬────┐
//              N ↓  │ g0 │ g1 │ g2 │   │ g0 │ g1 │ g2 │       gi: units that warpgroup i multiplies
//                   └────┴────┴────┘   └────┴────┴────┘
//
//           The ring is filled before the previous kernel has finished (dependent launch): weights do not depend on it. A
//           CTA takes half of a multiprocessor, so that another one, of this kernel or the next, runs beside it.
// Bound     memory: weights + scales
// Verified  tests/test_int4_matmul.py, test_int8_matmul.py, test_int8_scaled_matmul.py
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/wgmma.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/tile_layout.cuh"

namespace fastinfer {

struct DecodeArgs {
  const void* x = nullptr;  // [M, K]
  int64_t x_stride = 0;     // bytes from row to row
  const unsigned char* w = nullptr;
  const void* w_scale = nullptr;
  const void* w_zero = nullptr;
  bool half_scales = false;  // fp16 scales and zero points, else bf16
  Epilogue epilogue;
  int m = 0, units = 0, row_tiles = 0;  // M; K / 128; N / 16
  int token_shift = 0;                  // log2 of the tokens that x has room for in shared memory: M rounded up
  bool dependent = false;               // launched before the previous kernel has finished
  int chunk_units = 0, stages = 0;      // units a stage, a multiple of the warpgroups; stages of the ring
  int smem_sums = 0, smem_parts = 0, smem_barriers = 0, smem_ring = 0;  // offsets
};

// ---- weight formats -------------------------------------------------------------------------------------------------
// A unit is two pieces of four mma steps (kSteps), made in turn: while the tensor cores work on one, the next is made. What
// they add up is a group at a time where groups have scales (`parts`, scaled by `add` when the unit is done), else everything.

// Where a lane finds its part of a unit. `weights` is in the first piece, the next one is `piece_step` bytes on; `scales` and `zeros` those
// of its row tile's first group, the next group's are `group_step` bytes on.
struct UnitAddress {
  uint32_t weights, piece_step, scales, zeros, group_step, x_sums;
  uint64_t x, x_step;  // descriptor of the first mma step's x, and what takes it to the next one's
};

template <typename T, int kGroup>  // scales and zero points fp16 or bf16
struct Int4Decode : Int4Tiles {
  using Element = T;
  using Accumulator = float;
  static constexpr int kXBytes = 2, kGroupK = kGroup, kUnitGroups = kUnit / kGroup, kSteps = 4, kWords = 4;
  static constexpr int kScaleBytes = 2 * kUnitGroups;  // of a row and a unit; zero points take as much again
  static constexpr bool kGrouped = true;

  static __device__ __forceinline__ void load(const UnitAddress& at, int piece, uint32_t (&words)[kWords]) {
    const uint4 v = load_smem16(at.weights + piece * at.piece_step);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  static __device__ __forceinline__ void make(const uint32_t (&words)[kWords], int step, uint32_t (&fragment)[4]) {
    int4x8_to_pairs<T>(words[step], fragment);
  }

  struct Scales {  // of rows g and g + 8, which the layout keeps side by side
    uint32_t scale[kUnitGroups], zero[kUnitGroups], x_sums;
    __device__ __forceinline__ void load(const UnitAddress& at) {
#pragma unroll
      for (int group = 0; group < kUnitGroups; ++group) {
        scale[group] = load_smem4(at.scales + group * at.group_step);
        zero[group] = load_smem4(at.zeros + group * at.group_step);
      }
      x_sums = at.x_sums;
    }
    static __device__ __forceinline__ float2 widen(uint32_t v, bool half) {
      if (half) return __half22float2(as_half2(v));
      return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
    }
    template <int kTokens>
    __device__ __forceinline__ void add(const DecodeArgs& args, const float (&parts)[kUnitGroups][kTokens / 2],
                                        float (&sums)[kTokens / 2]) const {
#pragma unroll
      for (int group = 0; group < kUnitGroups; ++group) {
        const float2 s = widen(scale[group], args.half_scales), z = widen(zero[group], args.half_scales);
        const float zero_low = z.x + kInt4Offset<T>, zero_high = z.y + kInt4Offset<T>;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float2 x_sum = load_smem_float2(x_sums + (group * kTokens + j * 8) * 4);
          const float* p = &parts[group][4 * j];
          sums[4 * j + 0] = fmaf(s.x, fmaf(-zero_low, x_sum.x, p[0]), sums[4 * j + 0]);
          sums[4 * j + 1] = fmaf(s.x, fmaf(-zero_low, x_sum.y, p[1]), sums[4 * j + 1]);
          sums[4 * j + 2] = fmaf(s.y, fmaf(-zero_high, x_sum.x, p[2]), sums[4 * j + 2]);
          sums[4 * j + 3] = fmaf(s.y, fmaf(-zero_high, x_sum.y, p[3]), sums[4 * j + 3]);
        }
      }
    }
  };
};

template <typename T>
struct Int8Decode : Int8Tiles {
  using Element = T;
  using Accumulator = float;
  static constexpr int kXBytes = 2, kGroupK = kUnit, kUnitGroups = 1, kSteps = 4, kWords = 8, kScaleBytes = 0;
  static constexpr bool kGrouped = false;

  static __device__ __forceinline__ void load(const UnitAddress& at, int piece, uint32_t (&words)[kWords]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = load_smem16(at.weights + piece * at.piece_step + half * 512);
      words[4 * half] = v.x, words[4 * half + 1] = v.y, words[4 * half + 2] = v.z, words[4 * half + 3] = v.w;
    }
  }
  static __device__ __forceinline__ void make(const uint32_t (&words)[kWords], int step, uint32_t (&fragment)[4]) {
    int8x4_to_interleaved_pairs<T>(words[2 * step], fragment[0], fragment[1]);
    int8x4_to_interleaved_pairs<T>(words[2 * step + 1], fragment[2], fragment[3]);
  }
};

struct Int8x8Decode : Int8x8Tiles {
  using Element = int8_t;
  using Accumulator = int32_t;
  static constexpr int kXBytes = 1, kGroupK = kUnit, kUnitGroups = 1, kSteps = 2, kWords = 8, kScaleBytes = 0;
  static constexpr bool kGrouped = false;

  static __device__ __forceinline__ void load(const UnitAddress& at, int piece, uint32_t (&words)[kWords]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint4 v = load_smem16(at.weights + (2 * piece + step) * 512);
      words[4 * step] = v.x, words[4 * step + 1] = v.y, words[4 * step + 2] = v.z, words[4 * step + 3] = v.w;
    }
  }
  static __device__ __forceinline__ void make(const uint32_t (&words)[kWords], int step, uint32_t (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = words[4 * step + i];
  }
};

// What a wgmma under way reads or writes must not be touched before it is waited for. These keep the compiler from moving
// what follows a wait before it.
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(v[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(int32_t (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(v[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

// A warpgroup's products, a unit after the other.
template <class Format, int kTokens>
struct UnitPipeline {
  using Accumulator = typename Format::Accumulator;
  static constexpr int kSteps = Format::kSteps, kStepK = 32 / Format::kXBytes;

  const DecodeArgs& args;
  Accumulator sums[kTokens / 2] = {};
  uint32_t fragments[2][kSteps][4];

  __device__ explicit UnitPipeline(const DecodeArgs& a) : args(a) {}

  template <bool kGroups, typename Parts>
  __device__ __forceinline__ void multiply(const UnitAddress& at, int piece, Parts& parts) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int s = piece * kSteps + step;
      if constexpr (kGroups) {
        const int group = s * kStepK / Format::kGroupK;
        wgmma<typename Format::Element, kTokens>(parts[group], fragments[piece][step], at.x + s * at.x_step,
                                                 s * kStepK % Format::kGroupK != 0);
      } else {
        wgmma<typename Format::Element, kTokens>(sums, fragments[piece][step], at.x + s * at.x_step, true);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void make(uint32_t (&words)[Format::kWords], int piece) {
    pin(words);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) Format::make(words, step, fragments[piece][step]);
  }
};

template <class Format, int kTokens, bool kGrouped = Format::kGrouped>
struct UnitMultiplier : UnitPipeline<Format, kTokens> {  // without scales
  using UnitPipeline<Format, kTokens>::UnitPipeline;
  __device__ __forceinline__ void unit(const UnitAddress& at) {
    uint32_t words[2][Format::kWords];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) Format::load(at, piece, words[piece]);
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      this->make(words[piece], piece);
      this->template multiply<false>(at, piece, this->sums);
    }
    wgmma_wait<0>();
    pin(this->sums);
  }
};

template <class Format, int kTokens>
struct UnitMultiplier<Format, kTokens, true> : UnitPipeline<Format, kTokens> {
  using UnitPipeline<Format, kTokens>::UnitPipeline;
  __device__ __forceinline__ void unit(const UnitAddress& at) {
    float parts[Format::kUnitGroups][kTokens / 2];
    uint32_t words[2][Format::kWords];
    typename Format::Scales scales;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) Format::load(at, piece, words[piece]);
    scales.load(at);
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      this->make(words[piece], piece);
      this->template multiply<true>(at, piece, parts);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int group = 0; group < Format::kUnitGroups; ++group) pin(parts[group]);
    scales.template add<kTokens>(this->args, parts, this->sums);
  }
};

// ---- kernel -------------------------------------------------------------------------------------------------------------

constexpr int kMaxStages = 16, kPartBuffers = 2;

constexpr int log2_of(int v) { return v == 1 ? 0 : 1 + log2_of(v / 2); }

template <class Format, typename Y, int kTokens>
struct DecodeMatmul {
  using Accumulator = typename Format::Accumulator;
  // Warpgroups that multiply: as many as registers allow with two CTAs a multiprocessor.
  static constexpr int kGroups = Format::kUnitGroups * kTokens > 16 ? 2 : 3;
  static constexpr int kMultiplyThreads = 128 * kGroups, kMultiplyBarrier = 1, kXBarrier = 2;
  static constexpr int kThreads = kMultiplyThreads + 64;  // and a warp that copies, and one that finishes
  static constexpr int kRowBytes = 128 * Format::kXBytes;  // of x, a unit
  // The outputs of a block are kSlots times 16 bytes: [row tile 4][eight tokens][lane]. A rank owns as many as any other.
  static constexpr int kSlots = 128 * (kTokens / 8), kSlotShift = log2_of(kSlots);
  static constexpr int kPartBytes = kGroups * kSlots * 16;  // what a rank is sent for a block, whatever the ranks
  static_assert(sizeof(Accumulator) == 4);

  static __host__ __device__ int unit_bytes() { return kBlockTiles * Format::kUnitBytes + kBlockRows * 2 * Format::kScaleBytes; }

  // What a CTA works on: row blocks first, first + step, … and units [begin, end) of K.
  struct Work {
    int ranks, rank, first, step, blocks, begin, end;
    int own_shift;  // log2 of the slots that each rank owns
    __device__ explicit Work(const DecodeArgs& args) {
      ranks = cluster_size(), rank = cluster_rank();
      const int rank_shift = __ffs(ranks) - 1;
      own_shift = kSlotShift - rank_shift;
      first = blockIdx.x >> rank_shift, step = gridDim.x >> rank_shift;
      blocks = (row_blocks_of(args.row_tiles) - first + step - 1) / step;
      begin = args.units * rank >> rank_shift, end = args.units * (rank + 1) >> rank_shift;
    }
    __device__ __forceinline__ int block(int i) const { return first + i * step; }
  };

  // Barriers, and where they are. `done`: a buffer of parts is complete; `free`: all ranks' owners have read it.
  struct Barriers {
    uint32_t full, empty, done, free;
    __device__ Barriers(const DecodeArgs& args, uint32_t base) {
      full = base + args.smem_barriers, empty = full + kMaxStages * 8;
      done = empty + kMaxStages * 8, free = done + kPartBuffers * 8;
    }
  };

  // Until the barriers of the other ranks are there.
  static __device__ __forceinline__ void wait_for_ranks(const Work& work) {
    if (work.ranks > 1) cluster_wait();
  }

  static __device__ void produce(const DecodeArgs& args, const Work& work, uint32_t ring, const Barriers& barriers) {
    RingPosition at;
    bool first_round = true;
    const int chunk = args.chunk_units, stage_bytes = chunk * unit_bytes();
    for (int i = 0; i < work.blocks; ++i) {
      const int block = work.block(i), tiles = tiles_of_block(args.row_tiles, block);
      for (int unit = work.begin; unit < work.end; unit += chunk) {
        const int count = min(chunk, work.end - unit);
        const int weight_bytes = count * tiles * Format::kUnitBytes, scale_bytes = count * tiles * 16 * Format::kScaleBytes;
        const uint32_t to = ring + at.stage * stage_bytes, full = barriers.full + at.stage * 8;
        if (!first_round) mbarrier_wait(barriers.empty + at.stage * 8, at.parity ^ 1);
        mbarrier_arrive_expect(full, weight_bytes + 2 * scale_bytes);
        // Units before this one: those of whole blocks of 64 rows, then those of this block.
        const int64_t before = int64_t(block) * args.units * kBlockTiles + int64_t(unit) * tiles;  // in row tiles
        bulk_copy_stream(to, args.w + before * Format::kUnitBytes, weight_bytes, full);
        if constexpr (Format::kGrouped) {
          const int64_t offset = before * 16 * Format::kScaleBytes;
          const uint32_t scales = to + chunk * kBlockTiles * Format::kUnitBytes;
          bulk_copy_stream(scales, static_cast<const char*>(args.w_scale) + offset, scale_bytes, full);
          bulk_copy_stream(scales + chunk * kBlockRows * Format::kScaleBytes,
                           static_cast<const char*>(args.w_zero) + offset, scale_bytes, full);
        }
        at.advance(args.stages);
        if (at.stage == 0) first_round = false;
      }
    }
  }

  // The rank's slice of x to shared memory, [16 bytes of k][token]; tokens past M are zero. `tokens` lanes take a token each of
  // the same 16 bytes, so that neither global reads nor shared stores are scattered.
  static __device__ void load_x(const DecodeArgs& args, const Work& work, uint32_t smem_x, int warp, int lane) {
    const int pieces = (work.end - work.begin) * kRowBytes / 16;
    const int shift = min(args.token_shift, 3), eights = 1 << (args.token_shift - shift);
    const int token = lane & ((1 << shift) - 1), piece = lane >> shift, step = 32 >> shift;
    const char* gmem = static_cast<const char*>(args.x) + int64_t(work.begin) * kRowBytes;
#pragma unroll 4
    for (int i = warp * step + piece; i < pieces; i += kMultiplyThreads / 32 * step) {
      for (int eight = 0; eight < eights; ++eight) {
        const int at = eight * 8 + token;
        copy16_cached(smem_x + ((i << args.token_shift) + at) * 16,
                      gmem + min(at, args.m - 1) * args.x_stride + i * 16, at < args.m ? 16 : 0);
      }
    }
    copy_commit();
    if (!args.dependent) barrier_arrive(kXBarrier, kMultiplyThreads + 32);
    copy_wait(0);
    async_proxy_fence();
    barrier(kMultiplyBarrier, kMultiplyThreads);
    if (threadIdx.x == 0) let_next_kernel_start();  // no sooner: what it copies would delay x
  }

  // Σ x over each group and token, to [group][kTokens].
  static __device__ void sum_x(const DecodeArgs& args, const Work& work, uint32_t smem_x, uint32_t smem_sums, int warp,
                               int lane) {
    if constexpr (Format::kGrouped) {
      using T = typename Format::Element;
      constexpr int kGroupPieces = Format::kGroupK / 8, kGroupShift = log2_of(kGroupPieces);
      const int groups = (work.end - work.begin) * Format::kUnitGroups;
      const int shift = min(args.token_shift, 3), eight_shift = args.token_shift - shift;
      const int width_shift = min(5 - shift, kGroupShift), together_shift = 5 - shift - width_shift;
      const int token = lane & ((1 << shift) - 1), piece = lane >> shift;  // `width` lanes take the pieces of a group
      const int tasks = (groups + (1 << together_shift) - 1) >> together_shift << eight_shift;
      for (int task = warp; task < tasks; task += kMultiplyThreads / 32) {
        const int at = (task & ((1 << eight_shift) - 1)) * 8 + token;
        const int group = (task >> eight_shift << together_shift) + (piece >> width_shift);
        const uint32_t from = smem_x + ((min(group, groups - 1) * kGroupPieces << args.token_shift) + at) * 16;
        float sum[2] = {};
        for (int i = piece & ((1 << width_shift) - 1); i < kGroupPieces; i += 1 << width_shift) {
          const uint4 v = load_smem16(from + (i << args.token_shift) * 16);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[j % 2] += to_float(reinterpret_cast<const T*>(&v)[j]);
        }
        sum[0] += sum[1];
        for (int i = 0; i < width_shift; ++i) sum[0] += __shfl_xor_sync(~0u, sum[0], 1 << i << shift);
        if ((piece & ((1 << width_shift) - 1)) == 0 && group < groups) {
          store_smem_float(smem_sums + (group * kTokens + at) * 4, sum[0]);
        }
      }
      barrier(kMultiplyBarrier, kMultiplyThreads);
    }
  }

  static __device__ void multiply(const DecodeArgs& args, const Work& work, uint32_t base, const Barriers& barriers) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // so that the compiler sees that descriptors are uniform
    load_x(args, work, base, threadIdx.x / 32, lane);
    sum_x(args, work, base, base + args.smem_sums, threadIdx.x / 32, lane);
    const uint64_t x_descriptor = core_matrix_descriptor(base, 16 << args.token_shift, 128);
    const uint64_t x_step = (32 << args.token_shift) >> 4;  // an mma step takes 32 bytes of k
    const int stage_bytes = args.chunk_units * unit_bytes();
    const uint32_t ring = base + args.smem_ring;
    RingPosition at;
    for (int i = 0; i < work.blocks; ++i) {
      const int tiles = tiles_of_block(args.row_tiles, work.block(i)), tile = min(warp, tiles - 1);
      UnitMultiplier<Format, kTokens> multiplier(args);
      for (int unit = work.begin; unit < work.end; unit += args.chunk_units) {
        const int count = min(args.chunk_units, work.end - unit);
        const uint32_t stage = ring + at.stage * stage_bytes;
        const uint32_t scales = stage + args.chunk_units * kBlockTiles * Format::kUnitBytes;
        mbarrier_wait(barriers.full + at.stage * 8, at.parity);
        const int first_group = group * Format::kUnitGroups;
        UnitAddress address;
        address.weights = stage + (group * tiles * Format::kPieces + tile) * Format::kTileBytes + lane * 16;
        address.piece_step = tiles * Format::kTileBytes;
        address.scales = scales + (first_group * tiles + tile) * 32 + lane / 4 * 4;
        address.zeros = address.scales + args.chunk_units * kBlockRows * Format::kScaleBytes;
        address.group_step = tiles * 32;
        address.x = x_descriptor + (unit - work.begin + group) * (kRowBytes / 32) * x_step;
        address.x_step = x_step;
        address.x_sums = base + args.smem_sums + lane % 4 * 8 +
                         ((unit - work.begin) * Format::kUnitGroups + first_group) * kTokens * 4;
        for (int u = group; u < count; u += kGroups) {
          multiplier.unit(address);
          address.weights += kGroups * tiles * Format::kUnitBytes;
          address.scales += kGroups * tiles * Format::kUnitGroups * 32;
          address.zeros += kGroups * tiles * Format::kUnitGroups * 32;
          address.x += kGroups * (kRowBytes / 32) * x_step;
          address.x_sums += kGroups * Format::kUnitGroups * kTokens * 4;
        }
        __syncwarp();
        if (threadIdx.x % 128 == 0) mbarrier_arrive(barriers.empty + at.stage * 8);
        at.advance(args.stages);
      }
      if (i == 0) wait_for_ranks(work);
      send(work, base + args.smem_parts, barriers, i, group, warp, lane, multiplier.sums);
    }
    if (work.blocks <= 0) wait_for_ranks(work);
  }

  // A warpgroup's sums to the ranks that own them.
  static __device__ __forceinline__ void send(const Work& work, uint32_t parts, const Barriers& barriers, int i, int group,
                                              int warp, int lane, const Accumulator (&sums)[kTokens / 2]) {
    const int buffer = i % kPartBuffers, source = work.rank * kGroups + group;
    if (i >= kPartBuffers) mbarrier_wait(barriers.free + buffer * 8, (i / kPartBuffers - 1) & 1);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const int slot = (warp * (kTokens / 8) + j) * 32 + lane, owner = slot >> work.own_shift;
      const int at = (source << work.own_shift) + (slot & ((1 << work.own_shift) - 1));
      const uint32_t to = parts + buffer * kPartBytes + at * 16;
      store_cluster16_async(map_to_rank(to, owner), *reinterpret_cast<const uint4*>(&sums[4 * j]),
                            map_to_rank(barriers.done + buffer * 8, owner));
    }
  }

  static __device__ void finish(const DecodeArgs& args, const Work& work, uint32_t parts, const Barriers& barriers, int lane) {
    wait_for_ranks(work);
    for (int i = 0; i < work.blocks; ++i) {
      const int buffer = i % kPartBuffers, source_bytes = 16 << work.own_shift;
      mbarrier_wait(barriers.done + buffer * 8, i / kPartBuffers & 1);
      for (int mine = lane; mine < 1 << work.own_shift; mine += 32) {
        uint32_t from = parts + buffer * kPartBytes + mine * 16;
        Accumulator sum[4] = {};
        for (int rank = 0; rank < work.ranks; ++rank) {
          uint4 v[kGroups];
#pragma unroll
          for (int group = 0; group < kGroups; ++group, from += source_bytes) v[group] = load_smem16(from);
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[c] += reinterpret_cast<const Accumulator*>(&v[group])[c];
          }
        }
        const int slot = (work.rank << work.own_shift) + mine, tile = slot >> (kSlotShift - 2);
        const int row = work.block(i) * kBlockRows + tile * 16 + slot % 32 / 4;
        store(args, slot / 32 % (kTokens / 8) * 8 + slot % 4 * 2, row, sum);
      }
      __syncwarp();
      if (i + kPartBuffers < work.blocks) {
        if (lane == 0) mbarrier_arrive_expect(barriers.done + buffer * 8, kPartBytes);
        __syncwarp();
        if (lane < work.ranks) mbarrier_arrive_at(barriers.free + buffer * 8, lane);
      }
    }
  }

  // Sums of rows `row` and row + 8 for tokens `token` and token + 1, as Epilogue::store_pair.
  static __device__ __forceinline__ void store(const DecodeArgs& args, int token, int row, const Accumulator (&sum)[4]) {
    const Epilogue& epilogue = args.epilogue;
    if (row >= epilogue.n) return;
    const RowTerms terms(epilogue, row);
    const bool gated = epilogue.gate != Gate::kNone;
    const int column = gated ? row / 16 * 8 + row % 8 : row;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token + i >= args.m) return;
      const int64_t at = int64_t(token + i) * epilogue.y_stride + column;
      float v = terms.value(epilogue, token + i, 0, sum[i]), u = terms.value(epilogue, token + i, 1, sum[i + 2]);
      if (gated) v = gate_value(epilogue.gate, v) * u;
      put(epilogue, at, v);
      if (!gated) put(epilogue, at + 8, u);
    }
  }
  static __device__ __forceinline__ void put(const Epilogue& epilogue, int64_t at, float v) {
    if (epilogue.residual != nullptr) v += to_float(static_cast<const Y*>(epilogue.residual)[at]);
    static_cast<Y*>(epilogue.y)[at] = from_float<Y>(v);
  }

  static __device__ void run(const DecodeArgs& args) {
    extern __shared__ __align__(128) unsigned char smem[];
    const uint32_t base = smem_address(smem);
    const Barriers barriers(args, base);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Work work(args);
    if (threadIdx.x == 0) {
      for (int s = 0; s < args.stages; ++s) {
        mbarrier_init(barriers.full + s * 8, 1);
        mbarrier_init(barriers.empty + s * 8, kGroups);
      }
      for (int b = 0; b < kPartBuffers; ++b) {
        mbarrier_init(barriers.done + b * 8, 1);
        mbarrier_init(barriers.free + b * 8, work.ranks);
      }
      mbarrier_init_fence();
      for (int b = 0; b < kPartBuffers; ++b) {
        if (b < work.blocks) mbarrier_arrive_expect(barriers.done + b * 8, kPartBytes);
      }
    }
    __syncthreads();
    if (work.ranks > 1) cluster_arrive();
    if (warp == kMultiplyThreads / 32) {
      // Where nothing is to be waited for, x comes first: it would queue behind the weights.
      if (!args.dependent) barrier(kXBarrier, kMultiplyThreads + 32);
      if (lane == 0) produce(args, work, base + args.smem_ring, barriers);
      __syncwarp();
      wait_for_ranks(work);
    } else {
      wait_for_previous_kernel();
      warp < kMultiplyThreads / 32 ? multiply(args, work, base, barriers)
                                   : finish(args, work, base + args.smem_parts, barriers, lane);
    }
  }
};

template <class Format, typename Y, int kTokens>
__global__ void __launch_bounds__(DecodeMatmul<Format, Y, kTokens>::kThreads, 2) decode_matmul_kernel(const __grid_constant__ DecodeArgs args) {
#ifdef FASTINFER_SM90A
  DecodeMatmul<Format, Y, kTokens>::run(args);
#else
  __trap();  // rather than leave y as it was
#endif
}

// ---- launch -------------------------------------------------------------------------------------------------------------

struct DecodePlan {
  int ranks = 1;           // CTAs of a cluster, which split K
  int smem_bytes = 0;      // at most this much a CTA
  int chunk_units = 1;     // units a stage for each warpgroup
  int resident = 2;        // CTAs a multiprocessor that are launched at most
  bool dependent = false;  // start before the previous kernel has finished
};

// False where x does not fit the shared memory that the plan allows.
template <class Format, typename Y, int kTokens>
bool launch_decode(const char* op, DecodeArgs args, const DecodePlan& plan, const LaunchContext& context) {
  using Kernel = DecodeMatmul<Format, Y, kTokens>;
  const int slice = (args.units + plan.ranks - 1) / plan.ranks;
  args.dependent = plan.dependent;
  args.token_shift = args.m > 8 ? 4 : args.m > 4 ? 3 : args.m > 2 ? 2 : args.m - 1;
  args.smem_sums = (slice * Kernel::kRowBytes << args.token_shift) + 128;  // a core matrix reads eight tokens, there or not
  args.smem_parts = args.smem_sums + (Format::kGrouped ? slice * Format::kUnitGroups * kTokens * 4 : 0);
  args.smem_barriers = args.smem_parts + kPartBuffers * Kernel::kPartBytes;
  args.smem_ring = (args.smem_barriers + 2 * (kMaxStages + kPartBuffers) * 8 + 127) / 128 * 128;
  const int ring = plan.smem_bytes - args.smem_ring;
  args.chunk_units = plan.chunk_units * Kernel::kGroups;
  while (args.chunk_units > Kernel::kGroups && ring / (args.chunk_units * Kernel::unit_bytes()) < 3) {
    args.chunk_units -= Kernel::kGroups;
  }
  args.stages = std::min(std::max(0, ring) / (args.chunk_units * Kernel::unit_bytes()), kMaxStages);
  if (args.stages < 2) return false;
  const int smem_bytes = args.smem_ring + args.stages * args.chunk_units * Kernel::unit_bytes();
  const auto kernel = decode_matmul_kernel<Format, Y, kTokens>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.limits().smem_per_block));
  const int resident =
      resident_clusters(kernel, Kernel::kThreads, plan.ranks, smem_bytes, plan.resident, context);
  const int clusters = std::min(row_blocks_of(args.row_tiles), resident);
  launch_clusters(op, kernel, int64_t(clusters) * plan.ranks, Kernel::kThreads, plan.ranks, smem_bytes, plan.dependent,
                  args, context);
  return true;
}

}  // namespace fastinfer
