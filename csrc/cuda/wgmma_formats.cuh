// Weight formats of wgmma_matmul: how words of a tile layout become fragments, and what scales them.
// Source    own design; integers to halves as in common/mma.cuh
// Layout    LAYOUTS.md#tile-w4a16, #tile-w8a16, #tile-w8a8
// Verified  as wgmma_matmul.cuh
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/wgmma.cuh"

namespace fastinfer {

// Scales and zero points of groups, 16-bit, in the order of the tile layout.
struct GroupScales {
  const void* scale = nullptr;
  const void* zero = nullptr;
  Element type{};
  int groups = 0;  // K / G
};

// A block is kSteps wgmma steps. `Factors` is what a lane needs of a group of kGroup k, to make its fragments or, where the
// shape is by_group, to scale its sums.

__device__ __forceinline__ __nv_bfloat162 as_pair(__nv_bfloat16, uint32_t v) { return as_bfloat162(v); }
__device__ __forceinline__ __half2 as_pair(__half, uint32_t v) { return as_half2(v); }
__device__ __forceinline__ float low_of(__nv_bfloat16, uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float low_of(__half, uint32_t v) { return __low2float(as_half2(v)); }
__device__ __forceinline__ float2 widen_pair(__nv_bfloat16, uint32_t v) { return __bfloat1622float2(as_bfloat162(v)); }
__device__ __forceinline__ float2 widen_pair(__half, uint32_t v) { return __half22float2(as_half2(v)); }

// In the fragments (q − zero) · scale, rounded to 16 bits once but for terms far below: the bits of q make the number e + q
// (e = 128 in bf16, 1024 in fp16), e + zero is rounded to `offset`, whose difference to e + q is exact for zero points near
// q's range; `shift` brings back what rounding the zero point took, and `scale_low` what rounding the scale did. Scales of T
// with integer zero points, the usual case in real checkpoints, leave neither, and save an operation of three.
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

  // Above, the sums of x, which have to be there before a group is scaled, set the pace: 5 µs of 40 at 64 tokens and kG = 128.
  static constexpr bool by_group(int tokens) { return tokens * 4 <= kG; }

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
    const GroupScales& from;
    uint32_t smem;
    int lane;
    uint2 scale, zero;       // four of a row tile's, 16-bit
    bool remainders = true;  // of the current chunk: whether any scale_low or shift is not zero; the same in all lanes

    __device__ Scales(const GroupScales& f, uint32_t to, int l) : from(f), smem(to), lane(l) {}
    __device__ __forceinline__ void prefetch(int row_tile, int block) {
      const int group = min(block * kBlockK / kGroup + lane / 4, from.groups - 1);
      const int64_t at = (int64_t(row_tile) * from.groups + group) * 4 + lane % 4;  // in fours
      scale = __ldg(static_cast<const uint2*>(from.scale) + at);
      zero = __ldg(static_cast<const uint2*>(from.zero) + at);
    }
    __device__ __forceinline__ void widen(const uint2& v, float (&out)[4]) const {
      const bool half = from.type == fastinfer::Element::kHalf;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = i == 0 ? v.x : v.y;
        const float2 pair = half ? widen_pair(__half{}, word) : widen_pair(__nv_bfloat16{}, word);
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
          store_smem16(to + i * kRowBytes, {__float_as_uint(s[i]), __float_as_uint(-z[i] - kInt4Offset<T>),
                                            __float_as_uint(s[i + 1]), __float_as_uint(-z[i + 1] - kInt4Offset<T>)});
        }
      } else {
        bool some = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t offset = pack_pair<T>(z[i] + kExponent, z[i] + kExponent), high = pack_pair<T>(s[i], s[i]);
          const float low = s[i] - low_of(T{}, high), shift = (low_of(T{}, offset) - kExponent - z[i]) * s[i];
          store_smem16(to + i * kRowBytes, {offset, high, pack_pair<T>(low, low), pack_pair<T>(shift, shift)});
          some = some || low != 0 || shift != 0;
        }
        remainders = __any_sync(~0u, some);
      }
      __syncwarp();
    }
    // Of a group of the chunk.
    __device__ __forceinline__ Factors<kByGroup> factors(int group) const {
      Factors<kByGroup> out;
      const uint32_t at = smem + (group * 16 + lane / 4 * 2) * kRowBytes;
      if constexpr (kByGroup) {
        const uint4 v = load_smem16(at);
        out.row[0] = {__uint_as_float(v.x), __uint_as_float(v.y)};
        out.row[1] = {__uint_as_float(v.z), __uint_as_float(v.w)};
      } else {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const uint4 v = load_smem16(at + row * kRowBytes);
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
  template <bool kRemainders>
  static __device__ __forceinline__ void make_a(const uint32_t (&words)[4], int step, const Factors<false>& factors,
                                                uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // nibbles i and i + 4, of row g or g + 8
      const FragmentFactors& f = factors.row[i % 2];
      const auto q = as_pair(T{}, lop3<kAndOr>(words[step] >> (4 * i), 0x000F000F, kMagic));
      const auto d = __hsub2(q, as_pair(T{}, f.offset));
      if constexpr (kRemainders) {
        const auto low = __hfma2(d, as_pair(T{}, f.scale_low), as_pair(T{}, f.shift));
        a[i] = bits(__hfma2(d, as_pair(T{}, f.scale), low));
      } else {
        a[i] = bits(__hmul2(d, as_pair(T{}, f.scale)));
      }
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
  static constexpr bool remainders = false;
  __device__ NoScales(const GroupScales&, uint32_t, int) {}
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
  template <bool kRemainders>
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

}  // namespace fastinfer
