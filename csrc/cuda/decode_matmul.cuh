// decode_matmul: y[M, N] = x[M, K] · dequant(w)[N, K]ᵀ for M ≤ 16, every weight format in its tile layout
// Source    own design
// Layout    LAYOUTS.md#tile-w4a16, #tile-w8a16, #tile-w8a8
// Requires  sm90; K % 128 == 0, N in whole tiles of 16 rows; 16-byte aligned operands
// Mapping   weights are the mma's 16-row operand, tokens its columns. x stays in shared memory; weights stream through it
//           once. A unit is 16 rows × 128 k. The ranks of a cluster split K. One warp of a CTA copies chunks of the rank's
//           slice into a ring, kWarps warps share the units of a chunk, and one warp adds up what they leave in slots when
//           a set of row tiles is done, always in the same order; the ranks' sums are added likewise at the end:
//
//              K →      rank 0              rank 1            sets: cluster c takes c, c + clusters, …
//                   ┌────┬────┬────┐   ┌────┬────┬────┐
//              N ↓  │ w0 │ w1 │ …  │   │ w0 │ w1 │ …  │       wi: units of a chunk that warp i multiplies
//                   └────┴────┴────┘   └────┴────┴────┘
//
//           The ring is filled before the previous kernel has finished (dependent launch): weights do not depend on it.
// Bound     memory: weights + scales
// Verified  tests/test_int4_matmul.py, test_int8_matmul.py, test_int8_scaled_matmul.py
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/hopper.cuh"
#include "cuda/epilogue.cuh"

namespace fastinfer {

constexpr int kUnit = 128;  // k of a unit

struct DecodeArgs {
  const void* x = nullptr;  // [M, K]
  int64_t x_stride = 0;     // bytes from row to row
  const unsigned char* w = nullptr;
  const void* w_scale = nullptr;
  const void* w_zero = nullptr;
  bool half_scales = false;  // fp16 scales and zero points, else bf16
  Epilogue epilogue;
  int m = 0, units = 0, groups = 0;  // M; K / 128; K / G
  int sets = 0;                      // of kTiles row tiles each
  int last_tile = 0;
  int chunk_units = 0, stages = 0;  // units a stage, stages of the ring
  int x_pitch = 0;                  // bytes from token to token in shared memory
  int smem_sums = 0, smem_slots = 0, smem_kept = 0, smem_barriers = 0, smem_ring = 0;  // offsets
};

// ---- weight formats: what a unit is in memory and how it is multiplied ----------------------------------------------

// x fragments of two mma steps for one tile of eight tokens.
struct TokenTile {
  uint32_t address;  // of this lane's ldmatrix row at k = 0
  __device__ __forceinline__ void load(uint32_t (&b)[4], int k_bytes) const { load_matrices(b, address + k_bytes); }
};

template <typename T, int kGroup>  // scales and zero points fp16 or bf16
struct Int4Decode {
  using Accumulator = float;
  static constexpr int kSteps = kGroup / 16;  // of the mma, a group
  static constexpr int kXBytes = 2, kWeightBytes = 1024, kGroups = 8 / kSteps;
  static constexpr int kScaleBytes = kGroups * 16 * 2;  // of a unit; zero points take as much again
  static constexpr int kUnitBytes = kWeightBytes + 2 * kScaleBytes;
  static constexpr bool kNeedsXSums = true;
  static constexpr int kGroupSteps = kSteps;
  using Element = T;

  static __device__ __forceinline__ void copy(const DecodeArgs& args, uint32_t smem, int tile, int unit, int count,
                                              uint32_t barrier, int lane) {
    if (lane != 0) return;
    const int chunk = args.chunk_units;
    const int64_t first = int64_t(tile) * args.units + unit;
    bulk_copy_stream(smem, args.w + first * kWeightBytes, count * kWeightBytes, barrier);
    bulk_copy_stream(smem + chunk * kWeightBytes, static_cast<const char*>(args.w_scale) + first * kScaleBytes,
                     count * kScaleBytes, barrier);
    bulk_copy_stream(smem + chunk * (kWeightBytes + kScaleBytes),
                     static_cast<const char*>(args.w_zero) + first * kScaleBytes, count * kScaleBytes, barrier);
  }

  // Scales of rows g and g + 8, which the layout keeps side by side.
  static __device__ __forceinline__ float2 load_pair(uint32_t address, bool half) {
    const uint32_t v = load_smem4(address);
    if (half) return __half22float2(as_half2(v));
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
  }

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs& args, uint32_t stage, int tile_bytes, int chunk,
                                                  int unit, const TokenTile (&x)[kTokenTiles], int k_bytes,
                                                  uint32_t x_sums, int lane, float (&sums)[kTiles][kTokenTiles][4]) {
    constexpr int kChains = kTiles * kTokenTiles == 1 ? 2 : 1;  // independent mma chains hide the latency
    float part[kChains][kTiles][kTokenTiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[kTiles][4];
#pragma unroll
      for (int a = 0; a < kTiles; ++a) {
        const uint4 v = load_smem16(stage + a * tile_bytes + unit * kWeightBytes + half * 512 + lane * 16);
        words[a][0] = v.x, words[a][1] = v.y, words[a][2] = v.z, words[a][3] = v.w;
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[kTokenTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) x[tile].load(b[tile], k_bytes + (2 * half + pair) * 64);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int s = (2 * half + pair) * 2 + step;
          if (s % kSteps == 0) {
#pragma unroll
            for (int i = 0; i < kChains * kTiles * kTokenTiles * 4; ++i) (&part[0][0][0][0])[i] = 0.f;
          }
#pragma unroll
          for (int a = 0; a < kTiles; ++a) {
            uint32_t fragment[4];
            int4x8_to_pairs<T>(words[a][2 * pair + step], fragment);
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
              mma_m16n8k16<T>(part[step % kChains][a][tile], fragment, b[tile][2 * step], b[tile][2 * step + 1]);
            }
          }
          if (s % kSteps == kSteps - 1) {
            const int group = s / kSteps;
            const uint32_t scales = stage + chunk * kWeightBytes + unit * kScaleBytes + (group * 16 + lane / 4 * 2) * 2;
#pragma unroll
            for (int a = 0; a < kTiles; ++a) {
              const float2 scale = load_pair(scales + a * tile_bytes, args.half_scales);
              const float2 zero = load_pair(scales + a * tile_bytes + chunk * kScaleBytes, args.half_scales);
#pragma unroll
              for (int tile = 0; tile < kTokenTiles; ++tile) {
                const float2 x_sum = load_smem_float2(x_sums + (group * kTokenTiles + tile) * 32 + lane % 4 * 8);
                float p[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  p[i] = part[0][a][tile][i];
                  if constexpr (kChains == 2) p[i] += part[1][a][tile][i];
                }
                float (&sum)[4] = sums[a][tile];
                const float zero_low = zero.x + kInt4Offset<T>, zero_high = zero.y + kInt4Offset<T>;
                sum[0] = fmaf(scale.x, fmaf(-zero_low, x_sum.x, p[0]), sum[0]);
                sum[1] = fmaf(scale.x, fmaf(-zero_low, x_sum.y, p[1]), sum[1]);
                sum[2] = fmaf(scale.y, fmaf(-zero_high, x_sum.x, p[2]), sum[2]);
                sum[3] = fmaf(scale.y, fmaf(-zero_high, x_sum.y, p[3]), sum[3]);
              }
            }
          }
        }
      }
    }
  }
};

struct Int8Units {  // what int8 weights are in memory, whatever they are multiplied by
  static constexpr int kWeightBytes = 2048, kUnitBytes = kWeightBytes;
  static constexpr bool kNeedsXSums = false;
  static constexpr int kGroupSteps = 8;

  static __device__ __forceinline__ void copy(const DecodeArgs& args, uint32_t smem, int tile, int unit, int count,
                                              uint32_t barrier, int lane) {
    if (lane != 0) return;
    bulk_copy_stream(smem, args.w + (int64_t(tile) * args.units + unit) * kWeightBytes, count * kWeightBytes, barrier);
  }
};

template <typename T>
struct Int8Decode : Int8Units {
  using Accumulator = float;
  static constexpr int kXBytes = 2;
  using Element = T;

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs& args, uint32_t stage, int tile_bytes, int, int unit,
                                                  const TokenTile (&x)[kTokenTiles], int k_bytes, uint32_t, int lane,
                                                  float (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) x[tile].load(b[tile], k_bytes + block * 64);
#pragma unroll
      for (int a = 0; a < kTiles; ++a) {
        const uint4 v = load_smem16(stage + a * tile_bytes + unit * kWeightBytes + block * 512 + lane * 16);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t fragment[4];
          int8x4_to_interleaved_pairs<T>(words[2 * step], fragment[0], fragment[1]);
          int8x4_to_interleaved_pairs<T>(words[2 * step + 1], fragment[2], fragment[3]);
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            mma_m16n8k16<T>(sums[a][tile], fragment, b[tile][2 * step], b[tile][2 * step + 1]);
          }
        }
      }
    }
  }
};

struct Int8x8Decode : Int8Units {
  using Accumulator = int32_t;
  static constexpr int kXBytes = 1;
  using Element = int8_t;

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs& args, uint32_t stage, int tile_bytes, int, int unit,
                                                  const TokenTile (&x)[kTokenTiles], int k_bytes, uint32_t, int lane,
                                                  int32_t (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[kTokenTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) x[tile].load(b[tile], k_bytes + pair * 64);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          const uint4 v =
              load_smem16(stage + a * tile_bytes + unit * kWeightBytes + (2 * pair + step) * 512 + lane * 16);
          const uint32_t fragment[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            mma_m16n8k32_int8(sums[a][tile], fragment, b[tile][2 * step], b[tile][2 * step + 1]);
          }
        }
      }
    }
  }
};

// Shared memory of a stage for one row tile.
template <class Format>
constexpr int tile_bytes_of(int chunk_units) {
  return chunk_units * Format::kUnitBytes;
}

// ---- kernel -------------------------------------------------------------------------------------------------------------

constexpr int kSlotBuffers = 2, kMaxStages = 16;

template <class Format, int kTiles, int kTokenTiles, int kWarps>
struct DecodeMatmul {
  using Accumulator = typename Format::Accumulator;
  static constexpr int kMultiplyThreads = 32 * kWarps, kMultiplyBarrier = 1;
  static constexpr int kThreads = kMultiplyThreads + 64;  // and a warp that copies, and one that adds up
  static constexpr int kGroupsPerUnit = 8 / Format::kGroupSteps;
  static constexpr int kSlotBytes = kTiles * kTokenTiles * 512;  // one warp's sums of a set
  static_assert(sizeof(Accumulator) == 4);

  // What a CTA works on: row-tile sets first, first + step, … and units [begin, end) of K.
  struct Work {
    int ranks, rank, first, step, sets, begin, end, tile_bytes;
    __device__ explicit Work(const DecodeArgs& args) {
      ranks = cluster_size(), rank = cluster_rank();
      first = blockIdx.x / ranks, step = gridDim.x / ranks;
      sets = (args.sets - first + step - 1) / step;
      begin = args.units * rank / ranks, end = args.units * (rank + 1) / ranks;
      tile_bytes = tile_bytes_of<Format>(args.chunk_units);
    }
  };

  static __device__ void produce(const DecodeArgs& args, const Work& work, uint32_t ring, uint32_t full, uint32_t empty,
                                 int lane) {
    RingPosition at;
    bool first_round = true;
    for (int set = 0; set < work.sets; ++set) {
      const int first_tile = (work.first + set * work.step) * kTiles;
      for (int unit = work.begin; unit < work.end; unit += args.chunk_units) {
        const int count = min(args.chunk_units, work.end - unit);
        if (!first_round) mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
        if (lane == 0) mbarrier_arrive_expect(full + at.stage * 8, kTiles * count * Format::kUnitBytes);
        __syncwarp();
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          Format::copy(args, ring + (at.stage * kTiles + a) * work.tile_bytes, min(first_tile + a, args.last_tile),
                       unit, count, full + at.stage * 8, lane);
        }
        at.advance(args.stages);
        if (at.stage == 0) first_round = false;
      }
    }
  }

  // All warps that multiply bring in the rank's slice of x. Through the ring's copy engine it would queue behind weights.
  static __device__ void load_x(const DecodeArgs& args, const Work& work, uint32_t smem_x) {
    const int pieces = (work.end - work.begin) * kUnit * Format::kXBytes / 16;
    const char* gmem = static_cast<const char*>(args.x) + int64_t(work.begin) * kUnit * Format::kXBytes;
    for (int token = 0; token < args.m; ++token) {
      for (int i = threadIdx.x; i < pieces; i += kMultiplyThreads) {
        copy16_cached(smem_x + token * args.x_pitch + i * 16, gmem + token * args.x_stride + i * 16, 16);
      }
    }
    copy_commit();
    copy_wait(0);
    barrier(kMultiplyBarrier, kMultiplyThreads);
  }

  // Σ x over each group and token, by mma against ones.
  static __device__ void sum_x(const TokenTile (&x)[kTokenTiles], uint32_t smem_sums, int groups, int warp, int lane) {
    if constexpr (Format::kNeedsXSums) {
      using T = typename Format::Element;
      const uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
#pragma unroll 2
      for (int group = warp; group < groups; group += kWarps) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          float sum[2][4] = {};
#pragma unroll
          for (int pair = 0; pair < Format::kGroupSteps / 2; ++pair) {
            uint32_t b[4];
            x[tile].load(b, (group * Format::kGroupSteps / 2 + pair) * 64);
            mma_m16n8k16<T>(sum[0], ones, b[0], b[1]);
            mma_m16n8k16<T>(sum[1], ones, b[2], b[3]);
          }
          if (lane < 4) {
            const uint32_t to = smem_sums + (group * kTokenTiles + tile) * 32 + lane * 8;
            store_smem_float(to, sum[0][0] + sum[1][0]);
            store_smem_float(to + 4, sum[0][1] + sum[1][1]);
          }
        }
      }
      barrier(kMultiplyBarrier, kMultiplyThreads);
    }
  }

  static __device__ __forceinline__ void store_slot(uint32_t slot, int lane,
                                                    const Accumulator (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles * kTokenTiles; ++i) {
      const Accumulator* v = sums[i / kTokenTiles][i % kTokenTiles];
      store_smem16(slot + i * 512 + lane * 16, *reinterpret_cast<const uint4*>(v));
    }
  }

  static __device__ __forceinline__ void add(Accumulator (&sum)[4], const uint4& v) {
    const auto* values = reinterpret_cast<const Accumulator*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += values[i];
  }

  static __device__ __forceinline__ void finish(const DecodeArgs& args, int set, int lane,
                                                const Accumulator (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 8 * tile + 2 * (lane % 4) + i;
        if (token >= args.m) continue;
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          const int row_tile = set * kTiles + a;
          if (row_tile > args.last_tile) continue;
          args.epilogue.store_pair(token, row_tile * 16 + lane / 4, sums[a][tile][i], sums[a][tile][i + 2]);
        }
      }
    }
  }

  static __device__ void multiply(const DecodeArgs& args, const Work& work, uint32_t base, uint32_t ring, uint32_t full,
                                  uint32_t empty, uint32_t slots, int warp, int lane) {
    load_x(args, work, base);
    TokenTile x[kTokenTiles];
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {  // absent tokens repeat the last one and are not stored
      x[tile].address = base + min(8 * tile + lane % 8, args.m - 1) * args.x_pitch + lane / 8 * 16;
    }
    const uint32_t x_sums = base + args.smem_sums;
    sum_x(x, x_sums, (work.end - work.begin) * kGroupsPerUnit, warp, lane);

    RingPosition at;
    for (int set = 0; set < work.sets; ++set) {
      Accumulator sums[kTiles][kTokenTiles][4] = {};
      for (int unit = work.begin; unit < work.end; unit += args.chunk_units) {
        const int count = min(args.chunk_units, work.end - unit);
        const uint32_t stage = ring + at.stage * kTiles * work.tile_bytes;
        mbarrier_wait(full + at.stage * 8, at.parity);
        for (int u = count * warp / kWarps; u < count * (warp + 1) / kWarps; ++u) {
          const int local = unit + u - work.begin, k_bytes = local * kUnit * Format::kXBytes;
          const uint32_t sums_of_x = x_sums + local * kGroupsPerUnit * kTokenTiles * 32;
          Format::template multiply<kTiles, kTokenTiles>(args, stage, work.tile_bytes, args.chunk_units, u, x, k_bytes,
                                                         sums_of_x, lane, sums);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(empty + at.stage * 8);
        at.advance(args.stages);
      }
      const int buffer = set % kSlotBuffers;
      const uint32_t done = slots + buffer * 16;
      if (set >= kSlotBuffers) mbarrier_wait(done + 8, (set / kSlotBuffers - 1) & 1);
      store_slot(base + args.smem_slots + (buffer * kWarps + warp) * kSlotBytes, lane, sums);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(done);
    }
  }

  static __device__ void add_up(const DecodeArgs& args, const Work& work, uint32_t base, uint32_t slots, int lane) {
    for (int set = 0; set < work.sets; ++set) {
      const int buffer = set % kSlotBuffers;
      const uint32_t done = slots + buffer * 16, slot = base + args.smem_slots + buffer * kWarps * kSlotBytes;
      mbarrier_wait(done, set / kSlotBuffers & 1);
      Accumulator sums[kTiles][kTokenTiles][4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int i = 0; i < kTiles * kTokenTiles; ++i) {
          add(sums[i / kTokenTiles][i % kTokenTiles], load_smem16(slot + w * kSlotBytes + i * 512 + lane * 16));
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(done + 8);
      if (work.ranks == 1) {
        finish(args, work.first + set * work.step, lane, sums);
      } else {
        store_slot(base + args.smem_kept + set * kSlotBytes, lane, sums);
      }
    }
  }

  static __device__ void run(const DecodeArgs& args) {
    extern __shared__ __align__(128) unsigned char smem[];
    const uint32_t base = smem_address(smem), ring = base + args.smem_ring;
    const uint32_t slots = base + args.smem_barriers;  // done, free a buffer of slots
    const uint32_t full = slots + 2 * kSlotBuffers * 8, empty = full + kMaxStages * 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Work work(args);
    if (threadIdx.x == 0) {
      for (int s = 0; s < args.stages; ++s) {
        mbarrier_init(full + s * 8, 1);
        mbarrier_init(empty + s * 8, kWarps);
      }
      for (int b = 0; b < kSlotBuffers; ++b) {
        mbarrier_init(slots + b * 16, kWarps);
        mbarrier_init(slots + b * 16 + 8, 1);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    let_next_kernel_start();
    if (warp == kWarps) {
      produce(args, work, ring, full, empty, lane);
    } else {
      wait_for_previous_kernel();
      warp < kWarps ? multiply(args, work, base, ring, full, empty, slots, warp, lane)
                    : add_up(args, work, base, slots, lane);
    }
    if (work.ranks == 1) return;

    __syncwarp();
    cluster_sync();
    for (int set = work.rank + work.ranks * warp; set < work.sets; set += work.ranks * (kThreads / 32)) {
      Accumulator sums[kTiles][kTokenTiles][4] = {};
      for (int r = 0; r < work.ranks; ++r) {
        const uint32_t kept = map_to_rank(base + args.smem_kept + set * kSlotBytes, r) + lane * 16;
#pragma unroll
        for (int i = 0; i < kTiles * kTokenTiles; ++i) {
          add(sums[i / kTokenTiles][i % kTokenTiles], load_cluster16(kept + i * 512));
        }
      }
      finish(args, work.first + set * work.step, lane, sums);
    }
    cluster_sync();  // nobody leaves while its sums are being read
  }
};

template <class Format, int kTiles, int kTokenTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps + 64, kTokenTiles == 1 ? 2 : 1)
    decode_matmul_kernel(const __grid_constant__ DecodeArgs args) {
#ifdef FASTINFER_SM90A
  DecodeMatmul<Format, kTiles, kTokenTiles, kWarps>::run(args);
#else
  __trap();  // rather than leave y as it was
#endif
}

// ---- launch -------------------------------------------------------------------------------------------------------------

struct DecodePlan {
  int ranks = 1;           // CTAs of a cluster, which split K
  int smem_bytes = 0;      // at most this much a CTA
  int warp_units = 4;      // units of a chunk for each warp
  bool dependent = false;  // start before the previous kernel has finished
};

template <class Format, int kTiles, int kTokenTiles, int kWarps>
bool launch_decode(const char* op, DecodeArgs args, int row_tiles, const DecodePlan& plan,
                   const LaunchContext& context) {
  using Kernel = DecodeMatmul<Format, kTiles, kTokenTiles, kWarps>;
  args.sets = (row_tiles + kTiles - 1) / kTiles;
  args.last_tile = row_tiles - 1;

  const int slice = (args.units + plan.ranks - 1) / plan.ranks;
  const auto kernel = decode_matmul_kernel<Format, kTiles, kTokenTiles, kWarps>;
  const int clusters =
      std::min(args.sets, resident_clusters(kernel, Kernel::kThreads, plan.ranks, plan.smem_bytes, context));
  const int kept_sets = plan.ranks == 1 ? 0 : (args.sets + clusters - 1) / clusters;

  args.x_pitch = slice * kUnit * Format::kXBytes + 16;
  args.smem_sums = args.m * args.x_pitch;
  args.smem_slots = args.smem_sums + (Format::kNeedsXSums ? slice * (8 / Format::kGroupSteps) * kTokenTiles * 32 : 0);
  args.smem_kept = args.smem_slots + kSlotBuffers * kWarps * Kernel::kSlotBytes;
  args.smem_barriers = args.smem_kept + kept_sets * Kernel::kSlotBytes;
  args.smem_ring = (args.smem_barriers + (2 * kSlotBuffers + 2 * kMaxStages) * 8 + 127) / 128 * 128;
  const int ring = plan.smem_bytes - args.smem_ring;
  const auto stages_of = [&](int chunk) { return std::max(0, ring) / (kTiles * tile_bytes_of<Format>(chunk)); };
  int chunk = plan.warp_units * kWarps;  // a multiple of the warps' number, so that each has the same share
  while (chunk > kWarps && stages_of(chunk) < 3) chunk -= kWarps;
  args.chunk_units = std::min(chunk, slice);
  args.stages = std::min(stages_of(args.chunk_units), kMaxStages);
  if (args.stages < 2) return false;
  const int stage_bytes = kTiles * tile_bytes_of<Format>(args.chunk_units);
  const int smem_bytes = args.smem_ring + args.stages * stage_bytes;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.limits().smem_per_block));
  launch_clusters(op, kernel, clusters * plan.ranks, Kernel::kThreads, plan.ranks, smem_bytes, plan.dependent, args,
                  context);
  return true;
}

}  // namespace fastinfer
