// decode_matmul: y[M, N] = x[M, K] · dequant(w)[N, K]ᵀ for M ≤ 16, every weight format in its tile layout, and 16-bit rows
// Source    own design
// Layout    LAYOUTS.md#tile-w4a16, #tile-w8a16, #tile-w8a8; plain rows, which gates take as halves (epilogue.cuh)
// Requires  sm90; K in whole units of the format; 16-byte aligned operands
// Mapping   weights are the mma's 16-row operand, tokens its columns. A unit is 16 rows × kUnitK columns, 1024 bytes: two
//           16-byte pieces a lane, each warp copying what it multiplies itself. So every warp has a ring of its own and
//           meets the others only where sums are added. The ranks of a cluster split K; x of a rank's slice stays in its
//           shared memory. Within a CTA k_warps warps share a row tile, unit by unit in turn, the others take other tiles:
//
//              K →      rank 0              rank 1            cluster c takes row tiles c, c + clusters, …
//                   ┌────┬────┬────┐   ┌────┬────┬────┐
//              N ↓  │ w0 │ w1 │ w0 │   │ w0 │ w1 │ w0 │       k_warps = 2; wi: unit of warp i
//                   ├────┼────┼────┤   ├────┼────┼────┤
//                   │ w2 │ w3 │ w2 │   │ w2 │ w3 │ w2 │
//                   └────┴────┴────┘   └────┴────┴────┘
//
//           Where warps share tiles their sums meet in slots of shared memory, every `set` of tiles, and are added up in
//           their order. With several ranks each sends its sums to the one that owns them, which adds up at the end, in
//           order too. The rings are filled before the previous kernel has finished (dependent launch): weights do not
//           depend on it.
// Bound     memory: weights + scales
// Verified  tests/test_int4_matmul.py, test_int8_matmul.py, test_int8_scaled_matmul.py, test_linear.py; test_tile_plans.py
//           (every shape and split), test_launch.py (dependent launch)
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/hopper.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/epilogue.cuh"

namespace fastinfer {

struct DecodeArgs {
  const void* x = nullptr;  // [M, K]
  int64_t x_stride = 0;     // bytes from row to row
  const unsigned char* w = nullptr;
  int64_t w_stride = 0;  // bytes from row to row, where w is rows
  const unsigned char* w_scale = nullptr;
  const unsigned char* w_zero = nullptr;
  bool half_scales = false;  // fp16 scales and zero points, else bf16
  bool dependent = false;    // launched before the previous kernel has finished
  bool sums_ahead = false;   // Σ x of every unit once, before the first is multiplied
  Epilogue epilogue;
  int m = 0, units = 0;                            // M; K in units
  int last_row = 0, last_tile = 0;                 // of w
  int tile_rows = 16, second_row = 8;              // where w is rows: from tile to tile, from the first to the ninth
  int entries = 0, longer = 0;                     // row-tile groups of a cluster; how many clusters have one more
  int rank_shift = 0, k_shift = 0, set_shift = 0;  // log2 of: ranks, warps along K, entries of a warp in a set
  int x_pitch = 0;                                 // bytes from token to token in shared memory
  int smem_x = 0, smem_sums = 0, smem_slots = 0, smem_kept = 0;  // offsets; the rings come first
};

// ---- weight formats: what a unit is in memory and how it is multiplied ----------------------------------------------
// Source: where the weights are. seek() makes the position of a lane's share of a unit, advance() goes `step` units on in the
//         same row tile, copy() brings the unit to a stage of a ring.
// Tokens: what a lane holds of a unit's x; load() takes it from where the lane reads each token tile.
// multiply: adds the units of kTiles row tiles, one every kStageBytes of the stage, times x to `sums`.
// kShared: a lane multiplies what other lanes of its warp have copied.

constexpr int kUnitBytes = 1024;  // of weights

// Two steps of the mma an ldmatrix, 64 bytes of x.
template <int kSteps>
__device__ __forceinline__ void load_steps(uint32_t (&b)[kSteps][2], uint32_t x) {
#pragma unroll
  for (int s = 0; s < kSteps; s += 2) {
    uint32_t v[4];
    load_matrices(v, x + s * 32);
    b[s][0] = v[0], b[s][1] = v[1], b[s + 1][0] = v[2], b[s + 1][1] = v[3];
  }
}
template <int kTokenTiles, int kSteps>
struct PlainTokens {
  uint32_t b[kTokenTiles][kSteps][2];
  __device__ __forceinline__ void load(const uint32_t (&x)[kTokenTiles], uint32_t, int) {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) load_steps(b[tile], x[tile]);
  }
};

// A tile layout: units one after the other.
struct TileSource {
  using Position = int;
  const unsigned char* w;  // of this lane
  int units;
  __device__ __forceinline__ TileSource(const DecodeArgs& args, int lane) : w(args.w + lane * 16), units(args.units) {}
  __device__ __forceinline__ void seek(int& at, int tile, int unit) const { at = tile * units + unit; }
  __device__ __forceinline__ void advance(int& at, int step) const { at += step; }
  __device__ __forceinline__ void copy(uint32_t stage, int at, int lane) const {
    const unsigned char* from = w + int64_t(at) * kUnitBytes;
    copy16_stream(stage + lane * 16, from);
    copy16_stream(stage + 512 + lane * 16, from + 512);
  }
};

template <typename T, int kGroup>  // scales and zero points fp16 or bf16
struct Int4Decode {
  using Element = T;
  using Accumulator = float;
  static constexpr bool kShared = false;
  static constexpr int kUnitK = 128, kUnitXBytes = 256, kGroups = kUnitK / kGroup, kSteps = kGroup / 16;
  static constexpr int kStageBytes = kUnitBytes + 2 * kGroups * 128;
  // Σ x of a unit's groups: with few tokens each warp makes them as it goes, which costs less than to wait for them.
  template <int kTokenTiles>
  static constexpr int kSumBytes = kTokenTiles > 1 ? kTokenTiles * kGroups * 32 : 0;

  struct Source : TileSource {
    const unsigned char *scale, *zero;  // of rows g and g + 8, which are side by side
    __device__ __forceinline__ Source(const DecodeArgs& args, int lane)
        : TileSource(args, lane), scale(args.w_scale + lane / 4 * 4), zero(args.w_zero + lane / 4 * 4) {}
    __device__ __forceinline__ void copy(uint32_t stage, int at, int lane) const {
      TileSource::copy(stage, at, lane);
      const int64_t pairs = int64_t(at) * (kGroups * 32);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t to = stage + kUnitBytes + group * 256 + lane * 4;
        copy4(to, scale + pairs + group * 32);
        copy4(to + 128, zero + pairs + group * 32);
      }
    }
  };

  static __device__ __forceinline__ float2 load_pair(uint32_t address, bool half) {
    const uint32_t v = load_smem4(address);
    if (half) return __half22float2(as_half2(v));
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
  }

  template <int kTokenTiles>
  struct Tokens {
    uint32_t b[kTokenTiles][8][2];       // of the unit's mma steps
    float sum[kTokenTiles][kGroups][2];  // Σ x over each group, of this lane's two tokens
    __device__ __forceinline__ void load(const uint32_t (&x)[kTokenTiles], uint32_t sums, int lane) {
      if (kSumBytes<kTokenTiles> > 0 && sums != 0) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          load_steps(b[tile], x[tile]);
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            const float2 v = load_smem_float2(sums + (tile * kGroups + group) * 32 + lane % 4 * 8);
            sum[tile][group][0] = v.x, sum[tile][group][1] = v.y;
          }
        }
      } else {
        load_and_sum(x);
      }
    }
    __device__ __forceinline__ void load_and_sum(const uint32_t (&x)[kTokenTiles]) {
      const uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        load_steps(b[tile], x[tile]);
        float total[4];
#pragma unroll
        for (int s = 0; s < 8; ++s) {
          if (s % kSteps == 0) total[0] = total[1] = total[2] = total[3] = 0.f;
          mma_m16n8k16<T>(total, ones, b[tile][s][0], b[tile][s][1]);
          if (s % kSteps == kSteps - 1) sum[tile][s / kSteps][0] = total[0], sum[tile][s / kSteps][1] = total[1];
        }
      }
    }
  };

  // Of one unit to where load() looks for them.
  template <int kTokenTiles>
  static __device__ __forceinline__ void store_sums(const uint32_t (&x)[kTokenTiles], uint32_t sums, int lane) {
    Tokens<kTokenTiles> tokens;
    tokens.load_and_sum(x);
    if (lane >= 4) return;
#pragma unroll
    for (int i = 0; i < kTokenTiles * kGroups; ++i) {
      const float (&sum)[2] = tokens.sum[i / kGroups][i % kGroups];
      store_smem_float(sums + i * 32 + lane * 8, sum[0]);
      store_smem_float(sums + i * 32 + lane * 8 + 4, sum[1]);
    }
  }

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs& args, uint32_t stage, const Tokens<kTokenTiles>& x,
                                                  int lane, float (&sums)[kTiles][kTokenTiles][4]) {
    constexpr int kChains = kTiles * kTokenTiles == 1 ? 2 : 1;  // independent mma chains hide the latency
    float part[kChains][kTiles][kTokenTiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 words[kTiles];
#pragma unroll
      for (int a = 0; a < kTiles; ++a) words[a] = load_smem16(stage + a * kStageBytes + half * 512 + lane * 16);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int s = 4 * half + step;
        if (s % kSteps == 0) {
#pragma unroll
          for (int i = 0; i < kChains * kTiles * kTokenTiles * 4; ++i) (&part[0][0][0][0])[i] = 0.f;
        }
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          const uint32_t word = step == 0 ? words[a].x : step == 1 ? words[a].y : step == 2 ? words[a].z : words[a].w;
          uint32_t fragment[4];
          int4x8_to_pairs<T>(word, fragment);
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            mma_m16n8k16<T>(part[s % kChains][a][tile], fragment, x.b[tile][s][0], x.b[tile][s][1]);
          }
        }
        if (s % kSteps != kSteps - 1) continue;
        const int group = s / kSteps;
        const uint32_t scales = stage + kUnitBytes + group * 256 + lane * 4;
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          const float2 scale = load_pair(scales + a * kStageBytes, args.half_scales);
          const float2 zero = load_pair(scales + a * kStageBytes + 128, args.half_scales);
          const float zero_low = zero.x + kInt4Offset<T>, zero_high = zero.y + kInt4Offset<T>;
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            float (&sum)[4] = sums[a][tile];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float p = part[0][a][tile][i];
              if constexpr (kChains == 2) p += part[1][a][tile][i];
              p = fmaf(i < 2 ? -zero_low : -zero_high, x.sum[tile][group][i % 2], p);
              sum[i] = fmaf(i < 2 ? scale.x : scale.y, p, sum[i]);
            }
          }
        }
      }
    }
  }
};

struct NoSums {
  template <int kTokenTiles>
  static constexpr int kSumBytes = 0;
};

template <typename T>
struct Int8Decode : NoSums {
  using Element = T;
  using Accumulator = float;
  using Source = TileSource;
  static constexpr bool kShared = false;
  static constexpr int kUnitK = 64, kUnitXBytes = 128, kStageBytes = kUnitBytes;
  template <int kTokenTiles>
  using Tokens = PlainTokens<kTokenTiles, 4>;

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs&, uint32_t stage, const Tokens<kTokenTiles>& x,
                                                  int lane, float (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int a = 0; a < kTiles; ++a) {
        const uint4 v = load_smem16(stage + a * kStageBytes + block * 512 + lane * 16);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t fragment[4];
          int8x4_to_interleaved_pairs<T>(words[2 * step], fragment[0], fragment[1]);
          int8x4_to_interleaved_pairs<T>(words[2 * step + 1], fragment[2], fragment[3]);
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            const uint32_t (&b)[2] = x.b[tile][2 * block + step];
            mma_m16n8k16<T>(sums[a][tile], fragment, b[0], b[1]);
          }
        }
      }
    }
  }
};

struct Int8x8Decode : NoSums {
  using Element = int8_t;
  using Accumulator = int32_t;
  static constexpr bool kShared = true;
  static constexpr int kUnitK = 64, kUnitXBytes = 64, kStageBytes = kUnitBytes;
  template <int kTokenTiles>
  using Tokens = PlainTokens<kTokenTiles, 2>;

  // A unit is half of a block of 128 columns: 512 bytes of rows 0 … 7, and of rows 8 … 15.
  struct Source : TileSource {
    using TileSource::TileSource;
    __device__ __forceinline__ void copy(uint32_t stage, int at, int lane) const {
      const unsigned char* from = w + (int64_t(at) * kUnitBytes - (at & 1) * 512);
      copy16_stream(stage + lane * 16, from);
      copy16_stream(stage + 512 + lane * 16, from + 1024);
    }
  };

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs&, uint32_t stage, const Tokens<kTokenTiles>& x,
                                                  int lane, int32_t (&sums)[kTiles][kTokenTiles][4]) {
    // Of a step's four core matrices the second and fourth are of rows 8 … 15, the third and fourth of columns 16 … 31.
    const uint32_t from = stage + lane / 8 % 2 * 512 + lane / 16 * 128 + lane % 8 * 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int a = 0; a < kTiles; ++a) {
        uint32_t fragment[4];
        load_matrices(fragment, from + a * kStageBytes + step * 256);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          mma_m16n8k32_int8(sums[a][tile], fragment, x.b[tile][step][0], x.b[tile][step][1]);
        }
      }
    }
  }
};

// Weights that are not packed: rows of 16-bit elements. A dot product may visit k in any order, so a lane takes eight
// neighbours of rows g and g + 8 with one access each, and the same eight of a token.
template <typename T>
struct RowsDecode : NoSums {
  using Element = T;
  using Accumulator = float;
  static constexpr bool kShared = false;
  static constexpr int kUnitK = 32, kUnitXBytes = 64, kStageBytes = kUnitBytes;

  struct Source {
    struct Position {
      const unsigned char* w[2];  // rows g and g + 8 of the tile; past the end the last row, which is dropped then
    };
    const DecodeArgs& args;
    int row, column;  // of this lane
    __device__ __forceinline__ Source(const DecodeArgs& a, int lane) : args(a), row(lane / 4), column(lane % 4 * 16) {}
    __device__ __forceinline__ void seek(Position& at, int tile, int unit) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int from = min(tile * args.tile_rows + row + half * args.second_row, args.last_row);
        at.w[half] = args.w + from * args.w_stride + unit * kUnitXBytes + column;
      }
    }
    __device__ __forceinline__ void advance(Position& at, int step) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) at.w[half] += step * kUnitXBytes;
    }
    __device__ __forceinline__ void copy(uint32_t stage, const Position& at, int lane) const {
      copy16_stream(stage + lane * 16, at.w[0]);
      copy16_stream(stage + 512 + lane * 16, at.w[1]);
    }
  };

  template <int kTokenTiles>
  struct Tokens {
    uint4 b[kTokenTiles];
    __device__ __forceinline__ void load(const uint32_t (&x)[kTokenTiles], uint32_t, int) {
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) b[tile] = load_smem16(x[tile]);
    }
  };

  template <int kTiles, int kTokenTiles>
  static __device__ __forceinline__ void multiply(const DecodeArgs&, uint32_t stage, const Tokens<kTokenTiles>& x,
                                                  int lane, float (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int a = 0; a < kTiles; ++a) {
      const uint4 low = load_smem16(stage + a * kStageBytes + lane * 16);
      const uint4 high = load_smem16(stage + a * kStageBytes + 512 + lane * 16);
      const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        mma_m16n8k16<T>(sums[a][tile], first, x.b[tile].x, x.b[tile].y);
        mma_m16n8k16<T>(sums[a][tile], second, x.b[tile].z, x.b[tile].w);
      }
    }
  }
};
template <class Format>
constexpr bool kIsRows = false;
template <typename T>
constexpr bool kIsRows<RowsDecode<T>> = true;

// ---- kernel -------------------------------------------------------------------------------------------------------------

template <class Format, int kTiles, int kTokenTiles, int kDepth, int kWarps>
struct DecodeMatmul {
  using Accumulator = typename Format::Accumulator;
  static constexpr int kThreads = 32 * kWarps, kLogWarps = kWarps == 16 ? 4 : 3;
  static constexpr int kParts = kTiles * kTokenTiles;  // of 512 bytes: a lane's four sums of a row tile and token tile
  static constexpr int kSlotBytes = kParts * 512;
  static constexpr int kStageBytes = kTiles * Format::kStageBytes;
  static constexpr int kRingBytes = kWarps * kDepth * kStageBytes;
  static_assert(sizeof(Accumulator) == 4);

  static constexpr int kSumBytes = Format::template kSumBytes<kTokenTiles>;

  // What a warp works on. Entries are groups of kTiles row tiles: the cluster's first one is `cluster`, its next ones
  // every `clusters`; the warps of one place along K take them in turn.
  struct Work {
    int ranks, rank, cluster, clusters, entries;
    int slice, units;  // first unit and units of the CTA
    int begin, count;  // first unit of this warp, and how many, every k_warps
    int k_warps, k_warp, row_warps, row_warp, row_shift;
    __device__ Work(const DecodeArgs& args, int warp) {
      ranks = 1 << args.rank_shift, rank = blockIdx.x & (ranks - 1);
      cluster = blockIdx.x >> args.rank_shift, clusters = gridDim.x >> args.rank_shift;
      entries = in_register(args.entries + (cluster < args.longer ? 1 : 0));
      k_warps = in_register(1 << args.k_shift), k_warp = warp & (k_warps - 1);
      row_shift = kLogWarps - args.k_shift, row_warps = in_register(1 << row_shift), row_warp = warp >> args.k_shift;
      slice = in_register(args.units * rank >> args.rank_shift);
      units = (args.units * (rank + 1) >> args.rank_shift) - slice;
      begin = in_register(slice + k_warp), count = in_register((units - k_warp + k_warps - 1) >> args.k_shift);
    }
    // The compiler would rather work it out again at every use, in the inner loop.
    static __device__ __forceinline__ int in_register(int v) {
      asm volatile("" : "+r"(v));
      return v;
    }
    __device__ __forceinline__ int tile(int entry, int part) const {
      return (cluster + entry * clusters) * kTiles + part;
    }
  };

  // Copies the warp's units one after the other, entry by entry.
  struct Producer {
    const DecodeArgs& args;
    const Work& work;
    const typename Format::Source source;
    int lane, entry, left;
    typename Format::Source::Position at[kTiles];

    __device__ __forceinline__ Producer(const DecodeArgs& a, const Work& w, int l)
        : args(a), work(w), source(a, l), lane(l), entry(w.row_warp), left(w.count) {
      seek();
    }
    __device__ __forceinline__ void seek() {
#pragma unroll
      for (int a = 0; a < kTiles; ++a) source.seek(at[a], min(work.tile(entry, a), args.last_tile), work.begin);
    }
    // A copy group is committed even when there is no more to copy: the warp counts them.
    __device__ __forceinline__ void copy_next(uint32_t stage) {
      if (entry < work.entries) {
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          source.copy(stage + a * Format::kStageBytes, at[a], lane);
          source.advance(at[a], work.k_warps);
        }
        if (--left == 0) {
          left = work.count, entry += work.row_warps;
          seek();
        }
      }
      copy_commit();
    }
  };

  // The rank's slice of every token to shared memory, by all threads. Not by copies: a thread's own wait for them would be
  // for those of its ring, too.
  struct XLoader {
    static constexpr int kBatch = 8;  // loads of a thread in flight
    const DecodeArgs& args;
    const char* from;
    uint32_t to;
    int left, pieces;                    // of 16 bytes: not yet loaded by this thread and those after it, of a token
    int token = 0, piece = threadIdx.x;  // of this thread's next one
    int token_step = 0, piece_step = kThreads;  // to the one after it
    uint4 v[kBatch];

    __device__ __forceinline__ XLoader(const DecodeArgs& a, const Work& work, uint32_t base)
        : args(a),
          from(static_cast<const char*>(a.x) + int64_t(work.slice) * Format::kUnitXBytes),
          to(base + a.smem_x) {
      pieces = work.units * (Format::kUnitXBytes / 16), left = a.m * pieces - threadIdx.x;
      if (a.m == 1) return;  // divisions take time
      token = uint32_t(piece) / uint32_t(pieces), piece -= token * pieces;
      token_step = uint32_t(kThreads) / uint32_t(pieces), piece_step -= token_step * pieces;
    }
    template <typename F>
    __device__ __forceinline__ void each(int& t, int& p, F&& f) const {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i * kThreads >= left) break;
        f(i);
        t += token_step, p += piece_step;
        if (p >= pieces && args.m > 1) p -= pieces, ++t;
      }
    }
    __device__ __forceinline__ void load() {
      int t = token, p = piece;
      each(t, p, [&](int i) { v[i] = *reinterpret_cast<const uint4*>(from + t * args.x_stride + p * 16); });
    }
    __device__ __forceinline__ void store() {
      each(token, piece, [&](int i) { store_smem16(to + token * args.x_pitch + piece * 16, v[i]); });
      left -= kBatch * kThreads;
    }
  };

  static __device__ __forceinline__ void store_slot(uint32_t slot, int lane,
                                                    const Accumulator (&sums)[kTiles][kTokenTiles][4]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const Accumulator* v = sums[i / kTokenTiles][i % kTokenTiles];
      store_smem16(slot + i * 512 + lane * 16, *reinterpret_cast<const uint4*>(v));
    }
  }

  // The sum of `count` times 16 bytes, `step` bytes apart.
  static __device__ __forceinline__ void add_up(uint32_t from, int step, int count, Accumulator (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 0;
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      const uint4 v = load_smem16(from + k * step);
      const auto* values = reinterpret_cast<const Accumulator*>(&v);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += values[i];
    }
  }

  // Part `part` of an entry to y.
  static __device__ __forceinline__ void finish(const DecodeArgs& args, const Work& work, int entry, int part, int lane,
                                                const Accumulator (&sum)[4]) {
    const int tile = work.tile(entry, part / kTokenTiles);
    if (tile > args.last_tile) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * (part % kTokenTiles) + 2 * (lane % 4) + i;
      if (token < args.m) args.epilogue.store_pair(token, tile * 16 + lane / 4, sum[i], sum[i + 2]);
    }
  }

  // The rank's sums of a part of an entry: to y, or to the rank that owns them.
  static __device__ __forceinline__ void deliver(const DecodeArgs& args, const Work& work, uint32_t base, int entry,
                                                 int part, int lane, const Accumulator (&sum)[4]) {
    if (work.ranks == 1) return finish(args, work, entry, part, lane, sum);
    const int index = entry * kParts + part, owner = index & (work.ranks - 1);
    const int kept = index - owner + work.rank;
    send16(map_to_rank(base + args.smem_kept + kept * 512 + lane * 16, owner), *reinterpret_cast<const uint4*>(sum),
           map_to_rank(base, owner));
  }

  // Adds up what the warps have left of a set, a part a warp.
  static __device__ __forceinline__ void finish_set(const DecodeArgs& args, const Work& work, uint32_t base, int set,
                                                    int warp, int lane) {
    const int size = work.row_warps << args.set_shift, first = set * size;
    const int jobs = min(size, work.entries - first) * kParts;
    const uint32_t buffer = base + args.smem_slots + ((set & 1) << args.set_shift) * kWarps * kSlotBytes;
    for (int job = (warp + set * size * kParts) & (kWarps - 1); job < jobs; job += kWarps) {
      const int local = job / kParts, part = job & (kParts - 1);
      const int place = (local >> work.row_shift) * kWarps + ((local & (work.row_warps - 1)) << args.k_shift);
      Accumulator sum[4];
      add_up(buffer + place * kSlotBytes + part * 512 + lane * 16, kSlotBytes, work.k_warps, sum);
      deliver(args, work, base, first + local, part, lane, sum);
    }
  }

  // Makes the mbarrier for the sums that come from the ranks of the cluster; cluster_wait() is until all have done so.
  static __device__ __forceinline__ void expect_sums(const Work& work, uint32_t arrived, int owned) {
    if (threadIdx.x == 0) {
      mbarrier_init(arrived, 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect(arrived, owned * work.ranks * 512);
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }

  // Fills the rings, waits for the previous kernel and brings the slice of x to shared memory.
  static __device__ __forceinline__ void start_copies(const DecodeArgs& args, const Work& work, Producer& producer,
                                                      uint32_t base, uint32_t ring) {
    XLoader loader(args, work, base);
    if (!args.dependent) loader.load();  // before the weights, which would hold it up
#pragma unroll
    for (int i = 0; i < kDepth; ++i) producer.copy_next(ring + i * kStageBytes);
    for (int i = threadIdx.x; i < work.entries * kTiles; i += kThreads) {
      args.epilogue.prefetch(min(work.tile(i / kTiles, i % kTiles), args.last_tile) * 16);
    }
    wait_for_previous_kernel();
    if (args.dependent) loader.load();
    loader.store();
    while (loader.left > 0) {
      loader.load();
      loader.store();
    }
    __syncthreads();
    let_next_kernel_start();  // its copies would have held up those of x
  }

  // Σ x of all the CTA's units, where the warps will look for them.
  static __device__ __forceinline__ void sum_ahead(const Work& work, const uint32_t (&x)[kTokenTiles], uint32_t sums,
                                                   int warp, int lane) {
    if constexpr (kSumBytes > 0) {
      for (int unit = warp; unit < work.units; unit += kWarps) {
        uint32_t from[kTokenTiles];
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) from[tile] = x[tile] + unit * Format::kUnitXBytes;
        Format::template store_sums<kTokenTiles>(from, sums + unit * kSumBytes, lane);
      }
      __syncthreads();
    }
  }

  // Adds up what the ranks have sent, the `owned` parts of entries, to y.
  static __device__ __forceinline__ void finish_owned(const DecodeArgs& args, const Work& work, uint32_t base,
                                                      int owned, int warp, int lane) {
    for (int i = warp; i < owned; i += kWarps) {
      const int index = (i << args.rank_shift) + work.rank;
      Accumulator sum[4];
      add_up(base + args.smem_kept + (index - work.rank) * 512 + lane * 16, 512, work.ranks, sum);
      finish(args, work, index / kParts, index % kParts, lane, sum);
    }
  }

  static __device__ void run(const DecodeArgs& args) {
    extern __shared__ __align__(16) unsigned char smem[];
    const uint32_t base = smem_address(smem), arrived = base;  // mbarrier of the sums that ranks send
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const Work work(args, warp);
    const uint32_t ring = base + 128 + warp * (kDepth * kStageBytes);
    const int parts = work.entries * kParts, owned = (parts - work.rank + work.ranks - 1) >> args.rank_shift;
    if (work.ranks > 1) expect_sums(work, arrived, owned);
    Producer producer(args, work, lane);
    start_copies(args, work, producer, base, ring);

    uint32_t x[kTokenTiles];  // of the warp's first unit; absent tokens repeat the last one and are not stored
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const int row = kIsRows<Format> ? lane / 4 : lane % 8, column = kIsRows<Format> ? lane % 4 : lane / 8;
      x[tile] = base + args.smem_x + min(8 * tile + row, args.m - 1) * args.x_pitch + column * 16;
    }
    uint32_t sums_of_x = args.sums_ahead ? base + args.smem_sums : 0;
    if (args.sums_ahead) sum_ahead(work, x, sums_of_x, warp, lane);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) x[tile] += work.k_warp * Format::kUnitXBytes;
    if (args.sums_ahead) sums_of_x += work.k_warp * kSumBytes;
    if (work.ranks > 1) cluster_wait();

    uint32_t stage = ring;
    const auto multiply_entry = [&](Accumulator(&sums)[kTiles][kTokenTiles][4]) {
      uint32_t from[kTokenTiles], from_sums = sums_of_x;
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) from[tile] = x[tile];
      for (int unit = 0; unit < work.count; ++unit) {
        typename Format::template Tokens<kTokenTiles> tokens;
        tokens.load(from, from_sums, lane);
        copy_wait_for<kDepth - 1>();
        if constexpr (Format::kShared) __syncwarp();
        Format::template multiply<kTiles, kTokenTiles>(args, stage, tokens, lane, sums);
        if constexpr (Format::kShared) __syncwarp();
        producer.copy_next(stage);
        stage = stage + kStageBytes == ring + kDepth * kStageBytes ? ring : stage + kStageBytes;
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) from[tile] += work.k_warps * Format::kUnitXBytes;
        if (args.sums_ahead) from_sums += work.k_warps * kSumBytes;
      }
    };
    if (work.k_warps == 1) {
      for (int entry = work.row_warp; entry < work.entries; entry += kWarps) {
        Accumulator sums[kTiles][kTokenTiles][4] = {};
        multiply_entry(sums);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          deliver(args, work, base, entry, part, lane, sums[part / kTokenTiles][part % kTokenTiles]);
        }
      }
    } else {
      const int size = work.row_warps << args.set_shift;
      int entry = work.row_warp;
      for (int set = 0; set * size < work.entries; ++set) {
        uint32_t slot = base + args.smem_slots + (((set & 1) << args.set_shift) * kWarps + warp) * kSlotBytes;
        for (const int end = min((set + 1) * size, work.entries); entry < end; entry += work.row_warps) {
          Accumulator sums[kTiles][kTokenTiles][4] = {};
          multiply_entry(sums);
          store_slot(slot, lane, sums);
          slot += kWarps * kSlotBytes;
        }
        __syncthreads();
        finish_set(args, work, base, set, warp, lane);
      }
    }
    if (work.ranks == 1) return;

    mbarrier_wait_cluster(arrived, 0);
    finish_owned(args, work, base, owned, warp, lane);
  }
};

template <class Format, int kTiles, int kTokenTiles, int kDepth, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 16 / kWarps)
    decode_matmul_kernel(const __grid_constant__ DecodeArgs args) {
#ifdef FASTINFER_SM90A
  DecodeMatmul<Format, kTiles, kTokenTiles, kDepth, kWarps>::run(args);
#else
  __trap();  // rather than leave y as it was
#endif
}

// ---- launch -------------------------------------------------------------------------------------------------------------

struct DecodePlan {
  int ranks = 1;           // CTAs of a cluster, which split K: 1, 2, 4 or 8
  int resident = 2;        // CTAs a multiprocessor, at most
  int k_warps = 8;         // warps that share a row tile, fewer where K is short: 1, 2, 4, 8 or 16
  bool dependent = false;  // start before the previous kernel has finished
};

// False where K has too few units for so many ranks, x and the sums do not fit the shared memory, or no cluster does the GPU.
template <class Format, int kTiles, int kTokenTiles, int kDepth, int kWarps>
bool launch_decode(const char* op, DecodeArgs args, const DecodePlan& plan, const LaunchContext& context) {
  using Kernel = DecodeMatmul<Format, kTiles, kTokenTiles, kDepth, kWarps>;
  const int slice = args.units / plan.ranks, groups = (args.last_tile + kTiles) / kTiles;
  if (slice == 0) return false;
  args.dependent = plan.dependent;
  args.rank_shift = __builtin_ctz(plan.ranks), args.k_shift = __builtin_ctz(std::min(plan.k_warps, kWarps));
  while (1 << args.k_shift > slice) --args.k_shift;

  const int limit =
      std::min(context.limits().smem_per_block, context.limits().smem_per_multiprocessor / plan.resident - 1024);
  const int most = (args.units + plan.ranks - 1) / plan.ranks;  // units of a rank
  if (most > limit / Format::kUnitXBytes) return false;         // before sizes that would overflow
  const int longest = most * Format::kUnitXBytes;
  args.x_pitch = (longest + 127) / 128 * 128 + (kIsRows<Format> ? 64 : 16);  // token after token in other banks
  args.smem_x = 128 + Kernel::kRingBytes;
  args.smem_sums = (args.smem_x + args.m * args.x_pitch + 127) / 128 * 128;
  args.smem_slots = args.smem_sums + most * Kernel::kSumBytes;

  if (args.smem_slots > limit) return false;

  const auto kernel = decode_matmul_kernel<Format, kTiles, kTokenTiles, kDepth, kWarps>;
  const int clusters =
      std::min(groups, possible_clusters(kernel, Kernel::kThreads, plan.ranks, limit, context, plan.resident));
  if (clusters == 0) return false;
  args.entries = groups / clusters, args.longer = groups % clusters;

  const int entries = args.entries + (args.longer > 0 ? 1 : 0), row_warps = kWarps >> args.k_shift;
  const int kept = plan.ranks == 1 ? 0 : (entries * Kernel::kParts + plan.ranks - 1) / plan.ranks * plan.ranks * 512;
  args.sums_ahead = Kernel::kSumBytes > 0 && entries * most > 4 * kWarps;
  // Sets of two entries a warp or one. Two buffers of slots, one where there is one set only, none where no tile is shared.
  int smem_bytes = 0;
  for (args.set_shift = 1; args.set_shift >= 0; --args.set_shift) {
    const int size = row_warps << args.set_shift, buffers = args.k_shift == 0 ? 0 : entries > size ? 2 : 1;
    args.smem_kept = args.smem_slots + buffers * (kWarps << args.set_shift) * Kernel::kSlotBytes;
    smem_bytes = args.smem_kept + kept;
    if (smem_bytes <= limit && (args.set_shift == 0 || size < 2 * entries)) break;
  }
  if (args.set_shift < 0) return false;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.limits().smem_per_block));
  launch_clusters(op, kernel, clusters * plan.ranks, Kernel::kThreads, plan.ranks, smem_bytes, plan.dependent, args,
                  context);
  leave_settled();
  return true;
}

}  // namespace fastinfer
