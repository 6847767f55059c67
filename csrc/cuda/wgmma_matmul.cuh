// wgmma_matmul: y[M, N] = x[M, K] · dequant(w)[N, K]ᵀ for more than a few tokens, every weight format in its tile layout
// Source    own design; warp-specialised producer and consumers as in CUTLASS's sm90 kernels
// Layout    LAYOUTS.md#tile-w4a16, #tile-w8a16, #tile-w8a8
// Requires  sm90a; K % 128 == 0, N in whole tiles of 16 rows; x 16-byte aligned
// Mapping   a CTA makes 64 · kConsumers rows of w × kTokens tokens: kConsumers warpgroups multiply, 64 rows each, and one
//           thread of another copies. Weights go from shared memory to registers, become 16-bit there and are wgmma's a; x
//           arrives through a tensor map, swizzled, and is b. While a warpgroup makes its next fragment, the tensor cores
//           work on its last one and on the other warpgroups'. Beside int8 x weights are a as they lie in shared memory.
//
//             stage:  x  kStageBlocks × [kTokens][128 bytes of k]     a block is 128 bytes of x along K
//                     w  4 · kConsumers row tiles × kStageBlocks blocks
//
//           int4 weights of few tokens are multiplied unscaled: the sums of a group of k are scaled in fp32, and what the
//           zero point adds is taken away with Σx of the group, which two idle warps of the copying warpgroup make.
//           Above, fragments are scaled as they are made.
//           The ranks of a cluster share a tile, each a slice of K. A rank sends every other one the sums that are its to
//           add up, a share of the tokens, and adds the ranks' in their order: one hop, no barrier of the cluster.
//           Where two CTAs are resident, the second may be of the next kernel, which starts and fetches weights there.
//           The members of a rank have neighbouring rows: each copies its part of x to all of them, which spares the L2.
// Bound     memory below M ≈ 100, then wgmma
// Verified  tests/test_int4_matmul.py, test_int8_matmul.py, test_int8_scaled_matmul.py
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/wgmma.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/tensor_map.cuh"
#include "cuda/wgmma_formats.cuh"

namespace fastinfer {

constexpr int kWgmmaMaxRanks = 4;  // that split K
constexpr int kStoreBarrier = 1;   // the first of the named barriers, one a warpgroup of consumers

struct WgmmaArgs {
  CUtensorMap x_map;  // [M, K], boxes of kTokens / kMembers × one block
  CUtensorMap w_map;  // boxes of four row tiles × what a stage holds of K
  GroupScales scales;
  Epilogue epilogue;
  int m = 0;
  int row_tiles = 0;               // N / 16
  int token_tiles = 0, tiles = 0;  // the tiles of a row of them; all
  int stages = 0, ranks = 1, clusters = 0;
  uint32_t cluster_reciprocal = 0;    // 2³² / the size of a cluster, rounded up; 0 where it is 1
  bool dependent = false;             // may start before the previous kernel has finished
  int k_begin[kWgmmaMaxRanks + 1];    // blocks of K at which the ranks begin; the last is where they all end
  int sum_begin[kWgmmaMaxRanks + 1];  // eights of tokens that they add up, likewise
};

// To the compiler, which keeps it in a uniform register then; a wgmma's descriptor is moved to one at a great price.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

// ---- kernel -------------------------------------------------------------------------------------------------------------

template <class Format, typename Y, int kTokens, int kConsumers, int kMembers, int kResident>
struct WgmmaMatmul {
  using Accumulator = typename Format::Accumulator;
  static constexpr bool kByGroup = Format::by_group(kTokens);
  using Scales = typename Format::template Scales<kByGroup>;
  using Factors = typename Format::template Factors<kByGroup>;
  static constexpr int kThreads = 128 * (kConsumers + 1), kTilesPerCta = 4 * kConsumers;
  // What a launch allots is shared out anew: 40 · 128 + 232 · 256 ≤ 168 · 384, 24 · 128 + 104 · 256 ≤ 80 · 384 where two CTAs
  // are resident, 32 · 128 + 112 · 512 ≤ 96 · 640.
  static constexpr int kProducerRegisters = kConsumers > 2 ? 32 : kResident > 1 ? 24 : 40;
  static constexpr int kConsumerRegisters = kConsumers > 2 ? 112 : kResident > 1 ? 104 : 232;
  static constexpr int kStageBlocks = kTokens < 256 ? 128 / Format::kBlockK : 1;  // of K
  static constexpr int kStageFactors =
      kStageBlocks * Format::kBlockK <= Format::kGroup ? 1 : kStageBlocks * Format::kBlockK / Format::kGroup;
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kWeightBytes = kTilesPerCta * Format::kTileBytes;
  static constexpr int kStageBytes = kStageBlocks * (kXBytes + kWeightBytes);
  static constexpr int kWords = Format::kTileBytes / 128;                    // of a lane, a block
  static constexpr int kStageTileBytes = kStageBlocks * Format::kTileBytes;  // of a row tile
  // The result leaves through shared memory, kStagedTokens at a time; what other ranks send comes to the same place.
  static constexpr int kStagedTokens = kTokens <= 64 ? 32 : 64;
  static constexpr int kOutPitch = 64 * 2 + 16;  // of a warpgroup's rows
  static constexpr int kOutBytes = kConsumers * kStagedTokens * kOutPitch;
  static constexpr bool kSplits = kTokens < 256;  // the sums of more would not fit beside the ring
  static constexpr int kEights = kTokens / 8, kEightBytes = 128 * kConsumers * 16;  // sums of eight tokens
  static constexpr int kScaleBytes = 4 * kConsumers * Scales::kBytes;
  static constexpr int kMaxStages = 8;
  static constexpr int kBatchSteps = kStageBlocks * Format::kSteps / 2;
  static constexpr int kBatchFactors = kStageFactors > 1 ? kStageFactors / 2 : 1;
  // By group: the sums of x of a stage, and who leaves a stage, warps of consumers and those that sum.
  static constexpr int kSumWarps = 2;
  static constexpr int kXSumBytes = kByGroup ? kStageFactors * kTokens * 4 : 0;  // a stage
  static constexpr int kLeavers = kByGroup ? 4 * kConsumers + kSumWarps : kConsumers;

  static __host__ __device__ int leaving_bytes(int ranks) {
    return ranks > 1 ? (ranks - 1) * ((kEights + ranks - 1) / ranks) * kEightBytes : kOutBytes;
  }
  static __host__ __device__ int smem_bytes(int stages, int ranks) {
    return stages * kStageBytes + leaving_bytes(ranks) + kScaleBytes + kMaxStages * (kXSumBytes + 3 * 8) + 8;
  }

  struct Tile {
    int token0;
    int row_tile;  // of the calling thread's warpgroup
    int row_block;
  };
  struct Work {
    const WgmmaArgs& args;
    int rank, member;  // in the cluster
    int first;         // tile of this cluster
    int begin, end;    // blocks of K
    __device__ explicit Work(const WgmmaArgs& a) : args(a) {
      const int at = uniform(cluster_rank());
      rank = at / kMembers, member = at % kMembers;
      first = uniform(a.cluster_reciprocal == 0 ? blockIdx.x : __umulhi(blockIdx.x, a.cluster_reciprocal));
      begin = uniform(a.k_begin[rank]), end = uniform(a.k_begin[rank + 1]);
    }
    __device__ __forceinline__ Tile tile(int index, int group) const {
      const int row_group = index / args.token_tiles, row_block = row_group * kMembers + member;
      return {(index - row_group * args.token_tiles) * kTokens, row_block * kTilesPerCta + group * 4, row_block};
    }
  };

  // mbarriers, one of each a stage, and one for what other ranks send.
  struct Barriers {
    uint32_t full, empty, summed, received;
  };

  static __device__ __forceinline__ void copy_weights(const Work& work, uint32_t stage, uint32_t full, const Tile& tile,
                                                      int block) {
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      tensor_copy(stage + kStageBlocks * kXBytes + i * 4 * kStageTileBytes, &work.args.w_map,
                  block * (Format::kTileBytes / 8), tile.row_block * kTilesPerCta + i * 4, full);
    }
  }
  static __device__ __forceinline__ void copy_x(const Work& work, uint32_t stage, uint32_t full, const Tile& tile,
                                                int block) {
#pragma unroll
    for (int i = 0; i < kStageBlocks; ++i) {
      const int column = (block + i) * Format::kBlockK, part = kTokens / kMembers * work.member;
      const uint32_t to = stage + i * kXBytes + part * 128;
      if constexpr (kMembers == 1) {
        tensor_copy(to, &work.args.x_map, column, tile.token0, full);
      } else {
        const uint16_t all = ((1 << kMembers) - 1) << (work.rank * kMembers);
        tensor_copy_multicast(to, &work.args.x_map, column, tile.token0 + part, full, all);
      }
    }
  }

  // The first stages' weights, which do not wait for the previous kernel. Returns how many; none where there is nothing to
  // wait for, since x would queue behind them.
  static __device__ int copy_ahead(const Work& work, uint32_t ring, const Barriers& barriers) {
    if (!work.args.dependent || work.first >= work.args.tiles) return 0;
    const Tile tile = work.tile(work.first, 0);
    const int ahead = min(work.args.stages, (work.end - work.begin) / kStageBlocks);
#pragma unroll 1
    for (int s = 0; s < ahead; ++s) {
      mbarrier_arrive_expect(barriers.full + s * 8, kStageBytes);
      copy_weights(work, ring + s * kStageBytes, barriers.full + s * 8, tile, work.begin + s * kStageBlocks);
    }
    return ahead;
  }

  static __device__ void produce(const Work& work, uint32_t ring, const Barriers& barriers, int ahead) {
    wait_for_previous_kernel();
    RingPosition at;
    bool first_round = true;
    for (int index = work.first; index < work.args.tiles; index += work.args.clusters) {
      const Tile tile = work.tile(index, 0);
#pragma unroll 1
      for (int block = work.begin; block < work.end; block += kStageBlocks) {
        const uint32_t stage = ring + at.stage * kStageBytes, full = barriers.full + at.stage * 8;
        if (ahead > 0) {
          --ahead;
        } else {
          if (!first_round) mbarrier_wait(barriers.empty + at.stage * 8, at.parity ^ 1);
          mbarrier_arrive_expect(full, kStageBytes);
          copy_weights(work, stage, full, tile, block);
        }
        copy_x(work, stage, full, tile, block);
        at.advance(work.args.stages);
        if (at.stage == 0) first_round = false;
      }
    }
  }

  // Σx of every group and token of a stage, by mma against ones, sixteen tokens at a time: tokens 8j + 2t and + 1 lie beside
  // those of the next j, as a consumer's lane reads them.
  static __device__ void sum_x(const Work& work, uint32_t ring, uint32_t x_sums, const Barriers& barriers) {
    using T = typename Format::Element;
    constexpr int kGroupSteps = Format::kGroup / 16, kTiles = kTokens / 16 / kSumWarps;
    static_assert(kTokens % (16 * kSumWarps) == 0);
    const int first = (threadIdx.x / 32 - 1) * kTiles, lane = threadIdx.x % 32, row = lane % 8;
    // Of the four matrices of a fragment the second and fourth are of tokens 8 … 15, the third and fourth of k 8 … 15.
    const uint32_t from = ring + first * 2048 + lane / 8 % 2 * 1024 + row * 128 + ((lane / 16) ^ row) * 16;
    const uint32_t to = x_sums + first * 64 + lane / 8 * 16 + lane / 4 % 2 * 4 + lane % 4 * 8;
    RingPosition at;
    for (int index = work.first; index < work.args.tiles; index += work.args.clusters) {
      for (int block = work.begin; block < work.end; block += kStageBlocks) {
        mbarrier_wait(barriers.full + at.stage * 8, at.parity);
#pragma unroll
        for (int group = 0; group < kStageFactors; ++group) {
          float sums[kTiles][4] = {};
#pragma unroll
          for (int k = group * kGroupSteps; k < (group + 1) * kGroupSteps; ++k) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              uint32_t x[4];
              load_matrices(x, ((from + at.stage * kStageBytes) ^ (k % 4 * 32)) + k / 4 * kXBytes + i * 2048);
              mma_m16n8k16<T>(sums[i], x, kOnes<T>, kOnes<T>);
            }
          }
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {  // every column is the same: two lanes store a row and the one eight below
            const uint32_t sum_at = to + at.stage * kXSumBytes + group * kTokens * 4 + i * 64;
            if (lane % 4 < 2) store_smem_float(sum_at, lane % 4 == 0 ? sums[i][0] : sums[i][2]);
          }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(barriers.summed + at.stage * 8);
        leave_stage(work, barriers.empty + at.stage * 8, lane);
        at.advance(work.args.stages);
      }
    }
  }

  // The first of the threads that leave a stage together tells those that fill it.
  static __device__ __forceinline__ void leave_stage(const Work& work, uint32_t empty, int thread) {
    if constexpr (kMembers == 1) {
      if (thread == 0) mbarrier_arrive(empty);
    } else {
      if (thread < kMembers) mbarrier_arrive_at(empty, work.rank * kMembers + thread);
    }
  }

  // A tile's sums by group. The fragments of a piece are made while the tensor cores work on the one before;
  // while a group's sums are scaled they work for the other warpgroups.
  static __device__ __forceinline__ void multiply_by_group(const Work& work, uint32_t ring, uint32_t my_words,
                                                           uint32_t x_sums, const Barriers& barriers, Scales& scales,
                                                           int row_tile, RingPosition& at, float (&sums)[kTokens / 2]) {
    static_assert(kStageBlocks == 2 && kStageFactors <= 2);
    constexpr int kSteps = Format::kSteps, kPieces = kStageBlocks;  // a piece is a block
    constexpr int kGroupPieces = kPieces / kStageFactors;
    const int lane = threadIdx.x % 32;
    const uint64_t x_descriptor = matrix_descriptor(ring);
    uint32_t a[2][kSteps][4], words[kWords];
    float part[kTokens / 2];
    const auto load = [&](int stage, int i) {
      Format::load_words(my_words + stage * kStageBytes + i * Format::kTileBytes, lane, words);
    };
    const auto make = [&](int piece) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        Format::make_unscaled_a(words, j, a[piece % 2][j]);
      }
    };
    const auto multiply = [&](int piece) {
      const uint64_t b = x_descriptor + (at.stage * kStageBytes + piece * kXBytes) / 16;
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        wgmma<typename Format::Element, kTokens>(part, a[piece % 2][j], b + j * 2, piece % kGroupPieces > 0 || j > 0);
      }
      wgmma_commit();
    };
    const auto scale = [&](int chunk_group, int i) {
      const Factors factors = scales.factors(chunk_group);
      const uint32_t from = x_sums + at.stage * kXSumBytes + i * kTokens * 4 + lane % 4 * 16;
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        const uint4 v = load_smem16(from + j * 64);
        const float x[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const auto& f = factors.row[c / 2 % 2];
          float& sum = sums[8 * j + c];
          sum = fmaf(f.scale, fmaf(f.minus_zero, x[c / 4 * 2 + c % 2], part[8 * j + c]), sum);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0;
    mbarrier_wait(barriers.full + at.stage * 8, at.parity);
    load(at.stage, 0);
    make(0);
    int chunk_group = 0;
    for (int block = work.begin; block < work.end; block += kStageBlocks) {
      // The first fragments after the last stage's are made of that stage again, and not multiplied.
      const bool last = block + kStageBlocks >= work.end;
      RingPosition next = at;
      next.advance(work.args.stages);
      next.stage = last ? at.stage : next.stage, next.parity = last ? at.parity : next.parity;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        multiply(piece);
        if (piece == 0 && chunk_group == 0) {
          scales.turn();
          const int ahead = block + Scales::kChunkBlocks;
          if (ahead < work.end) scales.prefetch(row_tile, ahead);
        }
        const int then = (piece + 1) % kPieces;
        if (then == 0) mbarrier_wait(barriers.full + next.stage * 8, next.parity);
        load(then == 0 ? next.stage : at.stage, then);
        if (piece > 0) wgmma_wait<1>();  // who read the fragments that are made next
        make(then);
        if ((piece + 1) % kGroupPieces == 0) {
          mbarrier_wait(barriers.summed + at.stage * 8, at.parity);
          wgmma_wait<0>();
          scale(chunk_group + piece / kGroupPieces, piece / kGroupPieces);
        }
      }
      leave_stage(work, barriers.empty + at.stage * 8, lane);
      chunk_group = (chunk_group + kStageFactors) % Scales::kChunkGroups;
      at.advance(work.args.stages);
    }
  }

  // A tile's sums where weights are multiplied from shared memory. The wgmmas of a stage are issued behind those of the one
  // before, which is left as soon as they are done.
  static __device__ __forceinline__ void multiply_direct(const Work& work, uint32_t ring, const Barriers& barriers,
                                                         RingPosition& at, Accumulator (&sums)[kTokens / 2]) {
    static_assert(kStageBlocks == 1);
    const int group = uniform(threadIdx.x / 128 - 1), thread = threadIdx.x % 128;
    const uint64_t x_descriptor = matrix_descriptor(ring);
    const uint64_t w_descriptor = Format::descriptor(ring + kXBytes + group * 4 * Format::kTileBytes);
    int last_stage = -1;
    for (int block = work.begin; block < work.end; ++block) {
      mbarrier_wait(barriers.full + at.stage * 8, at.parity);
      const int stage = at.stage * (kStageBytes / 16);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Format::kSteps; ++step) {
        wgmma_int8<kTokens>(sums, w_descriptor + stage + step * Format::kDescriptorStep,
                            x_descriptor + stage + step * 2, block > work.begin || step > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (last_stage >= 0) leave_stage(work, barriers.empty + last_stage * 8, thread);
      last_stage = at.stage;
      at.advance(work.args.stages);
    }
    wgmma_wait<0>();
    if (last_stage >= 0) leave_stage(work, barriers.empty + last_stage * 8, thread);
  }

  // A tile's sums where the fragments are what is scaled.
  static __device__ __forceinline__ void multiply(const Work& work, uint32_t ring, uint32_t my_words,
                                                  const Barriers& barriers, Scales& scales, int row_tile,
                                                  RingPosition& at, Accumulator (&sums)[kTokens / 2]) {
    const WgmmaArgs& args = work.args;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    uint32_t a[2][kBatchSteps][4];
    int last_stage = -1;
    for (int block = work.begin; block < work.end; block += kStageBlocks) {
      const int chunk_block = (block - work.begin) % Scales::kChunkBlocks;
      if (chunk_block == 0) {
        scales.turn();
        const int ahead = block + Scales::kChunkBlocks;
        if (ahead < work.end) scales.prefetch(row_tile, ahead);
      }
      Factors factors[kBatchFactors];
      const auto load_factors = [&](int batch) {
#pragma unroll
        for (int i = 0; i < kBatchFactors; ++i) {
          factors[i] = scales.factors(chunk_block * Format::kBlockK / Format::kGroup + batch * kBatchFactors + i);
        }
      };
      load_factors(0);
      mbarrier_wait(barriers.full + at.stage * 8, at.parity);
      const uint32_t from = my_words + at.stage * kStageBytes;
      uint32_t words[kStageBlocks][kWords];
#pragma unroll
      for (int i = 0; i < kStageBlocks; ++i) Format::load_words(from + i * Format::kTileBytes, lane, words[i]);
      // Two batches a stage, in turn: while the tensor cores work on one, the fragments of the other are made.
#pragma unroll
      for (int batch = 0; batch < 2; ++batch) {
        if (batch > 0 && kStageFactors > 1) load_factors(batch);
        const auto make = [&](auto remainders) {
#pragma unroll
          for (int j = 0; j < kBatchSteps; ++j) {
            const int s = batch * kBatchSteps + j, i = s / Format::kSteps, step = s % Format::kSteps;
            const Factors& f = factors[j * (Format::kBlockK / Format::kSteps) / Format::kGroup];
            Format::template make_a<remainders.value>(words[i], step, f, a[batch][j]);
          }
        };
        if (scales.remainders) {
          make(std::true_type{});
        } else {
          make(std::false_type{});
        }
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kBatchSteps; ++j) {
          const int s = batch * kBatchSteps + j, i = s / Format::kSteps, step = s % Format::kSteps;
          const uint64_t b = matrix_descriptor(ring + at.stage * kStageBytes + i * kXBytes) + step * 2;
          wgmma<typename Format::Element, kTokens>(sums, a[batch][j], b, block > work.begin || s > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the other batch is done, and its fragments free
        if (batch == 0 && last_stage >= 0) leave_stage(work, barriers.empty + last_stage * 8, thread);
      }
      last_stage = at.stage;
      at.advance(args.stages);
    }
    wgmma_wait<0>();
    if (last_stage >= 0) leave_stage(work, barriers.empty + last_stage * 8, thread);
  }

  static __device__ void consume(const Work& work, uint32_t ring, uint32_t leaving, uint32_t scale_smem,
                                 uint32_t x_sums, const Barriers& barriers) {
    const WgmmaArgs& args = work.args;
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const uint32_t my_words = ring + kStageBlocks * kXBytes + (group * 4 + warp) * kStageTileBytes;
    Scales scales(args.scales, scale_smem + (group * 4 + warp) * Scales::kBytes, lane);
    const auto my_tile = [&](const Tile& tile) { return min(tile.row_tile + warp, args.row_tiles - 1); };
    RingPosition at;
    Accumulator sums[kTokens / 2];
    if (work.first < args.tiles) scales.prefetch(my_tile(work.tile(work.first, group)), work.begin);
    if constexpr (kMembers > 1) cluster_wait();  // for barriers that leave_stage arrives on
    wait_for_previous_kernel();
    for (int index = work.first; index < args.tiles; index += args.clusters) {
      const Tile tile = work.tile(index, group);
      const auto row_terms = [&] { return RowTerms(args.epilogue, (tile.row_tile + warp) * 16 + lane / 4); };
      const RowTerms early = row_terms();  // from memory, while the sums are made; used where registers allow
      if constexpr (kByGroup) {
        multiply_by_group(work, ring, my_words, x_sums, barriers, scales, my_tile(tile), at, sums);
      } else if constexpr (Format::kDirect) {
        multiply_direct(work, ring, barriers, at, sums);
      } else {
        multiply(work, ring, my_words, barriers, scales, my_tile(tile), at, sums);
      }
      const auto prefetch_next = [&] {
        const int next = index + args.clusters;
        if (next < args.tiles) scales.prefetch(my_tile(work.tile(next, group)), work.begin);
      };
      if (kConsumers == 2) prefetch_next();
      const RowTerms terms = kConsumers == 2 ? early : row_terms();
      if (kSplits && args.ranks > 1) {
        combine(work, my_words, leaving, barriers, tile, terms, sums);
      } else {
        store(work, leaving + group * kStagedTokens * kOutPitch, tile, terms, sums);
      }
      __syncwarp();                         // the stores return lane by lane, and aligned instructions follow
      if (kConsumers > 2) prefetch_next();  // no registers for it before
    }
  }

  // ---- from sums to y: 16-bit results are staged in shared memory, in eights of tokens ---------------------------------
  // Without ranks a warpgroup stages together, for lines of 128 bytes. Where it was one of several ranks a warp does so by
  // itself, in sectors of 32: few tokens are left, and barriers would cost more. Warpgroups never wait for each other here.

  // Where an eight of tokens is staged; a warp's own in what its weights came in.
  template <int kWarps>
  static __device__ __forceinline__ uint32_t staged(uint32_t base, int eight) {
    constexpr int kStageEights = kStageTileBytes / 256;
    if constexpr (kWarps == 4) return base + eight * 8 * kOutPitch;
    return base + eight / kStageEights * kStageBytes + eight % kStageEights * 256;
  }
  template <int kWarps>
  static constexpr int kPitch = kWarps == 4 ? kOutPitch : 32;  // from token to token

  // f(where it is staged, where in y) for eights of columns of `eights` eights of tokens from `token0` on.
  template <int kWarps, typename F>
  static __device__ __forceinline__ void for_rows(const WgmmaArgs& args, uint32_t base, const Tile& tile, int token0,
                                                  int eights, F&& f) {
    const Epilogue& epilogue = args.epilogue;
    const int gated = epilogue.gate != Gate::kNone ? 1 : 0;
    const int thread = threadIdx.x % (32 * kWarps), shift = (kWarps == 4 ? 3 : 1) - gated;  // log2 of a token's pieces
    const int piece = thread & ((1 << shift) - 1);
    const int row = (tile.row_tile + (kWarps == 4 ? 0 : threadIdx.x % 128 / 32)) * 16;
    const int column = (row >> gated) + piece * 8, last = min(eights * 8, args.m - token0);
    if (column >= epilogue.n >> gated) return;
    for (int i = thread >> shift; i < last; i += 32 * kWarps >> shift) {
      const uint32_t smem = staged<kWarps>(base, i / 8) + i % 8 * kPitch<kWarps> + piece * 16;
      f(smem, int64_t(token0 + i) * epilogue.y_stride + column);
    }
  }
  template <int kWarps>
  static __device__ __forceinline__ void load_residual(const WgmmaArgs& args, uint32_t base, const Tile& tile,
                                                       int token0, int eights) {
    const Y* residual = static_cast<const Y*>(args.epilogue.residual);
    const bool wide = args.epilogue.y_stride % 8 == 0 && reinterpret_cast<uintptr_t>(residual) % 16 == 0;
    for_rows<kWarps>(args, base, tile, token0, eights, [&](uint32_t smem, int64_t at) {
      Pack<Y, 8> v;
      if (wide) {
        v = *reinterpret_cast<const Pack<Y, 8>*>(residual + at);
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) v.v[c] = residual[at + c];
      }
      store_smem16(smem, *reinterpret_cast<const uint4*>(&v));
    });
  }
  template <int kWarps>
  static __device__ __forceinline__ void store_rows(const WgmmaArgs& args, uint32_t base, const Tile& tile, int token0,
                                                    int eights) {
    Y* y = static_cast<Y*>(args.epilogue.y);
    const bool wide = args.epilogue.y_stride % 8 == 0;
    for_rows<kWarps>(args, base, tile, token0, eights, [&](uint32_t smem, int64_t at) {
      const uint4 words = load_smem16(smem);
      const Pack<Y, 8>& v = *reinterpret_cast<const Pack<Y, 8>*>(&words);
      if (wide) {
        *reinterpret_cast<Pack<Y, 8>*>(y + at) = v;
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) y[at + c] = v.v[c];
      }
    });
  }

  // The rows of a lane in an eight that is staged, for load_ and store_…_transposed.
  template <int kWarps, Gate kGate>
  static __device__ __forceinline__ uint32_t lane_rows(uint32_t eight) {
    const int warp = kWarps == 4 ? threadIdx.x % 128 / 32 : 0, lane = threadIdx.x % 32;
    return eight + lane % 8 * kPitch<kWarps> + (kGate == Gate::kNone ? warp * 32 + lane / 8 % 2 * 16 : warp * 16);
  }
  // A lane's four sums of an eight of tokens, of which `token` is its first, to lane_rows, where the residual is already.
  template <Gate kGate>
  static __device__ __forceinline__ void stage(const Epilogue& epilogue, const RowTerms& terms, uint32_t at, int token,
                                               int last_token, const Accumulator (&sums)[4]) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = terms.value(epilogue, min(token + i % 2, last_token), i / 2, sums[i]);
    if constexpr (kGate == Gate::kNone) {
      if (epilogue.residual != nullptr) {
        uint32_t residual[2];
        load_two_matrices_transposed(residual, at);
        const float2 first = widen_pair(Y{}, residual[0]), second = widen_pair(Y{}, residual[1]);
        v[0] += first.x, v[1] += first.y, v[2] += second.x, v[3] += second.y;
      }
      store_two_matrices_transposed(at, pack_pair<Y>(v[0], v[1]), pack_pair<Y>(v[2], v[3]));
    } else {
      float2 out{gate_value(kGate, v[0]) * v[2], gate_value(kGate, v[1]) * v[3]};
      if (epilogue.residual != nullptr) {
        const float2 residual = widen_pair(Y{}, load_matrix_transposed(at));
        out.x += residual.x, out.y += residual.y;
      }
      store_matrix_transposed(at, pack_pair<Y>(out.x, out.y));
    }
  }
  // f with the gate as a constant: one short stretch of code for each, rather than jumps over all of them.
  template <typename F>
  static __device__ __forceinline__ void with_gate(Gate gate, F&& f) {
    if (gate == Gate::kNone) {
      f(std::integral_constant<Gate, Gate::kNone>{});
    } else if (gate == Gate::kSilu) {
      f(std::integral_constant<Gate, Gate::kSilu>{});
    } else if (gate == Gate::kGelu) {
      f(std::integral_constant<Gate, Gate::kGelu>{});
    } else {
      f(std::integral_constant<Gate, Gate::kGeluTanh>{});
    }
  }
  // Where y is fp32, eight lanes fill a sector.
  static __device__ __forceinline__ void store_floats(const WgmmaArgs& args, int row, int token,
                                                      const Accumulator (&sums)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token + i < args.m) args.epilogue.store_pair(token + i, row, sums[i], sums[i + 2]);
    }
  }

  static __device__ __forceinline__ void store(const Work& work, uint32_t out, const Tile& tile, const RowTerms& terms,
                                               const Accumulator (&sums)[kTokens / 2]) {
    const WgmmaArgs& args = work.args;
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    const auto eight_sums = [&](int j, Accumulator(&v)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = sums[4 * j + i];
    };
    if constexpr (sizeof(Y) == 4) {
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        Accumulator v[4];
        eight_sums(j, v);
        store_floats(args, terms.row, tile.token0 + 8 * j + 2 * (lane % 4), v);
      }
    } else {
      constexpr int kStagedEights = kStagedTokens / 8;
#pragma unroll
      for (int first = 0; first < kEights; first += kStagedEights) {
        const int token0 = tile.token0 + 8 * first;
        barrier(kStoreBarrier + group, 128);  // the buffer is free
        if (args.epilogue.residual != nullptr) {
          load_residual<4>(args, out, tile, token0, kStagedEights);
          barrier(kStoreBarrier + group, 128);
        }
        with_gate(args.epilogue.gate, [&](auto gate) {
          const uint32_t to = lane_rows<4, gate.value>(out);
#pragma unroll
          for (int k = 0; k < kStagedEights; ++k) {
            Accumulator v[4];
            eight_sums(first + k, v);
            const int token = token0 + 8 * k + 2 * (lane % 4);
            stage<gate.value>(args.epilogue, terms, to + 8 * k * kOutPitch, token, args.m - 1, v);
          }
        });
        barrier(kStoreBarrier + group, 128);
        store_rows<4>(args, out, tile, token0, kStagedEights);
      }
    }
  }

  // Ranks that split K. A thread's sums go to the thread of its number in the rank that owns the tokens.
  static __device__ void combine(const Work& work, uint32_t my_words, uint32_t leaving, const Barriers& barriers,
                                 const Tile& tile, const RowTerms& terms, const Accumulator (&sums)[kTokens / 2]) {
    const WgmmaArgs& args = work.args;
    const int ranks = args.ranks, rank = work.rank, lane = threadIdx.x % 32;
    const uint32_t mine = leaving + (threadIdx.x - 128) * 16;
    const auto place = [&](int eight, int from, int to) {
      return mine + (eight * (ranks - 1) + from - (from > to ? 1 : 0)) * kEightBytes;
    };
    const auto eight_sums = [&](int j) { return *reinterpret_cast<const uint4*>(&sums[4 * j]); };
    if constexpr (kMembers == 1) cluster_wait();  // for the barriers that others receive on
    uint32_t owner = 0, nth = ~0u;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const uint32_t now = ((j + 1) * uint32_t(ranks) - 1) / kEights;  // sum_begin[now] ≤ j < sum_begin[now + 1]
      nth = now == owner ? nth + 1 : 0, owner = now;
      if (owner == rank) continue;
      const int to = owner * kMembers + work.member;
      const uint32_t at = map_to_rank(place(nth, rank, owner), to), received = map_to_rank(barriers.received, to);
      send16(at, eight_sums(j), received);
    }
    const int first = args.sum_begin[rank], count = args.sum_begin[rank + 1] - first, token0 = tile.token0 + 8 * first;
    if constexpr (sizeof(Y) == 2) {
      if (args.epilogue.residual != nullptr) load_residual<1>(args, my_words, tile, token0, count);
    }
    mbarrier_wait(barriers.received, 0);
#pragma unroll
    for (int j = 0; j < kEights; ++j) {  // unrolled for sums that are in registers; what comes after is not
      if (j < first || j >= first + count) continue;
      const uint32_t at = place(j - first, 0, 0);
      uint4 received[kWgmmaMaxRanks - 1] = {};
#pragma unroll
      for (int i = 0; i < kWgmmaMaxRanks - 1; ++i) {
        if (i < ranks - 1) received[i] = load_smem16(at + i * kEightBytes);
      }
      Accumulator total[4] = {};
      const auto add = [&](const uint4& v) {
        const auto* values = reinterpret_cast<const Accumulator*>(&v);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += values[i];
      };
#pragma unroll
      for (int i = 0; i < kWgmmaMaxRanks; ++i) {  // in the ranks' order; those that are not there add 0
        if (i == rank) add(eight_sums(j));
        if (i < kWgmmaMaxRanks - 1) add(received[i]);
      }
      store_smem16(at, *reinterpret_cast<const uint4*>(total));
    }
    __syncwarp();
    const auto for_totals = [&](auto&& f) {
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        const uint4 v = load_smem16(place(k, 0, 0));
        f(k, *reinterpret_cast<const Accumulator(*)[4]>(&v), token0 + 8 * k + 2 * (lane % 4));
      }
    };
    if constexpr (sizeof(Y) == 4) {
      for_totals([&](int, const Accumulator(&v)[4], int token) { store_floats(args, terms.row, token, v); });
    } else {
      with_gate(args.epilogue.gate, [&](auto gate) {
        for_totals([&](int k, const Accumulator(&v)[4], int token) {
          const uint32_t to = lane_rows<1, gate.value>(staged<1>(my_words, k));
          stage<gate.value>(args.epilogue, terms, to, token, args.m - 1, v);
        });
      });
      __syncwarp();
      store_rows<1>(args, my_words, tile, token0, count);
    }
  }

  static __device__ void run(const WgmmaArgs& args) {
    extern __shared__ __align__(1024) unsigned char wgmma_smem[];  // the swizzle's period
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&args.w_map);
      prefetch_tensor_map(&args.x_map);
    }
    const Work work(args);
    const uint32_t ring = uniform(smem_address(wgmma_smem));
    const uint32_t leaving = ring + args.stages * kStageBytes, scale_smem = leaving + leaving_bytes(args.ranks);
    const uint32_t x_sums = scale_smem + kScaleBytes, full = x_sums + kMaxStages * kXSumBytes;
    const Barriers barriers{full, full + kMaxStages * 8, full + 2 * kMaxStages * 8, full + 3 * kMaxStages * 8};
    if (threadIdx.x == 0) {
      for (int s = 0; s < args.stages; ++s) {
        mbarrier_init(barriers.full + s * 8, 1);
        mbarrier_init(barriers.empty + s * 8, kLeavers * kMembers);
        if constexpr (kByGroup) mbarrier_init(barriers.summed + s * 8, kSumWarps);
      }
      mbarrier_init(barriers.received, 1);
      mbarrier_init_fence();
      const int eights = args.sum_begin[work.rank + 1] - args.sum_begin[work.rank];
      mbarrier_arrive_expect(barriers.received, (args.ranks - 1) * eights * kEightBytes);
    }
    __syncwarp();
    // Waited for before the first access to another CTA, and by every thread once.
    const bool clustered = args.ranks * kMembers > 1;
    if (clustered) cluster_arrive_relaxed();
    __syncthreads();
    let_next_kernel_start();
    if (threadIdx.x < 128) {
      give_registers<kProducerRegisters>();
      const int ahead = threadIdx.x == 0 ? copy_ahead(work, ring, barriers) : 0;
      if constexpr (kMembers > 1) {
        __syncwarp();
        cluster_wait();
      }
      if (threadIdx.x == 0) produce(work, ring, barriers, ahead);
      if constexpr (kByGroup) {
        if (threadIdx.x / 32 - 1 < kSumWarps) sum_x(work, ring, x_sums, barriers);
      }
      __syncwarp();
      if (kMembers == 1 && clustered) cluster_wait();
    } else {
      take_registers<kConsumerRegisters>();
      consume(work, ring, leaving, scale_smem, x_sums, barriers);
    }
    // No rank leaves before the others' sums have come; members also arrive on each other's barriers to the last.
    if constexpr (kMembers > 1) cluster_sync();
  }
};

template <class Format, typename Y, int kTokens, int kConsumers, int kMembers, int kResident>
__global__ void __launch_bounds__(128 * (kConsumers + 1), kResident)
    wgmma_matmul_kernel(const __grid_constant__ WgmmaArgs args) {
#ifdef FASTINFER_SM90A
  WgmmaMatmul<Format, Y, kTokens, kConsumers, kMembers, kResident>::run(args);
#else
  __trap();  // rather than leave y as it was
#endif
}

// ---- launch -------------------------------------------------------------------------------------------------------------

struct WgmmaPlan {
  int ranks = 1;           // that split K
  bool dependent = false;  // start before the previous kernel has finished
};

template <class Format, typename Y, int kTokens, int kConsumers, int kMembers, int kResident>
void launch_wgmma(const char* op, WgmmaArgs args, const Tensor& x, const void* w, const WgmmaPlan& plan,
                  const LaunchContext& context) {
  using Kernel = WgmmaMatmul<Format, Y, kTokens, kConsumers, kMembers, kResident>;
  const int k = static_cast<int>(x.size(1)), blocks = k / Format::kBlockK,
            resident_limit = context.limits().smem_per_multiprocessor / kResident - 1024;
  const int limit = std::min(context.limits().smem_per_block, resident_limit);
  args.x_map = token_map(op, x, kTokens / kMembers);
  args.w_map = weight_map(op, w, args.row_tiles, blocks / Kernel::kStageBlocks, Kernel::kStageTileBytes);
  args.token_tiles = (args.m + kTokens - 1) / kTokens;
  args.dependent = plan.dependent;
  args.ranks = std::min({plan.ranks, k / 128, Kernel::kSplits ? kWgmmaMaxRanks : 1});
  for (int r = 0; r <= args.ranks; ++r) {
    args.k_begin[r] = k / 128 * r / args.ranks * (128 / Format::kBlockK);  // by 128, so that no group is split
    args.sum_begin[r] = Kernel::kEights * r / args.ranks;
  }
  args.stages = 2;
  while (args.stages < Kernel::kMaxStages && Kernel::smem_bytes(args.stages + 1, args.ranks) <= limit) ++args.stages;
  const int smem_bytes = Kernel::smem_bytes(args.stages, args.ranks);
  const auto kernel = wgmma_matmul_kernel<Format, Y, kTokens, kConsumers, kMembers, kResident>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  constexpr int kClusterTiles = Kernel::kTilesPerCta * kMembers;
  const int64_t tiles = int64_t((args.row_tiles + kClusterTiles - 1) / kClusterTiles) * args.token_tiles;
  const int size = args.ranks * kMembers;
  // Ranks that split K make one tile only: what they receive comes once.
  const int64_t clusters =
      args.ranks > 1
          ? tiles
          : std::min<int64_t>(tiles, resident_clusters(kernel, Kernel::kThreads, size, smem_bytes, context, kResident));
  FASTINFER_CHECK(op, tiles < INT32_MAX, "the matrices are too large: ", tiles, " tiles");
  args.tiles = static_cast<int>(tiles), args.clusters = static_cast<int>(clusters);
  if (size > 1) args.cluster_reciprocal = static_cast<uint32_t>(((int64_t(1) << 32) + size - 1) / size);
  launch_clusters(op, kernel, clusters * size, Kernel::kThreads, size, smem_bytes, plan.dependent, args, context);
}

}  // namespace fastinfer
