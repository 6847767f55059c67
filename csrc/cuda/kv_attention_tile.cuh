// kv_attention for 16-bit queries: append, rotate, attend and combine in one launch
// Source    split over keys with a combine: Dao et al., Flash-Decoding, 2023; softmax in one pass: Milakov and Gimelshein,
//           arXiv 1805.02867; here the parts of a row are fixed by its own length, and combined in order; transformed keys:
//           Ashkboos et al., QuaRot, arXiv 2404.00456
// Layout    LAYOUTS.md#kv-cache, its rows 16-byte aligned (8 for int8 where D is no multiple of 16)
// Requires  sm80+; clusters of 8 where sm90+
// Mapping   common/attention_split.h cuts a row into groups of 8 units (sm8x: 1) of 64 keys or more. Of each head of the cache
//           and chunk of 8 or 16 queries, few rows: a cluster of 8 blocks takes a group, a unit each; many rows: a block takes
//           a group, unit after unit. Warp w of a block takes 16 keys in each 64, from a ring of its own in shared memory:
//
//             unit │ w0 │ w1 │ w2 │ w3 │ w0 │ w1 │ …    Sᵀ[16 keys, 8 queries] = K · Qᵀ       P = e^(S − largest so far)
//                    16 keys each                       Oᵀ[16 dims, 8 queries] += Vᵀ · Pᵀ     by mma m16n8k16, K and V as A
//
//           so that warps meet at the end only. Then the units of a group are folded in order (in a block as they come,
//           in a cluster over distributed shared memory, 16 dimensions × 8 queries a rank), the four warps, and, by the last
//           of the blocks to arrive, the groups. Blocks beyond the row's end leave at once
// Bound     memory: 2 · B · G · keys · D elements. Floors on an H100 (bytes / 2.77 TB/s + 1.85 µs), 32/8 heads, D 128, bf16:
//           B1 L1024 3.4 µs, B1 L8192 14.0, B1 L65536 98.8, B64 L2048 195.6. 2 blocks a multiprocessor, up to 64 KiB
//           in flight each. By the machine code's length, 16 keys take a warp 340 issue slots of the 2,400 that there are
//           for them at memory speed, in int8 550 of 1,250
// Numerics  fp32 but for the MMA's operands: queries rotated (and transformed for an int8 cache) and rounded once, e^(…) ≤ 1
//           (times v_scale for an int8 cache) rounded to the dtype of q. int8 to 16 bits is exact; k_scale goes to the
//           scores
// Verified  tests/test_kv_attention.py
#pragma once

#include <type_traits>

#include "common/hopper.cuh"
#include "cuda/kv_attention.cuh"
#include "cuda/kv_attention_sums.cuh"

namespace fastinfer {

constexpr int kRanks = kMostUnits;  // blocks of a cluster, a unit of a group each

// ---- the kernel -----------------------------------------------------------------------------------------------------------

// T of the queries; D ≤ kD, a multiple of 32; chunks of 8 · kTiles queries.
template <typename T, bool kInt8, int kD, int kTiles>
struct TileAttention {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kKeys = 16, kQueries = 8 * kTiles;
  static constexpr int kSlices = kD / 16, kParts = kSlices * kTiles;  // of 16 dimensions; times 8 queries
  static constexpr int kRowBytes = kD * (kInt8 ? 1 : 2), kPacks = kRowBytes / 16;
  static constexpr int kPitch = (kPacks | 1) * 16;  // odd, so that eight rows lie in different banks
  static constexpr int kSmemScales = 2 * kKeys * kPitch;
  static constexpr int kStageBytes = kSmemScales + (kInt8 ? 2 * kKeys * 4 : 0);  // keys, values, their scales
  static constexpr int kQPitch = 2 * kD + 16;
  static constexpr int kOwned = (kParts + kRanks - 1) / kRanks;  // parts of a rank of a cluster, at most
  // Slots: a warp's share of a part, a float4 a lane and the stats of two queries a float4. [parts, warps], in clusters
  // [owned, units, warps].
  static constexpr int kSlotBytes = 512 + 64;
  static constexpr int kSlots = kWarps * (kParts > kRanks * kOwned ? kParts : kRanks * kOwned);
  static constexpr int kRestBytes = kQueries * kQPitch + kSlots * kSlotBytes + 16;
  static constexpr int kFit = (113 * 1024 - kRestBytes) / (kWarps * kStageBytes);  // two blocks a multiprocessor of 9.0
  static constexpr int kDepth = kFit < 2 ? 2 : kFit > 4 ? 4 : kFit;
  static constexpr int kSmemQ = kWarps * kDepth * kStageBytes;
  static constexpr int kSmemState = kSmemQ + kQueries * kQPitch;
  static constexpr int kSmemArrived = kSmemState + kSlots * kSlotBytes;  // mbarrier of what ranks send; an answer
  static constexpr int kSmemBytes = kSmemArrived + 16;
  static constexpr int kPartialFloats = kParts * (128 + 16);                 // of a group: sums, stats
  static constexpr bool kScaledValues = kInt8 && std::is_same_v<T, __half>;  // fp16 times v_scale might vanish
  static_assert(kD % 32 == 0 && kStageBytes % 16 == 0 && kSmemArrived % 16 == 0);

  struct Work {
    int b, head, chunk, group, rank;
    int item;  // index of (b, head, chunk)
    KeySplit keys;
  };

  // What a warp gathers over a unit, of all the block's queries.
  struct Sums {
    Stats stats[kTiles][2];  // .sum is this lane's share
    float v[kParts][4];
    float unit = 0.f;  // kScaledValues: v is in multiples of it

    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) stats[i][0] = stats[i][1] = Stats{};
#pragma unroll
      for (int i = 0; i < kParts; ++i) v[i][0] = v[i][1] = v[i][2] = v[i][3] = 0.f;
      unit = 0.f;
    }
  };

  // ---- keys and values to shared memory ----

  // 16 rows: `old` from the cache, zeros from `count` on; those between are left.
  static __device__ __forceinline__ void copy_rows(const AttentionArgs& args, uint32_t to, const char* from, int old,
                                                   int count, int lane) {
    const int row_bytes = args.d * (kInt8 ? 1 : 2);
    if (kInt8 && row_bytes % 16 != 0) {
      const int packs = row_bytes / 8;
      for (int i = lane; i < kKeys * packs; i += 32) {
        const int row = i / packs, at = (i - row * packs) * 8;
        if (row < old || row >= count)
          copy8(to + row * kPitch + at, from + (row < old ? row * row_bytes + at : 0), row < old ? 8 : 0);
      }
      return;
    }
    constexpr int kCopies = kKeys * kPacks / 32;
    if (old == kKeys && row_bytes == kRowBytes) {  // all of it is one piece of memory
      from += lane * 16;
      if constexpr (32 % kPacks == 0) {
        to += lane / kPacks * kPitch + lane % kPacks * 16;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) copy16_stream(to + i * (32 / kPacks) * kPitch, from + i * 512);
      } else {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int index = i * 32 + lane;
          copy16_stream(to + index / kPacks * kPitch + index % kPacks * 16, from + i * 512);
        }
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int index = i * 32 + lane, row = index / kPacks, at = index % kPacks * 16;
      if (at < row_bytes && (row < old || row >= count)) {
        copy16_stream(to + row * kPitch + at, from + (row < old ? row * row_bytes + at : 0), row < old ? 16 : 0);
      }
    }
  }

  // The new tokens among 16 keys from position `at` on: rows `from` … `to` - 1 of the stage and, by the first chunk, the cache.
  static __device__ __forceinline__ void append(const AttentionArgs& args, const Work& work, uint32_t stage, int at,
                                                int from, int to, int lane) {
    constexpr int kLanes = kD <= 64 ? 8 : kD <= 128 ? 16 : 32;  // of a token
    const int64_t first = (int64_t(work.b) * args.g + work.head) * args.positions + at;
    const int chunk = lane % kLanes;
#pragma unroll 1
    for (int row = from + lane / kLanes; row - lane / kLanes < to; row += 32 / kLanes) {
      const bool active = chunk < args.d / 8 && row < to, writes = active && work.chunk == 0;
      const int t = at + row - work.keys.length;
      float k[8] = {}, v[8] = {};
      if (active) {
        RotatedChunk<T> key;
        key.load(args, args.k, work.b, t, work.head, chunk);
        const T* value = static_cast<const T*>(args.v.data) + work.b * args.v.row + t * args.v.token;
        load8(value + work.head * args.v.head + 8 * chunk, args.v.packs, v);
        key.get(args, k);
      }
      if constexpr (kInt8) hadamard(k, transform_size(args));
      append_chunk(args, stage, row, first + row, chunk, active, writes, k, v);
    }
  }
  static __device__ __forceinline__ void append_chunk(const AttentionArgs& args, uint32_t stage, int row,
                                                      int64_t position, int chunk, bool active, bool writes,
                                                      const float (&k)[8], const float (&v)[8]) {
    constexpr int kLanes = kD <= 64 ? 8 : kD <= 128 ? 16 : 32;
    const uint32_t k_row = stage + row * kPitch, v_row = k_row + kKeys * kPitch;
    if constexpr (kInt8) {
      uint2 k_bytes, v_bytes;
      const float k_scale = quantize_lanes<kLanes>(k, active, k_bytes);
      const float v_scale = quantize_lanes<kLanes>(v, active, v_bytes);
      if (active) {
        store_smem8(k_row + 8 * chunk, k_bytes);
        store_smem8(v_row + 8 * chunk, v_bytes);
      }
      if (active && chunk == 0) {
        store_smem_float(stage + kSmemScales + row * 4, k_scale);
        store_smem_float(stage + kSmemScales + (kKeys + row) * 4, v_scale);
      }
      if (!writes) return;
      reinterpret_cast<uint2*>(static_cast<char*>(args.k_cache) + position * args.d)[chunk] = k_bytes;
      reinterpret_cast<uint2*>(static_cast<char*>(args.v_cache) + position * args.d)[chunk] = v_bytes;
      if (chunk == 0) args.k_scale[position] = k_scale, args.v_scale[position] = v_scale;
    } else if (active) {
      const Pack<T, 8> k_pack = pack8<T>(k), v_pack = pack8<T>(v);
      store_smem16(k_row + 16 * chunk, *reinterpret_cast<const uint4*>(&k_pack));
      store_smem16(v_row + 16 * chunk, *reinterpret_cast<const uint4*>(&v_pack));
      if (!writes) return;
      reinterpret_cast<Pack<T, 8>*>(static_cast<T*>(args.k_cache) + position * args.d)[chunk] = k_pack;
      reinterpret_cast<Pack<T, 8>*>(static_cast<T*>(args.v_cache) + position * args.d)[chunk] = v_pack;
    }
  }

  // What fetch() leaves of the same keys and values: those of the new tokens.
  static __device__ __forceinline__ void fetch_new(const AttentionArgs& args, const Work& work, uint32_t stage, int at,
                                                   int count, int lane) {
    const int old = larger(0, smaller(work.keys.length - at, count));
    if (old < count) append(args, work, stage, at, old, count, lane);
  }

  // Two copy groups: `count` ≤ 16 keys from position `at` on, or none; then their values. Of what the cache has.
  static __device__ __forceinline__ void fetch(const AttentionArgs& args, const Work& work, uint32_t stage, int at,
                                               int count, int lane) {
    const int old = larger(0, smaller(work.keys.length - at, count));
    if (count > 0) {
      const int64_t position = (int64_t(work.b) * args.g + work.head) * args.positions + at;
      const int64_t offset = position * args.d * (kInt8 ? 1 : 2);
      copy_rows(args, stage, static_cast<const char*>(args.k_cache) + offset, old, count, lane);
      if constexpr (kInt8) {
        const int row = lane % kKeys;
        const float* scales = (lane < kKeys ? args.k_scale : args.v_scale) + position;
        if (row < old || row >= count)
          copy4(stage + kSmemScales + lane * 4, scales + (row < old ? row : 0), row < old ? 4 : 0);
      }
      copy_commit();
      copy_rows(args, stage + kKeys * kPitch, static_cast<const char*>(args.v_cache) + offset, old, count, lane);
      copy_commit();
    } else {
      copy_commit();
      copy_commit();
    }
  }

  // A warp's way through the units of its block, 16 keys in each 64.
  struct Walk {
    int begin, end;  // of the unit, positions
    int at;          // of this step's keys
    int units;       // this one and those after it
    __device__ __forceinline__ Walk(const Work& work, int first, int units, int warp)
        : begin(work.keys.unit_begin(work.group, first)),
          end(work.keys.unit_end(begin)),
          at(begin + warp * kKeys),
          units(units) {}
    __device__ __forceinline__ int count() const {
      return units > 0 ? smaller(end - at, kKeys) : 0;
    }  // 0 or less: none
    __device__ __forceinline__ bool last(int warp) const {
      return at - warp * kKeys + kStepKeys >= end;
    }  // of the unit
    __device__ __forceinline__ void next(const Work& work, int warp) {
      if (!last(warp)) {
        at += kStepKeys;
      } else if (--units > 0) {
        begin += work.keys.unit, end = work.keys.unit_end(begin), at = begin + warp * kKeys;
      }
    }
  };

  // ---- queries ----

  static constexpr int kPieces = kQueries * kD / 8;  // of eight dimensions
  struct QueryLoader {                               // the chunk's queries, rotated
    static constexpr int kEach = (kPieces + kThreads - 1) / kThreads;
    RotatedChunk<T> pieces[kEach];

    __device__ __forceinline__ QueryLoader(const AttentionArgs& args, const Work& work) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int piece = threadIdx.x + i * kThreads, query = piece / (kD / 8), chunk = piece % (kD / 8);
        const int row = work.chunk * kQueries + query;
        if (piece >= kPieces || row >= args.rows || 8 * chunk >= args.d) continue;
        const int t = token_of(args, row), head = work.head * args.group + row - t * args.group;
        pieces[i].load(args, args.q, work.b, t, head, chunk);
      }
    }
    // Zeros where there is no query.
    __device__ __forceinline__ void store(const AttentionArgs& args, uint32_t smem) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int piece = threadIdx.x + i * kThreads, query = piece / (kD / 8), chunk = piece % (kD / 8);
        float v[8];
        pieces[i].get(args, v);
        if constexpr (kInt8) hadamard_query(args, v);  // a query's lanes are a multiple of n / 8; the rest stays zero
        const Pack<T, 8> pack = pack8<T>(v);
        if (piece < kPieces) store_smem16(smem + query * kQPitch + chunk * 16, *reinterpret_cast<const uint4*>(&pack));
      }
    }
  };

  // As B of the MMA, in registers where they fit. Beside int8 keys the dimensions are permuted as
  // int8x4_to_interleaved_pairs permutes the keys'.
  struct Queries {
    static constexpr bool kHeld = kD < 256;
    uint32_t from, held[kHeld ? kTiles : 1][kHeld ? kSlices : 1][2];

    __device__ __forceinline__ Queries(uint32_t smem, int lane)
        : from(smem + lane / 4 * kQPitch + lane % 4 * (kInt8 ? 8 : 4)) {
      if constexpr (kHeld) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < kSlices; ++i) load(tile, i, held[tile][i]);
        }
      }
    }
    __device__ __forceinline__ void load(int tile, int slice, uint32_t (&out)[2]) const {
      const uint32_t at = from + 8 * tile * kQPitch + slice * 32;
      if constexpr (kInt8) {
        const uint32_t low = load_smem4(at), high = load_smem4(at + 4);
        out[0] = __byte_perm(low, high, 0x5410), out[1] = __byte_perm(low, high, 0x7632);
      } else {
        out[0] = load_smem4(at), out[1] = load_smem4(at + 16);
      }
    }
    __device__ __forceinline__ void multiply(int tile, int slice, const uint32_t (&a)[4], float (&c)[4]) const {
      if constexpr (kHeld) {
        mma_m16n8k16<T>(c, a, held[tile][slice][0], held[tile][slice][1]);
      } else {
        uint32_t q[2];
        load(tile, slice, q);
        mma_m16n8k16<T>(c, a, q[0], q[1]);
      }
    }
  };

  // ---- 16 keys ----

  // c[tile]: lane 4g + t has keys g and g + 8 by queries 2t and 2t + 1, as the MMA leaves them.
  static __device__ __forceinline__ void score(uint32_t keys, const Queries& q, float (&c)[kTiles][4]) {
    float odd[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.f;
#pragma unroll
    for (int i = 0; i < kSlices; i += 2) {
      uint32_t a[2][4];
      if constexpr (kInt8) {
        uint32_t w[4];
        load_matrices(w, keys + i * 16);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int8x4_to_interleaved_pairs<T>(w[2 * j], a[j][0], a[j][2]);
          int8x4_to_interleaved_pairs<T>(w[2 * j + 1], a[j][1], a[j][3]);
        }
      } else {
        load_matrices(a[0], keys + i * 32);
        load_matrices(a[1], keys + i * 32 + 32);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        q.multiply(tile, i, a[0], c[tile]);
        q.multiply(tile, i + 1, a[1], odd[tile]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[tile][j] += odd[tile][j];
    }
  }

  // v += Vᵀ · Pᵀ. int8: rows g and g + 8 of the MMA are the dimensions 2g and 2g + 1.
  static __device__ __forceinline__ void add_values(uint32_t values, const uint32_t (&p)[kTiles][2],
                                                    float (&v)[kParts][4]) {
#pragma unroll
    for (int i = 0; i < kSlices; i += 2) {
      uint32_t a[2][4];
      if constexpr (kInt8) {
        uint32_t w[4];
        load_matrices_transposed(w, values + i * 16);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int8x4_to_interleaved_pairs<T>(w[j], a[j][0], a[j][1]);
          int8x4_to_interleaved_pairs<T>(w[j + 2], a[j][2], a[j][3]);
        }
      } else {
        load_matrices_transposed(a[0], values + i * 32);
        load_matrices_transposed(a[1], values + i * 32 + 32);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma_m16n8k16<T>(v[tile * kSlices + i], a[0], p[tile][0], p[tile][1]);
        mma_m16n8k16<T>(v[tile * kSlices + i + 1], a[1], p[tile][0], p[tile][1]);
      }
    }
  }

  struct Bounds {  // positions that this lane's queries see
    int low[kTiles][2], high[kTiles][2];
    int all_low, all_high;  // positions that every query sees
    __device__ __forceinline__ Bounds(const AttentionArgs& args, const Work& work, int lane) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = work.chunk * kQueries + 8 * tile + lane % 4 * 2 + j;
          const int t = smaller(token_of(args, row), args.t - 1);
          low[tile][j] = work.keys.lowest(t), high[tile][j] = work.keys.length + t;
        }
      }
      all_low = work.keys.lowest(args.t - 1), all_high = work.keys.length;
    }
  };

  // Products to scores of base 2, -infinity for what a query does not see.
  static __device__ __forceinline__ void finish_scores(const AttentionArgs& args, const Bounds& bounds, uint32_t stage,
                                                       int at, int count, int lane, float (&c)[kTiles][4]) {
    const int key = lane / 4;
    float scale[2] = {args.scale, args.scale};
    if constexpr (kInt8) {
      scale[0] *= load_smem_float(stage + kSmemScales + key * 4);
      scale[1] *= load_smem_float(stage + kSmemScales + key * 4 + 32);
    }
    const bool whole = count == kKeys && at >= bounds.all_low && at + kKeys - 1 <= bounds.all_high;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[tile][j] *= scale[j / 2];
      if (args.softcap > 0.f) {  // c is 2 · log2(e) · score / softcap; tanh x = 1 - 2 / (1 + e^2x)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          c[tile][j] = args.softcap * (1.f - __fdividef(2.f, 1.f + exp2_fast(c[tile][j])));
        }
      }
      if (whole) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int index = key + j / 2 * 8, position = at + index;
        const bool seen = index < count && position >= bounds.low[tile][j % 2] && position <= bounds.high[tile][j % 2];
        c[tile][j] = seen ? c[tile][j] : -__builtin_inff();
      }
    }
  }

  static __device__ __forceinline__ float largest_of_keys(float v) {  // over the lanes of a query
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, offset));
    return v;
  }

  // Scores to weights p, as B of the next MMA; brings the sums so far to the new largest score.
  static __device__ __forceinline__ void weigh(uint32_t stage, int lane, float (&c)[kTiles][4],
                                               uint32_t (&p)[kTiles][2], Sums& sums) {
    float value_scale[2], unit_factor = 1.f;
    if constexpr (kInt8) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        value_scale[i] = load_smem_float(stage + kSmemScales + (kKeys + lane / 4 + 8 * i) * 4);
    }
    if constexpr (kScaledValues) {
      const float unit = fmaxf(sums.unit, largest_of_keys(fmaxf(value_scale[0], value_scale[1])));
      const float inverse = unit > 0.f ? 1.f / unit : 0.f;
      unit_factor = sums.unit * inverse;
      value_scale[0] *= inverse, value_scale[1] *= inverse;
      sums.unit = unit;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float factor[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Stats& stats = sums.stats[tile][j];
        const float top = fmaxf(stats.top, largest_of_keys(fmaxf(c[tile][j], c[tile][j + 2])));
        const float base = top == -__builtin_inff() ? 0.f : top;
        factor[j] = exp2_fast(stats.top - base);
        c[tile][j] = exp2_fast(c[tile][j] - base), c[tile][j + 2] = exp2_fast(c[tile][j + 2] - base);
        stats.sum = stats.sum * factor[j] + (c[tile][j] + c[tile][j + 2]);
        stats.top = top;
        factor[j] *= unit_factor;
      }
      if constexpr (kInt8) {  // 0 where nothing is seen, whatever the scale
#pragma unroll
        for (int j = 0; j < 4; ++j) c[tile][j] = c[tile][j] == 0.f ? 0.f : c[tile][j] * value_scale[j / 2];
      }
      p[tile][0] = transpose_matrix(pack_pair<T>(c[tile][0], c[tile][1]));
      p[tile][1] = transpose_matrix(pack_pair<T>(c[tile][2], c[tile][3]));
#pragma unroll
      for (int i = tile * kSlices; i < (tile + 1) * kSlices; ++i) {
        sums.v[i][0] *= factor[0], sums.v[i][1] *= factor[1], sums.v[i][2] *= factor[0], sums.v[i][3] *= factor[1];
      }
    }
  }

  // ---- combine ----

  // A unit's sums: into those of the block's units before it, which lie in shared memory, each lane's in a place of its own.
  static __device__ __forceinline__ void keep(const Sums& sums, Stats (&total)[kTiles][2], uint32_t slots, int warp,
                                              int lane, bool first) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      PartOfSums part;
#pragma unroll
      for (int i = tile * kSlices; i < (tile + 1) * kSlices; ++i) {
        const uint32_t slot = slots + (i * kWarps + warp) * kSlotBytes;
        float4 v{sums.v[i][0], sums.v[i][1], sums.v[i][2], sums.v[i][3]};
        if (!first) {
          part.set(pair_of(total[tile]), load_smem_float4(slot + lane * 16));
          part.fold(pair_of(sums.stats[tile]), v);
          v = {part.v[0], part.v[1], part.v[2], part.v[3]};
        }
        store_smem_float4(slot + lane * 16, v);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) total[tile][j] = first ? sums.stats[tile][j] : part.stats[j];
      if (lane < 4) {  // beside each part, as a cluster has them
        const float4 stats = pair_of(total[tile]);
#pragma unroll
        for (int i = tile * kSlices; i < (tile + 1) * kSlices; ++i) {
          store_smem_float4(slots + (i * kWarps + warp) * kSlotBytes + 512 + lane * 16, stats);
        }
      }
    }
  }

  // A unit's sums: each part to the rank that owns it.
  static __device__ __forceinline__ void send(const Sums& sums, uint32_t slots, uint32_t arrived, int unit, int warp,
                                              int lane) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int owner = i % kRanks, slot = (i / kRanks * kRanks + unit) * kWarps + warp;
      const uint32_t to = map_to_rank(slots + slot * kSlotBytes + lane * 16, owner);
      const uint32_t counts = map_to_rank(arrived, owner);
      send_floats(to, {sums.v[i][0], sums.v[i][1], sums.v[i][2], sums.v[i][3]}, counts);
      if (lane < 4) send_floats(to + 512, pair_of(sums.stats[i / kSlices]), counts);
    }
  }

  // Makes sums ready for others to see: whole stats in every lane, values that are in no unit.
  static __device__ __forceinline__ void close(Sums& sums) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          sums.stats[tile][j].sum += __shfl_xor_sync(~0u, sums.stats[tile][j].sum, offset);
        }
      }
    }
    if constexpr (kScaledValues) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.v[i][j] *= sums.unit;
      }
    }
  }

  // The units' sums of each part that the rank owns, warp by warp, to the first unit's slot.
  static __device__ __forceinline__ void fold_units(const Work& work, uint32_t slots, int warp, int lane) {
    const int units = work.keys.units_of(work.group);
#pragma unroll
    for (int j = 0; j < kOwned; ++j) {
      if (work.rank + j * kRanks >= kParts) break;
      const uint32_t slot = slots + (j * kRanks * kWarps + warp) * kSlotBytes;
      PartOfSums part;
      part.set(load_smem_float4(slot + 512 + lane % 4 * 16), load_smem_float4(slot + lane * 16));
#pragma unroll
      for (int u = 1; u < kRanks; ++u) {
        if (u >= units) break;
        const uint32_t theirs = slot + u * kWarps * kSlotBytes;
        part.fold(load_smem_float4(theirs + 512 + lane % 4 * 16), load_smem_float4(theirs + lane * 16));
      }
      __syncwarp();
      store_smem_float4(slot + lane * 16, {part.v[0], part.v[1], part.v[2], part.v[3]});
      const float4 stats = pair_of(part.stats);
      if (lane < 4) store_smem_float4(slot + 512 + lane * 16, stats);
    }
  }

  // Those of the warps, in order.
  static __device__ __forceinline__ PartOfSums fold_warps(uint32_t slot, int lane) {
    PartOfSums part;
    part.set(load_smem_float4(slot + 512 + lane % 4 * 16), load_smem_float4(slot + lane * 16));
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const uint32_t theirs = slot + w * kSlotBytes;
      part.fold(load_smem_float4(theirs + 512 + lane % 4 * 16), load_smem_float4(theirs + lane * 16));
    }
    return part;
  }

  static __device__ __forceinline__ float4* partial(const AttentionArgs& args, const Work& work, int group) {
    const int64_t index = int64_t(work.item) * args.groups + group;
    return reinterpret_cast<float4*>(args.partials + index * kPartialFloats);
  }

  static __device__ __forceinline__ void write(const AttentionArgs& args, const Work& work, int i, int lane,
                                               const PartOfSums& part) {
    const int slice = i % kSlices, tile = i / kSlices, heads = args.group * args.g;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = work.chunk * kQueries + 8 * tile + lane % 4 * 2 + j;
      if (row >= args.rows) continue;
      const int t = token_of(args, row), head = work.head * args.group + row - t * args.group;
      T* y = static_cast<T*>(args.y) + ((int64_t(work.b) * args.t + t) * heads + head) * args.d;
      const float inverse = part.stats[j].sum == 0.f ? 0.f : __fdividef(1.f, part.stats[j].sum);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int dim = 16 * slice + (kInt8 ? lane / 4 * 2 + half : lane / 4 + 8 * half);
        if (dim < args.d) y[dim] = from_float<T>(part.v[j + 2 * half] * inverse);
      }
    }
  }

  // Whether all groups of the row have left their sums of the parts that this rank owns; true in one block.
  static __device__ __forceinline__ bool last_to_arrive(const AttentionArgs& args, const Work& work, uint32_t answer) {
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* counter = args.arrived + work.item * args.ranks + work.rank;
      const bool last = add_in_order(counter, 1) + 1 == unsigned(work.keys.groups());
      if (last) *counter = 0;  // for the next launch
      store_smem_float(answer, last ? 1.f : 0.f);
    }
    __syncthreads();
    return load_smem_float(answer) != 0.f;
  }

  // From the warps' sums, in shared memory, to y.
  static __device__ __forceinline__ void combine(const AttentionArgs& args, const Work& work, uint32_t slots, int warp,
                                                 int lane) {
    const int stride = args.ranks * kWarps * kSlotBytes, first = work.rank + warp * args.ranks;
    for (int i = first, j = warp; i < kParts; i += kWarps * args.ranks, j += kWarps) {
      const PartOfSums part = fold_warps(slots + j * stride, lane);
      if (work.keys.one_group()) {
        write(args, work, i, lane, part);
        continue;
      }
      float4* to = partial(args, work, work.group);
      to[i * 32 + lane] = {part.v[0], part.v[1], part.v[2], part.v[3]};
      if (lane < 4) to[kParts * 32 + i * 4 + lane] = pair_of(part.stats);
    }
    if (work.keys.one_group() || !last_to_arrive(args, work, slots - kSmemState + kSmemArrived + 8)) return;
    const int groups = work.keys.groups();
    for (int i = first; i < kParts; i += kWarps * args.ranks) {
      PartOfSums part;
#pragma unroll 4
      for (int group = 0; group < groups; ++group) {
        const float4* from = partial(args, work, group);
        const float4 v = __ldcg(from + i * 32 + lane), stats = __ldcg(from + kParts * 32 + i * 4 + lane % 4);
        if (group == 0) {
          part.set(stats, v);
        } else {
          part.fold(stats, v);
        }
      }
      write(args, work, i, lane, part);
    }
  }

  // ---- all of it ----

  // The units of this block, `units` of them from the `first` of the group on.
  static __device__ __forceinline__ void attend(const AttentionArgs& args, const Work& work, uint32_t base, int first,
                                                int units, int warp, int lane) {
    const uint32_t ring = base + warp * (kDepth * kStageBytes);
    if (args.d < kD && !kInt8) {  // products of zero must be zero; no copy writes there
      for (int i = lane; i < kDepth * kStageBytes / 16; i += 32) store_smem16(ring + i * 16, {0, 0, 0, 0});
      __syncwarp();
    }
    const auto each_stage = [&](Walk& ahead, auto&& f) {
#pragma unroll 1
      for (int i = 0; i < kDepth; ++i) {
        f(ring + i * kStageBytes, ahead.at, ahead.count());
        if (ahead.units > 0) ahead.next(work, warp);
      }
    };
    Walk ahead(work, first, units, warp), again = ahead;
    each_stage(ahead, [&](uint32_t stage, int at, int count) { fetch(args, work, stage, at, count, lane); });
#if __CUDA_ARCH__ >= 900
    if (args.early) wait_for_previous_kernel();
#endif
    QueryLoader loader(args, work);
    each_stage(again, [&](uint32_t stage, int at, int count) { fetch_new(args, work, stage, at, count, lane); });
    loader.store(args, base + kSmemQ);
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    let_next_kernel_start();  // its copies would have held up ours
#endif
    const Queries queries(base + kSmemQ, lane);
    const Bounds bounds(args, work, lane);
    const uint32_t k_lane = (lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * 16;
    const uint32_t v_lane = (kKeys + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
    Sums sums;
    Stats total[kTiles][2];
    sums.clear();
    uint32_t stage = ring;
    bool is_first = true;
    for (Walk walk(work, first, units, warp); walk.units > 0; walk.next(work, warp)) {
      const int count = walk.count();
      copy_wait_for<2 * kDepth - 1>();
      __syncwarp();
      if (count > 0) {
        float c[kTiles][4];
        uint32_t p[kTiles][2];
        score(stage + k_lane, queries, c);
        finish_scores(args, bounds, stage, walk.at, count, lane, c);
        weigh(stage, lane, c, p, sums);
        copy_wait_for<2 * kDepth - 2>();
        __syncwarp();
        add_values(stage + v_lane, p, sums.v);
      }
      __syncwarp();
      fetch(args, work, stage, ahead.at, ahead.count(), lane);
      fetch_new(args, work, stage, ahead.at, ahead.count(), lane);
      if (ahead.units > 0) ahead.next(work, warp);
      stage = stage + kStageBytes == ring + kDepth * kStageBytes ? ring : stage + kStageBytes;
      if (!walk.last(warp)) continue;
      close(sums);
      if (args.ranks == 1) {
        keep(sums, total, base + kSmemState, warp, lane, is_first);
        is_first = false;
        sums.clear();
      }
    }
#if __CUDA_ARCH__ >= 900
    if (args.ranks > 1) {
      cluster_wait();  // all have their mbarriers
      send(sums, base + kSmemState, base + kSmemArrived, work.rank, warp, lane);
    }
#endif
  }

  static __device__ __forceinline__ void run(const AttentionArgs& args) {
    extern __shared__ __align__(16) unsigned char smem[];
    const uint32_t base = smem_address(smem);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    Work work;  // groups outermost: blocks without work come last
    const int items = args.b * args.g * args.chunks, index = blockIdx.x / args.ranks;
    work.rank = blockIdx.x - index * args.ranks;
    work.group = index / items, work.item = index - work.group * items;
    work.b = work.item / (args.g * args.chunks);
    const int rest = work.item - work.b * (args.g * args.chunks);
    work.head = rest / args.chunks, work.chunk = rest - work.head * args.chunks;
#if __CUDA_ARCH__ >= 900
    if (args.ranks > 1) {
      if (threadIdx.x == 0) {
        mbarrier_init(base + kSmemArrived, 1);
        mbarrier_init_fence();
      }
      __syncwarp();
      cluster_arrive_relaxed();
    }
    if (!args.early) wait_for_previous_kernel();
#endif
    const RowLimits limits(args, work.b);
    work.keys = split_row(args, limits);
    const int there = work.keys.units_of(work.group);  // 0 in a group beyond the row's end
    const int units = args.ranks == 1 ? there : work.rank < there ? 1 : 0;
    if (units > 0) attend(args, work, base, work.rank, units, warp, lane);
    const uint32_t slots = base + kSmemState;
#if __CUDA_ARCH__ >= 900
    if (units == 0) {
      let_next_kernel_start();
      if (args.ranks > 1) cluster_wait();
    }
#endif
    if (there == 0) return;  // with the whole cluster
#if __CUDA_ARCH__ >= 900
    if (args.ranks > 1) {
      const int owned = (kParts - work.rank + kRanks - 1) / kRanks;
      if (owned == 0) return;
      const uint32_t arrived = base + kSmemArrived;
      if (threadIdx.x == 0) mbarrier_arrive_expect(arrived, owned * there * kWarps * kSlotBytes);
      mbarrier_wait_cluster(arrived, 0);
      fold_units(work, slots, warp, lane);
    }
#endif
    __syncthreads();
    combine(args, work, slots, warp, lane);
  }
};

template <typename T, bool kInt8, int kD, int kTiles>
__global__ void __launch_bounds__(128, 2) tile_attention_kernel(const __grid_constant__ AttentionArgs args) {
  TileAttention<T, kInt8, kD, kTiles>::run(args);
}

}  // namespace fastinfer
