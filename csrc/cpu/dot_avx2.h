// Integer arithmetic of int8_scaled_matmul without VNNI: vpmaddwd on 16-bit numbers, two products a lane and exact.
// (vpmaddubsw takes 8-bit numbers but needs |w|, the sign of w moved to x for every row, and a vpmaddwd to widen its
// sums: as many instructions in all, and measured 7% slower.)
// Included in avx2's namespace by int8_scaled_matmul_kernel.h.

FI_INLINE void store_quantised(int16_t* out, const Int* q) {
  store_int(out, _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8));
}

FI_INLINE void store_quantised(int16_t* out, const int8_t* q) {
  store_int(out, _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
}

struct DotOp {
  using X = int16_t;
  using Acc = int32_t;
  using Expanded = int16_t;  // [len / 2][channels][2]
  using Side = char;
  static constexpr int64_t kUnit = 4, kBlock = 512, kSide = 1, kExpandedPanel = 2 * kPanel;
  static constexpr int kStreamAccumulators = 8;
  static constexpr bool kExpands = true, kScalesX = true;

  static void prepare(const Job&, int64_t, int64_t, int64_t, const uint8_t*, char*) {}

  // Bytes 2·HALF and 2·HALF + 1 of each lane, signed, as a pair of 16-bit numbers.
  template <int HALF>
  static FI_INLINE Int pair(Int lanes) {
    constexpr char z = -128;  // zero
    constexpr char a = 2 * HALF, b = a + 1;
    const __m128i to_top = _mm_setr_epi8(z, a, z, b, z, a + 4, z, b + 4, z, a + 8, z, b + 8, z, a + 12, z, b + 12);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(to_top)), 8);
  }

  static void expand(const uint8_t* line, const char*, int64_t len, int16_t* out, int64_t panels) {
    const int64_t stride = panels * kPanel * 2;
    for (int64_t k = 0; k < len; k += kUnit, line += 4 * kPanel, out += 2 * stride) {
      FI_UNROLL
      for (int v = 0; v < kLineVecs; ++v) {
        const Int bytes = load_int(line + v * 4 * kLanes);
        store_int(out + v * 2 * kLanes, pair<0>(bytes));
        store_int(out + v * 2 * kLanes + stride, pair<1>(bytes));
      }
    }
  }

  // acc[r][v] += the two products of columns x[0], x[1]; rows lie kChunk apart.
  template <int ROWS, int VECS>
  static FI_INLINE void multiply_add(const int16_t* x, const Int* w, Int (&acc)[ROWS][VECS]) {
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      int32_t both;
      std::memcpy(&both, x + r * kChunk, 4);
      const Int xr = broadcast_int(both);
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) {  // acc += product; gcc would add into a third register and move
        asm("vpaddd %1, %0, %0" : "+x"(acc[r][v]) : "x"(_mm256_madd_epi16(xr, w[v])));
      }
      settle(acc[r]);
    }
  }

  template <int ROWS, int VECS>
  static FI_INLINE void clear(Int (&acc)[ROWS][VECS]) {
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) acc[r][v] = zero_int();
    }
  }

  template <int ROWS, int VECS>
  static FI_INLINE void add_up(const Int (&acc)[ROWS][VECS], bool first, int32_t* sums) {
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) {
        int32_t* sum = sums + (r * VECS + v) * kLanes;
        store_int(sum, first ? acc[r][v] : add_int(acc[r][v], load_int(sum)));
      }
    }
  }

  template <int ROWS, int PANELS>
  static FI_NOINLINE void tile(const int16_t* x, const int16_t* w, int64_t len, bool first, int32_t* sums) {
    constexpr int kVecs = PANELS * kLineVecs;
    Int acc[ROWS][kVecs];
    clear(acc);
    for (int64_t k = 0; k < len; k += kChunk, x += ROWS * kChunk) {
      const int64_t count = len - k < kChunk ? ceil_div(len - k, kUnit) * kUnit : kChunk;
      for (int64_t j = 0; j < count; j += 2, w += 2 * kVecs * kLanes) {
        Int columns[kVecs];
        FI_UNROLL
        for (int v = 0; v < kVecs; ++v) columns[v] = load_int(w + v * 2 * kLanes);
        multiply_add<ROWS, kVecs>(x + j, columns, acc);
      }
    }
    add_up<ROWS, kVecs>(acc, first, sums);
  }

  template <int ROWS, int PANELS, class Call>
  static FI_NOINLINE void stream(const Call& c) {
    constexpr int kVecs = PANELS * kLineVecs;
    Lines<PANELS> lines(c.lines, c.next);
    const X* x = c.x;
    Int acc[ROWS][kVecs];
    clear(acc);
    for (int64_t k = 0; k < c.len; k += kChunk, x += (ROWS - 1) * kChunk) {
      const int64_t units = c.len - k < kChunk ? ceil_div(c.len - k, kUnit) : kChunk / kUnit;
      for (int64_t u = 0; u < units; ++u, lines.advance(), x += kUnit) {
        Int first_pair[kVecs], second_pair[kVecs];
        FI_UNROLL
        for (int v = 0; v < kVecs; ++v) {
          const Int bytes = lines.load(v);
          first_pair[v] = pair<0>(bytes), second_pair[v] = pair<1>(bytes);
        }
        multiply_add<ROWS, kVecs>(x, first_pair, acc);
        multiply_add<ROWS, kVecs>(x + 2, second_pair, acc);
      }
    }
    add_up<ROWS, kVecs>(acc, c.first, c.sums);
  }
};
