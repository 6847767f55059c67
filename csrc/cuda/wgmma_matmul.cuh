// wgmma_matmul: y[M, N] = x[M, K] · dequant(w)[N, K]ᵀ for more than a few tokens, every weight format in its tile layout
// Source    own design; warp-specialised producer and consumers as in CUTLASS's sm90 kernels
// Layout    LAYOUTS.md#tile-w4a16, #tile-w8a16, #tile-w8a8
// Requires  sm90a; K % 128 == 0, N in whole tiles of 16 rows; x 16-byte aligned
// Mapping   a CTA makes 64 · kConsumers rows of w × kTokens tokens: kConsumers warpgroups multiply, 64 rows each, and one
//           thread of another copies. Weights go from shared memory to registers, become 16-bit there and are wgmma's a; x
//           arrives through a tensor map, swizzled, and is b. While a warpgroup makes its next fragment, the tensor cores
//           work on its last one and on the other warpgroups'. Beside int8 x weights are a as they lie in shared memory.
//
//             stage:  x  kStageBlocks × [kTokens][128 bytes of k]        a block is 128 bytes of x along K
//                     w  kStageBlocks × 4 · kConsumers row tiles
//
//           int4 weights of few tokens are multiplied unscaled: the sums of a group of k are scaled in fp32, and what the
//           zero point adds is taken away with Σx of the group, which two idle warps of the copying warpgroup make.
//           Above, an element of the result costs more to scale than one of the fragments does.
//           The ranks of a cluster share a tile, each a slice of K; their sums meet in shared memory, added in their order.
//           The members of a rank have neighbouring rows: each copies its part of x to all of them, which spares the L2.
// Bound     memory below M ≈ 100, then wgmma
// Verified  tests/test_int4_matmul.py, test_int8_matmul.py, test_int8_scaled_matmul.py
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/wgmma.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/tensor_map.cuh"

namespace fastinfer {

struct WgmmaArgs {
  CUtensorMap x_map;  // [M, K], boxes of kTokens × one block
  CUtensorMap w_map;  // boxes of four row tiles × one block
  const void* w_scale = nullptr;
  const void* w_zero = nullptr;
  Element scale_type{};
  Epilogue epilogue;
  int m = 0, groups = 0;                // M; K / G
  int row_tiles = 0;                    // N / 16
  int blocks = 0;                       // of K
  int row_blocks = 0, token_tiles = 0;  // what the tiles cover
  int stages = 0;
};

// To the compiler, which keeps it in a uniform register then; a wgmma's descriptor is moved to one at a great price.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

constexpr int kConsumerBarrier = 1;  // named barrier of the consumers

// ---- weight formats -----------------------------------------------------------------------------------------------------
// A block is kSteps wgmma steps. `Factors` is what a lane needs of a group of kGroup k, to make its fragments or, where the
// shape is by_group, to scale its sums.

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  return bits(__floats2bfloat162_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  return bits(__floats2half2_rn(low, high));
}
__device__ __forceinline__ __nv_bfloat162 as_pair(__nv_bfloat16, uint32_t v) { return as_bfloat162(v); }
__device__ __forceinline__ __half2 as_pair(__half, uint32_t v) { return as_half2(v); }
__device__ __forceinline__ float low_of(__nv_bfloat16, uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float low_of(__half, uint32_t v) { return __low2float(as_half2(v)); }

// In the fragments (q − zero) · scale, rounded to 16 bits once but for terms far below: the bits of q make the number e + q
// (e = 128 in bf16, 1024 in fp16), e + zero is rounded to `offset`, whose difference to e + q is exact for zero points near
// q's range; `shift` brings back what rounding the zero point took, and `scale_low` what rounding the scale did.
// By group the fragments are q + kInt4Offset, exactly, and a group's sum becomes scale · (sum + minus_zero · Σx).
template <typename T, int kG>
struct Int4Wgmma {
  using Element = T;
  using Accumulator = float;
  static constexpr int kSteps = 4, kTileBytes = 512, kBlockK = 64, kGroup = kG;
  static constexpr bool kDirect = false;  // words from shared memory become fragments in registers
  static constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  static constexpr uint32_t kMagic = kBFloat16 ? 0x43004300 : 0x64006400;
  static constexpr float kExponent = kBFloat16 ? 128.f : 1024.f;

  // Instructions a warp and group: kTokens + kTokens / 16 to scale its sums, 3/4 · kG more to scale in the fragments.
  static constexpr bool by_group(int tokens) { return tokens * 2 <= kG; }

  struct FragmentFactors {
    uint32_t offset, scale, scale_low, shift;  // pairs of equals
  };
  struct SumFactors {
    float scale, minus_zero;
  };
  template <bool kByGroup>
  struct Factors {
    std::conditional_t<kByGroup, SumFactors, FragmentFactors> row[2];  // g and g + 8
  };

  // The factors of a warp's row tile, kChunkGroups groups at a time in shared memory of its own. While they are in use, the
  // scales and zero points of the next ones are on their way from memory; a lane makes the factors of four rows of a group.
  template <bool kByGroup>
  struct Scales {
    static constexpr int kChunkGroups = 8, kChunkBlocks = kChunkGroups * kGroup / kBlockK;
    static constexpr int kRowBytes = sizeof(Factors<kByGroup>) / 2, kBytes = kChunkGroups * 16 * kRowBytes;
    const WgmmaArgs& args;
    uint32_t smem;
    int lane;
    uint2 scale, zero;  // four of a row tile's, 16-bit

    __device__ Scales(const WgmmaArgs& a, uint32_t to, int l) : args(a), smem(to), lane(l) {}
    __device__ __forceinline__ void prefetch(int row_tile, int block) {
      const int group = min(block * kBlockK / kGroup + lane / 4, args.groups - 1);
      const int64_t at = (int64_t(row_tile) * args.groups + group) * 4 + lane % 4;  // in fours
      scale = __ldg(static_cast<const uint2*>(args.w_scale) + at);
      zero = __ldg(static_cast<const uint2*>(args.w_zero) + at);
    }
    __device__ __forceinline__ void widen(const uint2& v, float (&out)[4]) const {
      const bool half = args.scale_type == fastinfer::Element::kHalf;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = i == 0 ? v.x : v.y;
        const float2 pair = half ? __half22float2(as_half2(word)) : __bfloat1622float2(as_bfloat162(word));
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
      }
    }
    // At the start of every chunk: what was prefetched becomes current.
    __device__ __forceinline__ void turn() {
      float s[4], z[4];
      widen(scale, s);
      widen(zero, z);
      __syncwarp();
      const uint32_t to = smem + lane * 4 * kRowBytes;
      if constexpr (kByGroup) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          store_smem16(to + i * kRowBytes,
                       {__float_as_uint(s[i]), __float_as_uint(-z[i] - kInt4Offset<T>), __float_as_uint(s[i + 1]),
                        __float_as_uint(-z[i + 1] - kInt4Offset<T>)});
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t offset = pack_pair<T>(z[i] + kExponent, z[i] + kExponent), high = pack_pair<T>(s[i], s[i]);
          const float low = s[i] - low_of(T{}, high), shift = (low_of(T{}, offset) - kExponent - z[i]) * s[i];
          store_smem16(to + i * kRowBytes, {offset, high, pack_pair<T>(low, low), pack_pair<T>(shift, shift)});
        }
      }
      __syncwarp();
    }
    // Of a group of the chunk.
    __device__ __forceinline__ Factors<kByGroup> factors(int group) const {
      Factors<kByGroup> out;
      const uint32_t from = smem + (group * 16 + lane / 4 * 2) * kRowBytes;
      if constexpr (kByGroup) {
        const uint4 v = load_smem16(from);
        out.row[0] = {__uint_as_float(v.x), __uint_as_float(v.y)};
        out.row[1] = {__uint_as_float(v.z), __uint_as_float(v.w)};
      } else {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const uint4 v = load_smem16(from + row * kRowBytes);
          out.row[row] = {v.x, v.y, v.z, v.w};
        }
      }
      return out;
    }
  };

  static __device__ __forceinline__ void load_words(uint32_t tile, int lane, uint32_t (&words)[4]) {
    const uint4 v = load_smem16(tile + lane * 16);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  static __device__ __forceinline__ void make_a(const uint32_t (&words)[4], int step, const Factors<false>& factors,
                                                uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // nibbles i and i + 4, of row g or g + 8
      const FragmentFactors& f = factors.row[i % 2];
      const auto q = as_pair(T{}, lop3<kAndOr>(words[step] >> (4 * i), 0x000F000F, kMagic));
      const auto d = __hsub2(q, as_pair(T{}, f.offset));
      const auto low = __hfma2(d, as_pair(T{}, f.scale_low), as_pair(T{}, f.shift));
      a[i] = bits(__hfma2(d, as_pair(T{}, f.scale), low));
    }
  }
  static __device__ __forceinline__ void make_unscaled_a(const uint32_t (&words)[4], int step, uint32_t (&a)[4]) {
    int4x8_to_pairs<T>(words[step], a);
  }
};

// int8 weights have one scale a row, which the epilogue multiplies by.
template <bool kByGroup>
struct NoScales {
  struct Factors {};
  static constexpr int kChunkBlocks = 1 << 30, kBytes = 0;
  __device__ NoScales(const WgmmaArgs&, uint32_t, int) {}
  __device__ __forceinline__ void prefetch(int, int) {}
  __device__ __forceinline__ void turn() {}
  __device__ __forceinline__ Factors factors(int) const { return {}; }
};

template <typename T>
struct Int8Wgmma {
  using Element = T;
  using Accumulator = float;
  static constexpr int kSteps = 4, kTileBytes = 1024, kBlockK = 64, kGroup = 128;
  static constexpr bool kDirect = false;
  static constexpr bool by_group(int) { return false; }
  template <bool kByGroup>
  using Factors = typename NoScales<kByGroup>::Factors;
  template <bool kByGroup>
  using Scales = NoScales<kByGroup>;
  static __device__ __forceinline__ void load_words(uint32_t tile, int lane, uint32_t (&words)[8]) {
    const uint4 v = load_smem16(tile + lane * 16), u = load_smem16(tile + 512 + lane * 16);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    words[4] = u.x, words[5] = u.y, words[6] = u.z, words[7] = u.w;
  }
  static __device__ __forceinline__ void make_a(const uint32_t (&words)[8], int step, const Factors<false>&,
                                                uint32_t (&a)[4]) {
    int8x4_to_interleaved_pairs<T>(words[2 * step], a[0], a[1]);
    int8x4_to_interleaved_pairs<T>(words[2 * step + 1], a[2], a[3]);
  }
};

struct Int8x8Wgmma {
  using Element = int8_t;
  using Accumulator = int32_t;
  static constexpr int kSteps = 4, kTileBytes = 2048, kBlockK = 128, kGroup = 128;
  static constexpr bool kDirect = true;  // multiplied from shared memory
  static constexpr bool by_group(int) { return false; }
  template <bool kByGroup>
  using Factors = typename NoScales<kByGroup>::Factors;
  template <bool kByGroup>
  using Scales = NoScales<kByGroup>;
  // Of 64 rows: eight have 1024 bytes of a block, 128 for 16 columns, two of these a step.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t tiles) {
    return core_matrix_descriptor(tiles, 128, 1024);
  }
  static constexpr int kDescriptorStep = 256 / 16;
};

// ---- kernel -------------------------------------------------------------------------------------------------------------

template <class Format, typename Y, int kTokens, int kConsumers, int kMembers>
struct WgmmaMatmul {
  using Accumulator = typename Format::Accumulator;
  static constexpr bool kByGroup = Format::by_group(kTokens);
  using Scales = typename Format::template Scales<kByGroup>;
  using Factors = typename Format::template Factors<kByGroup>;
  static constexpr int kThreads = 128 * (kConsumers + 1), kRowsPerCta = 64 * kConsumers, kTilesPerCta = 4 * kConsumers;
  static constexpr int kStageBlocks = kTokens < 256 ? 128 / Format::kBlockK : 1;  // of K
  static constexpr int kStageFactors =
      kStageBlocks * Format::kBlockK <= Format::kGroup ? 1 : kStageBlocks * Format::kBlockK / Format::kGroup;
  static constexpr int kXBytes = kTokens * 128;
  static constexpr int kWeightBytes = kTilesPerCta * Format::kTileBytes;
  static constexpr int kStageBytes = kStageBlocks * (kXBytes + kWeightBytes);
  static constexpr int kWords = Format::kTileBytes / 128;  // of a lane, a block
  // The result leaves through shared memory, at most 128 tokens at a time.
  static constexpr int kStagedTokens = kTokens < 128 ? kTokens : 128;
  static constexpr int kOutPitch = kRowsPerCta * 2 + 16;
  static constexpr int kOutBytes = kStagedTokens * kOutPitch;
  static constexpr int kScaleBytes = 4 * kConsumers * Scales::kBytes;
  static constexpr int kSumBytes = kRowsPerCta * kTokens * 4;  // where ranks split K
  static constexpr int kMaxStages = 8;
  static constexpr int kBatchSteps = kStageBlocks * Format::kSteps / 2;
  // By group: the sums of x of a stage, and who leaves a stage, warps of consumers and those that sum.
  static constexpr int kSumWarps = 2;
  static constexpr int kXSumBytes = kByGroup ? kStageFactors * kTokens * 4 : 0;  // a stage
  static constexpr int kPieceSteps = kConsumers > 2 && kTokens > 32 ? 2 : Format::kSteps;  // what registers allow
  static constexpr int kLeavers = kByGroup ? 4 * kConsumers + kSumWarps : kConsumers;

  static __host__ __device__ int ring_bytes(int stages, int ranks) {
    const int ring = stages * kStageBytes;
    return ranks > 1 && ring < kSumBytes ? kSumBytes : ring;
  }
  static __host__ __device__ int smem_bytes(int stages, int ranks) {
    return 1024 + ring_bytes(stages, ranks) + kOutBytes + kScaleBytes +
           kMaxStages * (kXSumBytes + 3 * 8);
  }

  struct Tile {
    int token0;
    int row_tile;  // of the calling thread's warpgroup
    int row_block;
  };
  struct Work {
    const WgmmaArgs& args;
    int ranks, rank, member;  // of the cluster
    int first, step;          // tiles of this cluster
    int tiles;
    int begin, end;  // blocks of K
    bool gated;
    __device__ explicit Work(const WgmmaArgs& a) : args(a) {
      const int size = uniform(cluster_size()), at = uniform(cluster_rank());
      ranks = size / kMembers, rank = at / kMembers, member = at % kMembers;
      first = uniform(blockIdx.x / size), step = uniform(gridDim.x / size);
      tiles = (a.row_blocks + kMembers - 1) / kMembers * a.token_tiles;
      const int units = a.blocks * Format::kBlockK / 128;  // K is split by 128, so that no group is
      begin = uniform(units * rank / ranks) * (128 / Format::kBlockK);
      end = uniform(units * (rank + 1) / ranks) * (128 / Format::kBlockK);
      gated = a.epilogue.gate != Gate::kNone;
    }
    __device__ __forceinline__ Tile tile(int index, int group) const {
      const int row_group = index / args.token_tiles, row_block = row_group * kMembers + member;
      return {(index - row_group * args.token_tiles) * kTokens, row_block * kTilesPerCta + group * 4, row_block};
    }
  };

  // mbarriers, one of each a stage.
  struct Barriers {
    uint32_t full, empty, summed;
  };

  static __device__ void produce(const Work& work, uint32_t ring, const Barriers& barriers) {
    const uint32_t full = barriers.full, empty = barriers.empty;
    const WgmmaArgs& args = work.args;
    const auto copy_weights = [&](const Tile& tile, int block, int stage) {
#pragma unroll
      for (int i = 0; i < kStageBlocks * kConsumers; ++i) {
        tensor_copy(ring + stage * kStageBytes + kStageBlocks * kXBytes + i * 4 * Format::kTileBytes, &args.w_map,
                    (block + i / kConsumers) * (Format::kTileBytes / 8),
                    tile.row_block * kTilesPerCta + i % kConsumers * 4, full + stage * 8);
      }
    };
    const auto copy_x = [&](const Tile& tile, int block, int stage) {
#pragma unroll
      for (int i = 0; i < kStageBlocks; ++i) {
        const int column = (block + i) * Format::kBlockK, part = kTokens / kMembers * work.member;
        const uint32_t to = ring + stage * kStageBytes + i * kXBytes + part * 128;
        if constexpr (kMembers == 1) {
          tensor_copy(to, &args.x_map, column, tile.token0, full + stage * 8);
        } else {
          const uint16_t all = ((1 << kMembers) - 1) << (work.rank * kMembers);
          tensor_copy_multicast(to, &args.x_map, column, tile.token0 + part, full + stage * 8, all);
        }
      }
    };
    // The first stages' weights do not wait for the previous kernel.
    int ahead = 0;
    if (work.first < work.tiles) {
      const Tile tile = work.tile(work.first, 0);
      ahead = min(args.stages, (work.end - work.begin) / kStageBlocks);
      for (int s = 0; s < ahead; ++s) {
        mbarrier_arrive_expect(full + s * 8, kStageBytes);
        copy_weights(tile, work.begin + s * kStageBlocks, s);
      }
    }
    wait_for_previous_kernel();
    RingPosition at;
    bool first_round = true;
    for (int index = work.first; index < work.tiles; index += work.step) {
      const Tile tile = work.tile(index, 0);
      for (int block = work.begin; block < work.end; block += kStageBlocks) {
        if (ahead > 0) {
          --ahead;
        } else {
          if (!first_round) mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
          mbarrier_arrive_expect(full + at.stage * 8, kStageBytes);
          copy_weights(tile, block, at.stage);
        }
        copy_x(tile, block, at.stage);
        at.advance(args.stages);
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
    for (int index = work.first; index < work.tiles; index += work.step) {
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
                                                           int row_tile, RingPosition& at,
                                                           float (&sums)[kTokens / 2]) {
    static_assert(kStageBlocks == 2 && kStageFactors <= 2);
    constexpr int kSteps = kPieceSteps, kPieces = kStageBlocks * Format::kSteps / kSteps;
    constexpr int kBlockPieces = Format::kSteps / kSteps, kGroupPieces = kPieces / kStageFactors;
    const int lane = threadIdx.x % 32;
    const uint64_t x_descriptor = matrix_descriptor(ring);
    uint32_t a[2][kSteps][4], words[kWords];
    float part[kTokens / 2];
    const auto load = [&](int stage, int i) {
      Format::load_words(my_words + stage * kStageBytes + i * kWeightBytes, lane, words);
    };
    const auto make = [&](int piece) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        Format::make_unscaled_a(words, piece % kBlockPieces * kSteps + j, a[piece % 2][j]);
      }
    };
    const auto multiply = [&](int piece) {
      const int i = piece / kBlockPieces, first = piece % kBlockPieces * kSteps;
      const uint64_t b = x_descriptor + (at.stage * kStageBytes + i * kXBytes) / 16 + first * 2;
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
        if (then % kBlockPieces == 0) load(then == 0 ? next.stage : at.stage, then / kBlockPieces);
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
      Factors factors[kStageFactors];
#pragma unroll
      for (int i = 0; i < kStageFactors; ++i) {
        factors[i] = scales.factors(chunk_block * Format::kBlockK / Format::kGroup + i);
      }
      mbarrier_wait(barriers.full + at.stage * 8, at.parity);
      const uint32_t from = my_words + at.stage * kStageBytes;
      uint32_t words[kStageBlocks][kWords];
#pragma unroll
      for (int i = 0; i < kStageBlocks; ++i) Format::load_words(from + i * kWeightBytes, lane, words[i]);
      // Two batches a stage, in turn: while the tensor cores work on one, the fragments of the other are made.
#pragma unroll
      for (int batch = 0; batch < 2; ++batch) {
#pragma unroll
        for (int j = 0; j < kBatchSteps; ++j) {
          const int s = batch * kBatchSteps + j, i = s / Format::kSteps, step = s % Format::kSteps;
          constexpr int kStepK = Format::kBlockK / Format::kSteps;
          Format::make_a(words[i], step, factors[s * kStepK / Format::kGroup], a[batch][j]);
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

  static __device__ void consume(const Work& work, uint32_t ring, uint32_t out, uint32_t scale_smem, uint32_t x_sums,
                                 const Barriers& barriers) {
    const WgmmaArgs& args = work.args;
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const uint32_t my_words = ring + kStageBlocks * kXBytes + (group * 4 + warp) * Format::kTileBytes;
    Scales scales(args, scale_smem + (group * 4 + warp) * Scales::kBytes, lane);
    const auto my_tile = [&](const Tile& tile) { return min(tile.row_tile + warp, args.row_tiles - 1); };
    RingPosition at;
    Accumulator sums[kTokens / 2];
    if (work.first < work.tiles) scales.prefetch(my_tile(work.tile(work.first, group)), work.begin);
    wait_for_previous_kernel();
    for (int index = work.first; index < work.tiles; index += work.step) {
      const Tile tile = work.tile(index, group);
      if constexpr (kByGroup) {
        multiply_by_group(work, ring, my_words, x_sums, barriers, scales, my_tile(tile), at, sums);
      } else if constexpr (Format::kDirect) {
        multiply_direct(work, ring, barriers, at, sums);
      } else {
        multiply(work, ring, my_words, barriers, scales, my_tile(tile), at, sums);
      }
      const auto prefetch_next = [&] {
        if (index + work.step < work.tiles) scales.prefetch(my_tile(work.tile(index + work.step, group)), work.begin);
      };
      if (kConsumers == 2) prefetch_next();
      if (work.ranks > 1) {
        combine(work, ring, out, tile, sums);
      } else {
        store(work, out, tile, 0, kTokens / 8, [&](int j, Accumulator(&v)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = sums[4 * j + i];
        });
      }
      __syncwarp();  // the stores return lane by lane, and aligned instructions follow
      if (kConsumers > 2) prefetch_next();  // no registers for it before
    }
  }

  // Tokens 8j … for j in [j0, j1) to y, 16-bit ones through shared memory. fetch(j, v) gives a lane's four sums of them.
  template <typename F>
  static __device__ __forceinline__ void store(const Work& work, uint32_t out, const Tile& tile, int j0, int j1,
                                               F&& fetch) {
    const WgmmaArgs& args = work.args;
    const Epilogue& epilogue = args.epilogue;
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const RowTerms terms(epilogue, tile.row_tile * 16 + warp * 16 + lane / 4);
    if constexpr (sizeof(Y) == 4) {  // eight lanes fill a 32-byte sector
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        if (j < j0 || j >= j1) continue;
        Accumulator sums[4];
        fetch(j, sums);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = tile.token0 + 8 * j + 2 * (lane % 4) + i;
          if (token < args.m) epilogue.store_pair(token, terms.row, sums[i], sums[i + 2]);
        }
      }
    } else {
      stage_and_store(work, out, tile, j0, j1, terms, fetch);
    }
  }

  template <typename F>
  static __device__ __forceinline__ void stage_and_store(const Work& work, uint32_t out, const Tile& tile, int j0,
                                                         int j1, const RowTerms& terms, F&& fetch) {
    const WgmmaArgs& args = work.args;
    const Epilogue& epilogue = args.epilogue;
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const bool gated = work.gated;
    const int row = group * 64 + warp * 16;
    const uint32_t to = out + lane % 8 * kOutPitch + (gated ? row / 2 : row + lane / 8 % 2 * 8) * 2;
    constexpr int kTilesStaged = kStagedTokens / 8;
#pragma unroll
    for (int half = 0; half < kTokens / kStagedTokens; ++half) {
      barrier(kConsumerBarrier, 128 * kConsumers);  // the buffer is free
#pragma unroll
      for (int k = 0; k < kTilesStaged; ++k) {
        const int j = half * kTilesStaged + k;
        if (j < j0 || j >= j1) continue;
        Accumulator sums[4];
        fetch(j, sums);
        const int token = tile.token0 + 8 * j + 2 * (lane % 4);
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = terms.value(epilogue, min(token + i % 2, args.m - 1), i / 2, sums[i]);
        const uint32_t at = to + 8 * k * kOutPitch;
        if (gated) {
          const Gate gate = epilogue.gate;
          store_matrix_transposed(at, pack_pair<Y>(gate_value(gate, v[0]) * v[2], gate_value(gate, v[1]) * v[3]));
        } else {
          store_two_matrices_transposed(at, pack_pair<Y>(v[0], v[1]), pack_pair<Y>(v[2], v[3]));
        }
      }
      barrier(kConsumerBarrier, 128 * kConsumers);
      store_rows(work, out, tile, half * kTilesStaged, j0, j1);
    }
  }

  // From the staging buffer to y, eight columns a thread.
  static __device__ __forceinline__ void store_rows(const Work& work, uint32_t out, const Tile& tile, int first_j,
                                                    int j0, int j1) {
    const WgmmaArgs& args = work.args;
    const Epilogue& epilogue = args.epilogue;
    const bool wide = epilogue.y_stride % 8 == 0;
    const int columns = work.gated ? kRowsPerCta / 2 : kRowsPerCta, limit = work.gated ? epilogue.n / 2 : epilogue.n;
    const int shift = (kRowsPerCta == 256 ? 5 : 4) - (work.gated ? 1 : 0);  // log2 of the pieces of a token
    const int column = tile.row_block * columns + (threadIdx.x & ((1 << shift) - 1)) * 8;
    const int last = min(min(j1 - first_j, kStagedTokens / 8) * 8, args.m - tile.token0 - first_j * 8);
    if (column >= limit) return;
    Y* y = static_cast<Y*>(epilogue.y);
    const Y* residual = static_cast<const Y*>(epilogue.residual);
    const int step = 128 * kConsumers >> shift;
#pragma unroll 2
    for (int i = ((threadIdx.x - 128) >> shift) + max(j0 - first_j, 0) * 8; i < last; i += step) {
      const uint32_t from = out + i * kOutPitch + (threadIdx.x & ((1 << shift) - 1)) * 16;
      Pack<Y, 8> v = as_pack(load_smem16(from));
      const int64_t at = int64_t(tile.token0 + first_j * 8 + i) * epilogue.y_stride + column;
      if (residual != nullptr) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (column + c < limit) v.v[c] = from_float<Y>(to_float(v.v[c]) + to_float(residual[at + c]));
        }
      }
      if (wide && column + 8 <= limit) {
        *reinterpret_cast<Pack<Y, 8>*>(y + at) = v;
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (column + c < limit) y[at + c] = v.v[c];
        }
      }
    }
  }
  static __device__ __forceinline__ Pack<Y, 8> as_pack(const uint4& v) {
    return *reinterpret_cast<const Pack<Y, 8>*>(&v);
  }

  // Ranks that split K: each leaves its sums in shared memory and adds up its share of the tokens.
  static __device__ void combine(const Work& work, uint32_t ring, uint32_t out, const Tile& tile,
                                 const Accumulator (&sums)[kTokens / 2]) {
    const int thread = threadIdx.x - 128;
    barrier(kConsumerBarrier, 128 * kConsumers);  // all are done with the ring
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      store_smem16(ring + (j * 128 * kConsumers + thread) * 16, *reinterpret_cast<const uint4*>(&sums[4 * j]));
    }
    cluster_sync();
    const int j0 = kTokens / 8 * work.rank / work.ranks, j1 = kTokens / 8 * (work.rank + 1) / work.ranks;
    store(work, out, tile, j0, j1, [&](int j, Accumulator(&total)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] = 0;
      for (int r = 0; r < work.ranks; ++r) {
        const uint4 v =
            load_cluster16(map_to_rank(ring + (j * 128 * kConsumers + thread) * 16, r * kMembers + work.member));
        const auto* values = reinterpret_cast<const Accumulator*>(&v);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += values[i];
      }
    });
  }

  static __device__ void run(const WgmmaArgs& args) {
    extern __shared__ unsigned char smem[];
    const uint32_t ring = uniform((smem_address(smem) + 1023) / 1024 * 1024);  // the swizzle's period
    const Work work(args);
    const uint32_t out = ring + ring_bytes(args.stages, work.ranks), scale_smem = out + kOutBytes;
    const uint32_t x_sums = scale_smem + kScaleBytes, full = x_sums + kMaxStages * kXSumBytes;
    const Barriers barriers{full, full + kMaxStages * 8, full + 2 * kMaxStages * 8};
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&args.x_map);
      prefetch_tensor_map(&args.w_map);
      for (int s = 0; s < args.stages; ++s) {
        mbarrier_init(barriers.full + s * 8, 1);
        mbarrier_init(barriers.empty + s * 8, kLeavers * kMembers);
        if constexpr (kByGroup) mbarrier_init(barriers.summed + s * 8, kSumWarps);
      }
      mbarrier_init_fence();
    }
    if (cluster_size() > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    let_next_kernel_start();
    // What a launch allots is shared out anew: 40 · 128 + 232 · 256 ≤ 168 · 384, 32 · 128 + 112 · 512 ≤ 96 · 640.
    if (threadIdx.x < 128) {
      give_registers<kConsumers == 2 ? 40 : 32>();
      if (threadIdx.x == 0) produce(work, ring, barriers);
      if constexpr (kByGroup) {
        if (threadIdx.x / 32 - 1 < kSumWarps) sum_x(work, ring, x_sums, barriers);
      }
      __syncwarp();
      if (work.ranks > 1) cluster_sync();  // the consumers' in combine
    } else {
      take_registers<kConsumers == 2 ? 232 : 112>();
      consume(work, ring, out, scale_smem, x_sums, barriers);
    }
    if (cluster_size() > 1) cluster_sync();  // nobody leaves while the others read its sums or arrive on its barriers
  }
};

template <class Format, typename Y, int kTokens, int kConsumers, int kMembers>
__global__ void __launch_bounds__(128 * (kConsumers + 1), 1)
    wgmma_matmul_kernel(const __grid_constant__ WgmmaArgs args) {
#ifdef FASTINFER_SM90A
  WgmmaMatmul<Format, Y, kTokens, kConsumers, kMembers>::run(args);
#else
  __trap();  // rather than leave y as it was
#endif
}

// ---- launch -------------------------------------------------------------------------------------------------------------

struct WgmmaPlan {
  int ranks = 1;           // that split K
  bool dependent = false;  // start before the previous kernel has finished
};

template <class Format, typename Y, int kTokens, int kConsumers, int kMembers>
void launch_wgmma(const char* op, WgmmaArgs args, const Tensor& x, const void* w, const WgmmaPlan& plan,
                  const LaunchContext& context) {
  using Kernel = WgmmaMatmul<Format, Y, kTokens, kConsumers, kMembers>;
  args.blocks = static_cast<int>(x.size(1)) / Format::kBlockK;
  args.x_map = token_map(op, x, kTokens / kMembers);
  args.w_map = weight_map(op, w, args.row_tiles, args.blocks, Format::kTileBytes);
  args.row_blocks = (args.row_tiles + Kernel::kTilesPerCta - 1) / Kernel::kTilesPerCta;
  args.token_tiles = (args.m + kTokens - 1) / kTokens;
  const int limit = context.limits().smem_per_block,
            ranks = std::min({plan.ranks, static_cast<int>(x.size(1)) / 128, kTokens / 8});
  args.stages = 2;
  while (args.stages < Kernel::kMaxStages && Kernel::smem_bytes(args.stages + 1, ranks) <= limit) ++args.stages;
  const int smem_bytes = Kernel::smem_bytes(args.stages, ranks);
  const auto kernel = wgmma_matmul_kernel<Format, Y, kTokens, kConsumers, kMembers>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  // Ranks that split K make one tile only: their ring becomes the place where their sums meet.
  const int64_t tiles = int64_t((args.row_blocks + kMembers - 1) / kMembers) * args.token_tiles;
  const int size = ranks * kMembers;
  const int64_t clusters =
      ranks > 1 ? tiles
                : std::min<int64_t>(tiles, resident_clusters(kernel, Kernel::kThreads, size, smem_bytes, context));
  launch_clusters(op, kernel, clusters * size, Kernel::kThreads, size, smem_bytes, plan.dependent, args, context);
}

}  // namespace fastinfer
