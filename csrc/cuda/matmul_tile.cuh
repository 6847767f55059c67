// matmul_tile: y[M, N] = x[M, K] · dequant(w)[N, K]ᵀ for every weight format, the one kernel behind the quantised matmuls
// Source    own design: weights are the mma's A operand, so that 8 tokens cost as much as one, and go from a copy ring
//           that each warp has to itself straight to registers
// Layout    LAYOUTS.md#int8-row, #int4-row
// Requires  sm80+; rows of x and w 16-byte aligned, a multiple of 16 bytes long
// Mapping   weights are rows (mma's m16), tokens are columns (mma's n8). A block owns 32·kRowWarps rows × 8·kTokenTiles
//           tokens; its warps split the rows in kRowWarps and K in kSlices, chunk by chunk, and add up at the end:
//
//             K →   chunk 0   chunk 1   chunk 2   chunk 3        rows 32·i … of a chunk, one warp: lane 4g + t copies
//                 ┌─────────┬─────────┬─────────┬─────────┐      64 bytes of rows g, g+8, g+16, g+24, 16 bytes a lane
//             N ↓ │ warp 0  │ warp 2  │ warp 0  │ warp 2  │
//                 ├─────────┼─────────┼─────────┼─────────┤      kRowWarps = 2, kSlices = 2
//                 │ warp 1  │ warp 3  │ warp 1  │ warp 3  │
//                 └─────────┴─────────┴─────────┴─────────┘
//
//           The dot product may visit K in any order, so lanes take it in the order their 16-byte weight loads hold it and
//           read the same positions of x. A slice's warps share a ring of `stages` x tiles; weights are private to a warp.
//           All of a block's shared memory is the ring (2 to 4 stages); launch_few_tokens and launch_many_tokens pick shapes.
// Bound     memory up to M ≈ 32: bytes = weights + scales (x comes from L2); then mma.sync and its lock-step phases
// Verified  tests/test_int8_matmul.py, test_int8_scaled_matmul.py, test_int4_matmul.py
#pragma once

#include <algorithm>

#include "common/cuda.cuh"
#include "common/mma.cuh"

namespace fastinfer {

struct TileArgs {
  const void* x = nullptr;         // [M, K] fp16, bf16 or int8
  const void* w = nullptr;         // [N, K] int8 or [N, K/2] pairs of 4 bits
  const void* w_scale = nullptr;   // [N] fp32, or [N, groups] of scale_type
  const void* w_zero = nullptr;    // [N, groups] of scale_type (int4)
  const float* x_scale = nullptr;  // [M] (int8 activations)
  const float* x_sums = nullptr;   // [K / fold, sums_stride] sums of x over k, a column a token (prepared int4)
  const void* bias = nullptr;      // [N] of bias_type, or null
  void* y = nullptr;               // [M, N] of y_type
  int m = 0, n = 0, k = 0;
  int64_t x_stride = 0, w_stride = 0;  // bytes from row to row
  int groups = 0, group_shift = 0;     // K/G; log2 G (int4)
  int sums_stride = 0;                 // M, rounded up to a multiple of 64
  Element scale_type{}, bias_type{}, y_type{};
  int stages = 2;    // of the copy ring, set by the launcher
  int x_tokens = 0;  // tokens an x tile has room for, set by the launcher
};

// The last steps of the int8 result, rounded alike in every kernel: a row must not depend on which one ran.
__device__ __forceinline__ float scaled_sum(int32_t sum, float x_scale, float w_scale) {
  return __fmul_rn(__fmul_rn(static_cast<float>(sum), x_scale), w_scale);
}
__device__ __forceinline__ float with_bias(const TileArgs& args, float v, int64_t n) {
  return args.bias == nullptr ? v : __fadd_rn(v, load_float(args.bias, args.bias_type, n));
}

constexpr int kRowTiles = 2;                      // m16 tiles a warp owns
constexpr int kWarpRows = 16 * kRowTiles;         // 32
constexpr int kWarpWeightBytes = kWarpRows * 64;  // of one chunk

// ---- weight formats ---------------------------------------------------------------------------------------------------
// A chunk is 64 bytes of a weight row. A block of it is what one 16-byte piece of x a lane covers: two mma steps.
// piece_lane / piece_block say which lane of a quad and which block the chunk's piece c of x (in memory order) belongs to.

template <typename T>
struct Int8Half {  // int8 weights, fp16 or bf16 activations: lane t owns k = 16t … 16t + 15 of the chunk's 64
  using Accumulator = float;
  using Scale = float;
  static constexpr int kChunk = 64, kBlocks = 2, kXBytes = 2, kFoldBlocks = 1;
  static constexpr bool kGrouped = false, kPrepared = false;
  static __device__ int piece_lane(int c) { return c / 2; }
  static __device__ int piece_block(int c) { return c % 2; }
  static __device__ int weight_slot(int lane) { return lane; }
  static __device__ void load_words(uint32_t rows, int lane, uint32_t (&words)[4]) {
    const uint4 v = load_smem16(rows + lane * 16);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  static __device__ void make_a(int block, const uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t p[2], q[2];
      int8x4_to_pairs<T>(low[2 * block + step], p);
      int8x4_to_pairs<T>(high[2 * block + step], q);
      a[step][0] = p[0], a[step][1] = q[0], a[step][2] = p[1], a[step][3] = q[1];
    }
  }
  static __device__ uint4 make_b(const uint4& x) { return x; }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(c, a, b0, b1);
  }
  static __device__ float scaled(const TileArgs& args, float sum, int, int n) {
    return sum * static_cast<const float*>(args.w_scale)[n];
  }
};

struct Int8Int8 {  // int8 weights and activations: lane t owns k = 16t … 16t + 15 of the chunk's 64
  using Accumulator = int32_t;
  using Scale = float;
  static constexpr int kChunk = 64, kBlocks = 1, kXBytes = 1, kFoldBlocks = 1;
  static constexpr bool kGrouped = false, kPrepared = false;
  static __device__ int piece_lane(int c) { return c; }
  static __device__ int piece_block(int) { return 0; }
  static __device__ int weight_slot(int lane) { return lane; }
  static __device__ void load_words(uint32_t rows, int lane, uint32_t (&words)[4]) {
    const uint4 v = load_smem16(rows + lane * 16);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  static __device__ void make_a(int, const uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t (&a)[2][4]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      a[step][0] = low[2 * step], a[step][1] = high[2 * step];
      a[step][2] = low[2 * step + 1], a[step][3] = high[2 * step + 1];
    }
  }
  static __device__ uint4 make_b(const uint4& x) { return x; }
  static __device__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k32_int8(c, a, b0, b1);
  }
  static __device__ float scaled(const TileArgs& args, int32_t sum, int m, int n) {
    return scaled_sum(sum, args.x_scale[m], static_cast<const float*>(args.w_scale)[n]);
  }
};

// int4 weights, fp16 or bf16 activations. Block b is k = 32b … 32b + 31 of the chunk's 128, lane t owns eight of them: a
// group of 32 never straddles a block. Its word lies in the 16 bytes that lane b copied, hence the transposing reads; the
// slot rotation keeps both the copies and the reads free of bank conflicts.
// Every kFoldBlocks blocks the sums Σ q·x are scaled into the result: s·(Σ q·x − z·Σ x). Σ x comes from an mma against
// ones, which is free while memory is the bound; for more tokens prepare_x writes it, and x in the order of the weights.
template <typename T, typename S, int kFold, bool kPrepare>  // S is the type of the scales and zero points
struct Int4Half {
  using Accumulator = float;
  using Scale = S;
  static constexpr int kChunk = 128, kBlocks = 4, kXBytes = 2, kFoldBlocks = kFold;
  static constexpr bool kGrouped = true, kPrepared = kPrepare;
  static constexpr uint32_t kPairOfOnes = kOnes<T>;
  static constexpr float kOffset = kInt4Offset<T>;
  static __device__ int piece_lane(int c) { return c % 4; }
  static __device__ int piece_block(int c) { return c / 4; }
  static __device__ int weight_slot(int lane) { return (lane & ~3) | ((lane ^ (lane >> 3)) & 3); }
  static __device__ void load_words(uint32_t rows, int lane, uint32_t (&words)[4]) {
#pragma unroll
    for (int b = 0; b < 4; ++b) words[b] = load_smem4(rows + weight_slot((lane & ~3) | b) * 16 + (lane & 3) * 4);
  }
  static __device__ void make_a(int block, const uint32_t (&low)[4], const uint32_t (&high)[4], uint32_t (&a)[2][4]) {
    uint32_t p[4], q[4];
    int4x8_to_pairs<T>(low[block], p);
    int4x8_to_pairs<T>(high[block], q);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      a[step][0] = p[2 * step], a[step][1] = q[2 * step];
      a[step][2] = p[2 * step + 1], a[step][3] = q[2 * step + 1];
    }
  }
  static __device__ uint4 make_b(const uint4& x) { return kPrepared ? x : pair_with_fourth_next(x); }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(c, a, b0, b1);
  }
  static __device__ float scaled(const TileArgs&, float sum, int, int) { return sum; }
};

// ---- kernel -------------------------------------------------------------------------------------------------------------

// Scales and zero points of one chunk for a lane's four weight rows, as stored (converted at their use, not at their load,
// which would wait for it); lane t of a quad holds those of block t.
template <typename S>
struct ChunkScales {
  S scale[2 * kRowTiles], zero[2 * kRowTiles];
};

template <class Format, int kTokenTiles, int kRowWarps, int kSlices>
struct MatmulTile {
  using Accumulator = typename Format::Accumulator;
  using Scale = typename Format::Scale;
  static constexpr int kThreads = 32 * kRowWarps * kSlices;
  static constexpr int kRows = kWarpRows * kRowWarps;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kReduceStride = kRows + 4;  // conflict-free for the accumulator's layout
  static constexpr int kReduceBytes = kSlices * kTokens * kReduceStride * 4;
  // With one token tile, x has room for the tokens there are; else the slots alternate so that copies do not collide.
  static constexpr bool kAlternate = kTokenTiles > 1 && Format::kBlocks > 1;

  static constexpr int kFoldsPerChunk = Format::kPrepared ? Format::kBlocks / Format::kFoldBlocks : 0;

  // An x tile; behind it, where x is prepared, the sums of its tokens over each fold.
  static __host__ __device__ int x_bytes(int x_tokens) {
    return x_tokens * (Format::kChunk * Format::kXBytes + 4 * kFoldsPerChunk);
  }
  static __host__ __device__ int stage_bytes(int x_tokens) {
    return kSlices * (x_bytes(x_tokens) + kRowWarps * kWarpWeightBytes);
  }
  static __device__ uint32_t x_slot(int block, int token, int t, int x_tokens) {
    const int slot = token * 4 + t;
    return 16u * (block * x_tokens * 4 + (kAlternate ? slot ^ ((block & 1) * 4) : slot));
  }
  static __device__ void load_scales(const TileArgs& args, const Scale* const (&scale_row)[2 * kRowTiles], int chunk,
                                     int t, ChunkScales<Scale>& out) {
    const int group = min((chunk * Format::kChunk + t * 32) >> args.group_shift, args.groups - 1);
    const int64_t to_zero = static_cast<const char*>(args.w_zero) - static_cast<const char*>(args.w_scale);
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const Scale* scale = scale_row[r] + group;
      out.scale[r] = __ldg(scale);
      out.zero[r] = __ldg(reinterpret_cast<const Scale*>(reinterpret_cast<const char*>(scale) + to_zero));
    }
  }

  static __device__ void run(const TileArgs& args) {
    extern __shared__ __align__(16) unsigned char smem[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int slice = warp / kRowWarps, row_warp = warp % kRowWarps;
    const int g = lane / 4, t = lane % 4;
    const int m_tiles = (args.m + kTokens - 1) / kTokens;
    const int m0 = static_cast<int>(blockIdx.x % m_tiles) * kTokens;
    const int block_n0 = static_cast<int>(blockIdx.x / m_tiles) * kRows, n0 = block_n0 + row_warp * kWarpRows;
    const int tokens = min(kTokens, args.m - m0), x_tokens = args.x_tokens;
    const int chunks = (args.k + Format::kChunk - 1) / Format::kChunk;

    // This lane's rows g + 8r; rows past the end repeat the last one and are dropped at the end.
    const unsigned char* gmem_w[2 * kRowTiles];
    const Scale* scale_row[2 * kRowTiles];
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int64_t row = min(n0 + 8 * r + g, args.n - 1);
      gmem_w[r] = static_cast<const unsigned char*>(args.w) + row * args.w_stride + slice * 64 + t * 16;
      scale_row[r] = static_cast<const Scale*>(args.w_scale) + row * args.groups;
    }
    const int w_bytes = static_cast<int>(args.w_stride), x_row_bytes = args.k * Format::kXBytes;

    const uint32_t smem_slice =
        smem_address(smem) + slice * args.stages * (x_bytes(x_tokens) + kRowWarps * kWarpWeightBytes);
    const auto smem_w = [&](int stage) { return smem_slice + (stage * kRowWarps + row_warp) * kWarpWeightBytes; };
    const auto smem_x = [&](int stage) {
      return smem_slice + args.stages * kRowWarps * kWarpWeightBytes + stage * x_bytes(x_tokens);
    };

    // The slice's threads share the pieces of x: each takes one piece of every kTokenStep-th token.
    constexpr int kPieces = Format::kChunk * Format::kXBytes / 16, kTokenStep = kRowWarps * 32 / kPieces;
    static_assert(kTokenStep % 2 == 0, "a thread's slots must stay in step");
    const int rank = row_warp * 32 + lane, piece = rank % kPieces, first_token = rank / kPieces;
    const unsigned char* gmem_x = static_cast<const unsigned char*>(args.x) + (m0 + first_token) * args.x_stride +
                                  slice * Format::kChunk * Format::kXBytes + piece * 16;
    const int64_t x_step = kTokenStep * args.x_stride;
    const uint32_t x_offset = x_slot(Format::piece_block(piece), first_token, Format::piece_lane(piece), x_tokens);

    // Called for this slice's chunks in order. Past the end of a row nothing is read and zeros are written.
    const auto copy_chunk = [&](int stage, int chunk) {
      if (chunk < chunks) {
        const bool w_inside = chunk * 64 + t * 16 < w_bytes;
#pragma unroll
        for (int r = 0; r < 2 * kRowTiles; ++r) {
          copy16_stream(smem_w(stage) + r * 512 + Format::weight_slot(lane) * 16, gmem_w[r], w_inside ? 16 : 0);
          gmem_w[r] += kSlices * 64;
        }
        const bool x_inside = chunk * Format::kChunk * Format::kXBytes + piece * 16 < x_row_bytes;
#pragma unroll
        for (int i = 0; i < (kTokens + kTokenStep - 1) / kTokenStep; ++i) {
          if (first_token + i * kTokenStep < tokens) {
            copy16_cached(smem_x(stage) + x_offset + i * kTokenStep * 64, gmem_x + i * x_step, x_inside ? 16 : 0);
          }
        }
        gmem_x += kSlices * Format::kChunk * Format::kXBytes;
        if constexpr (Format::kPrepared) {
          if (rank < kFoldsPerChunk * kTokens / 4) {
            const int fold = chunk * kFoldsPerChunk + rank / (kTokens / 4), token = rank % (kTokens / 4) * 4;
            const bool inside = fold * Format::kFoldBlocks * 32 < args.k;
            copy16_cached(smem_x(stage) + kTokens * Format::kChunk * Format::kXBytes + rank * 16,
                          args.x_sums + int64_t(inside ? fold : 0) * args.sums_stride + m0 + token, inside ? 16 : 0);
          }
        }
      }
      copy_commit();
    };
    // Among the warps that share this slice's x tiles. Slices run apart: one barrier for the block costs up to a quarter.
    // compute-sanitizer's racecheck does not follow barriers of part of a block (it reports hazards across the later
    // __syncthreads); with __syncthreads here, and equal rounds for all slices, it finds none.
    const auto sync_slice = [&] {
      if constexpr (kRowWarps == 1) {
        __syncwarp();
      } else {
        barrier(1 + slice, kRowWarps * 32);
      }
    };

    Accumulator sums[kRowTiles][kTokenTiles][4] = {};
    for (int s = 0; s < args.stages - 1; ++s) copy_chunk(s, slice + s * kSlices);
    ChunkScales<Scale> next;
    if constexpr (Format::kGrouped) load_scales(args, scale_row, slice, t, next);

    int stage = 0;
    for (int chunk = slice; chunk < chunks; chunk += kSlices) {
      copy_wait(args.stages - 2);
      sync_slice();  // this chunk has arrived, and everyone is done with the stage that is filled next
      const int free_stage = stage == 0 ? args.stages - 1 : stage - 1;
      copy_chunk(free_stage, chunk + (args.stages - 1) * kSlices);
      const ChunkScales<Scale> scales = next;
      if constexpr (Format::kGrouped) load_scales(args, scale_row, chunk + kSlices, t, next);
      multiply_chunk(smem_w(stage), smem_x(stage), lane, x_tokens, scales, sums);
      stage = stage + 1 == args.stages ? 0 : stage + 1;
    }
    copy_wait(0);
    __syncthreads();  // the ring becomes the reduction buffer
    reduce_and_store(args, reinterpret_cast<Accumulator*>(smem), slice, row_warp, lane, m0, block_n0, tokens, sums);
  }

  static __device__ void multiply_chunk(uint32_t smem_w, uint32_t smem_x, int lane, int x_tokens,
                                        const ChunkScales<Scale>& raw, Accumulator (&sums)[kRowTiles][kTokenTiles][4]) {
    const int g = lane / 4, t = lane % 4;
    uint32_t words[2 * kRowTiles][4];
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) Format::load_words(smem_w + r * 512, lane, words[r]);
    Fold fold;
    if constexpr (Format::kGrouped) {
      fold.smem_sums = smem_x + kTokens * Format::kChunk * Format::kXBytes + 8 * t;
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        fold.scale[r] = to_float(raw.scale[r]);
        fold.zero[r] = to_float(raw.zero[r]) + Format::kOffset;
      }
    }
#pragma unroll
    for (int block = 0; block < Format::kBlocks; ++block) {
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) Format::make_a(block, words[2 * r], words[2 * r + 1], a[r]);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        // Lanes of absent tokens read some other token: their columns are never stored.
        const int token = kTokenTiles == 1 ? min(g, x_tokens - 1) : 8 * tile + g;
        const uint4 b = Format::make_b(load_smem16(smem_x + x_slot(block, token, t, x_tokens)));
        if constexpr (Format::kGrouped) {
          multiply_grouped(block, tile, a, b, fold, sums);
        } else {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) Format::mma(sums[r][tile], a[r][0], b.x, b.y);
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) Format::mma(sums[r][tile], a[r][1], b.z, b.w);
        }
      }
    }
  }

  // The sums of the running fold, and what scales them.
  struct Fold {
    float part[kRowTiles][kTokenTiles][4], x_sum[kTokenTiles][4];
    float scale[2 * kRowTiles], zero[2 * kRowTiles];
    uint32_t smem_sums;
  };

  static __device__ void multiply_grouped(int block, int tile, const uint32_t (&a)[kRowTiles][2][4], const uint4& b,
                                          Fold& fold, float (&sums)[kRowTiles][kTokenTiles][4]) {
    constexpr uint32_t one = Format::kPairOfOnes;
    const uint32_t ones[4] = {one, one, one, one};
    float (&x_sum)[4] = fold.x_sum[tile];
    if (block % Format::kFoldBlocks == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x_sum[i] = 0.f;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) fold.part[r][tile][i] = 0.f;
      }
    }
    if constexpr (!Format::kPrepared) Format::mma(x_sum, ones, b.x, b.y);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) Format::mma(fold.part[r][tile], a[r][0], b.x, b.y);
    if constexpr (!Format::kPrepared) Format::mma(x_sum, ones, b.z, b.w);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) Format::mma(fold.part[r][tile], a[r][1], b.z, b.w);
    if (block % Format::kFoldBlocks != Format::kFoldBlocks - 1) return;
    if constexpr (Format::kPrepared) {
      const float2 v = load_smem_float2(fold.smem_sums + (block / Format::kFoldBlocks * kTokens + 8 * tile) * 4);
      x_sum[0] = v.x, x_sum[1] = v.y;
    }
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      float scale = fold.scale[r], zero = fold.zero[r];
      if constexpr (Format::kFoldBlocks == 1) {
        scale = __shfl_sync(~0u, scale, block, 4), zero = __shfl_sync(~0u, zero, block, 4);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& sum = sums[r / 2][tile][2 * (r % 2) + i];
        sum = fmaf(scale, fmaf(-zero, x_sum[i], fold.part[r / 2][tile][2 * (r % 2) + i]), sum);
      }
    }
  }

  static __device__ void reduce_and_store(const TileArgs& args, Accumulator* reduce, int slice, int row_warp, int lane,
                                          int m0, int block_n0, int tokens,
                                          const Accumulator (&sums)[kRowTiles][kTokenTiles][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 8 * tile + 2 * t + i, row = row_warp * kWarpRows + 8 * r + g;
          reduce[(slice * kTokens + token) * kReduceStride + row] = sums[r / 2][tile][2 * (r % 2) + i];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
      const int token = i / kRows, row = i % kRows, n = block_n0 + row;
      if (n >= args.n) continue;
      Accumulator sum = 0;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) sum += reduce[(s * kTokens + token) * kReduceStride + row];
      const float v = with_bias(args, Format::scaled(args, sum, m0 + token, n), n);
      store_float(args.y, args.y_type, static_cast<int64_t>(m0 + token) * args.n + n, v);
    }
  }
};

// kResident blocks share a multiprocessor: two hide each other's waits, wide tiles need the registers of one.
template <class Format, int kTokenTiles, int kRowWarps, int kSlices, int kResident>
__global__ void __launch_bounds__(32 * kRowWarps * kSlices, kResident)
    matmul_tile_kernel(const __grid_constant__ TileArgs args) {
  MatmulTile<Format, kTokenTiles, kRowWarps, kSlices>::run(args);
}

// ---- launch -------------------------------------------------------------------------------------------------------------

// Every op takes the canonical layout and the tile layout of its kind.
inline void check_cuda_layout(const char* op, const std::string& layout, const char* tile_layout) {
  FASTINFER_CHECK(op, layout == "row" || layout == tile_layout, "layout must be \"row\" or \"", tile_layout,
                  "\" on CUDA, got \"", layout, "\"");
}

// The arguments all formats share; x and w are aligned matrices (aligned_rows), K is x's, padding included.
inline TileArgs matmul_args(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                            const std::optional<Tensor>& bias, const Tensor& y, const MatmulShape& shape) {
  constexpr int64_t kLimit = int64_t(1) << 30;  // kernels index rows and columns with int, elements with int64
  FASTINFER_CHECK(op, shape.m < kLimit && shape.n < kLimit && shape.k < kLimit, "M, N and K must be below 2^30");
  TileArgs args;
  args.x = x.const_data_ptr();
  args.w = w.const_data_ptr();
  args.w_scale = w_scale.const_data_ptr();
  args.bias = data_or_null(bias);
  args.y = y.mutable_data_ptr();
  args.m = static_cast<int>(shape.m), args.n = static_cast<int>(shape.n), args.k = static_cast<int>(x.size(1));
  args.x_stride = x.size(1) * static_cast<int64_t>(x.element_size());
  args.w_stride = w.size(1);
  args.bias_type = element_of(bias.has_value() ? bias->scalar_type() : ScalarType::Float);
  args.y_type = element_of(y.scalar_type());
  return args;
}

template <class Format, int kTokenTiles, int kRowWarps, int kSlices, int kResident>
void launch_matmul_tile(const char* op, TileArgs args, const LaunchContext& context) {
  using Tile = MatmulTile<Format, kTokenTiles, kRowWarps, kSlices>;
  const auto kernel = matmul_tile_kernel<Format, kTokenTiles, kRowWarps, kSlices, kResident>;
  args.x_tokens = kTokenTiles == 1 ? std::min(args.m, 8) : Tile::kTokens;
  const int stage_bytes = Tile::stage_bytes(args.x_tokens), limit = context.limits().smem_per_block;
  const int share = context.limits().smem_per_multiprocessor / kResident - 1024;
  args.stages = std::clamp(std::min(limit, share) / stage_bytes, 2, 4);
  const int smem_bytes = std::max(args.stages * stage_bytes, Tile::kReduceBytes);
  FASTINFER_CHECK(op, smem_bytes <= limit, "needs ", smem_bytes, " bytes of shared memory a block, this GPU has ",
                  limit);
  const int64_t blocks =
      int64_t((args.m + Tile::kTokens - 1) / Tile::kTokens) * ((args.n + Tile::kRows - 1) / Tile::kRows);
  FASTINFER_CHECK(op, blocks < (int64_t(1) << 31), "the matrices are too large: ", blocks, " blocks");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, smem_bytes, context.stream()>>>(args);
  check_launch(op);
}

// Whether two stages of this block shape, the least it runs with, fit the GPU's shared memory.
template <class Format, int kTokenTiles, int kRowWarps, int kSlices>
bool tile_fits(const LaunchContext& context) {
  using Tile = MatmulTile<Format, kTokenTiles, kRowWarps, kSlices>;
  return std::max(2 * Tile::stage_bytes(Tile::kTokens), Tile::kReduceBytes) <= context.limits().smem_per_block;
}

// Few weight rows: blocks of few rows and many slices of K, so that every multiprocessor gets work.
inline bool is_narrow(const TileArgs& args, const LaunchContext& context) {
  return args.n < 64 * context.limits().multiprocessors;
}

// The shapes below were the fastest of ten on an H200 (benchmarks/NOTES.md); smaller shared memories take the next that fits.
template <class Format>
void launch_few_tokens(const char* op, const TileArgs& args, const LaunchContext& context) {  // M ≤ 16
  const bool narrow = is_narrow(args, context);
  if (args.m > 8) {
    narrow ? launch_matmul_tile<Format, 2, 1, 8, 2>(op, args, context)
           : launch_matmul_tile<Format, 2, 2, 4, 2>(op, args, context);
    return;
  }
  if (!narrow) return launch_matmul_tile<Format, 1, 1, 4, 4>(op, args, context);
  if constexpr (Format::kGrouped) {
    if (tile_fits<Format, 1, 1, 16>(context)) return launch_matmul_tile<Format, 1, 1, 16, 1>(op, args, context);
  }
  launch_matmul_tile<Format, 1, 1, 8, 2>(op, args, context);
}

template <class Format>
void launch_many_tokens(const char* op, const TileArgs& args, const LaunchContext& context) {  // M > 16
  constexpr int kResident = Format::kGrouped ? 1 : 2;
  const bool narrow = is_narrow(args, context);
  if (args.m <= 32 && narrow && tile_fits<Format, 4, 1, 8>(context)) {
    launch_matmul_tile<Format, 4, 1, 8, kResident>(op, args, context);
  } else if ((args.m <= 32 || narrow) && tile_fits<Format, 4, 2, 4>(context)) {
    launch_matmul_tile<Format, 4, 2, 4, kResident>(op, args, context);
  } else if constexpr (Format::kGrouped) {
    launch_matmul_tile<Format, 8, 8, 1, 1>(op, args, context);
  } else {
    launch_matmul_tile<Format, 8, 4, 1, 3>(op, args, context);
  }
}

template <class Format>
void launch_matmul(const char* op, const TileArgs& args, const LaunchContext& context) {
  args.m <= 16 ? launch_few_tokens<Format>(op, args, context) : launch_many_tokens<Format>(op, args, context);
}

}  // namespace fastinfer
