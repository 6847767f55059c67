// Integer arithmetic of int8_scaled_matmul with AVX512-VNNI: vpdpbusd adds four products of u8 and s8 to a lane, exact.
// x is held as u8, q + 128; prepare() sums the panel's weights, and −128 · Σ w takes the shift out again.
// Included in avx512's namespace by int8_scaled_matmul_kernel.h.

FI_INLINE void store_quantised(uint8_t* out, const Int* q) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(add_int(q[0], broadcast_int(128))));
}

FI_INLINE void store_quantised(uint8_t* out, const int8_t* q) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi8(bytes, _mm_set1_epi8(-128)));
}

struct DotOp {
  using X = uint8_t;
  using Acc = int32_t;
  using Expanded = char;
  using Side = int32_t;  // −128 · Σ w of the block, a channel each
  static constexpr int64_t kUnit = 4, kBlock = 512, kSide = kPanel;
  static constexpr int kStreamAccumulators = kMaxAccumulators;
  static constexpr bool kExpands = false, kScalesX = true;

  static void prepare(const Job&, int64_t, int64_t, int64_t len, const uint8_t* line, int32_t* side) {
    const Int ones = _mm512_set1_epi8(1);
    Int sums[4] = {zero_int(), zero_int(), zero_int(), zero_int()};
    int64_t units = ceil_div(len, kUnit);
    for (; units >= 4; units -= 4, line += 4 * 64) {
      FI_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], ones, load_int(line + i * 64));
    }
    for (; units > 0; --units, line += 64) sums[0] = _mm512_dpbusd_epi32(sums[0], ones, load_int(line));
    const Int sum = add_int(add_int(sums[0], sums[1]), add_int(sums[2], sums[3]));
    store_int(side, _mm512_sub_epi32(zero_int(), _mm512_slli_epi32(sum, 7)));
  }

  template <int ROWS, int PANELS, class Call>
  static FI_NOINLINE void stream(const Call& c) {
    Lines<PANELS> lines(c.lines, c.next);
    const X* x = c.x;
    Int acc[ROWS][PANELS];
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int p = 0; p < PANELS; ++p) acc[r][p] = load_int(c.side + p * kPanel);
    }
    for (int64_t k = 0; k < c.len; k += kChunk, x += (ROWS - 1) * kChunk) {
      const int64_t units = c.len - k < kChunk ? ceil_div(c.len - k, kUnit) : kChunk / kUnit;
      for (int64_t u = 0; u < units; ++u, lines.advance(), x += kUnit) {
        Int w[PANELS];
        FI_UNROLL
        for (int p = 0; p < PANELS; ++p) w[p] = lines.load(p);
        FI_UNROLL
        for (int r = 0; r < ROWS; ++r) {
          int32_t four;
          std::memcpy(&four, x + r * kChunk, 4);
          const Int xr = broadcast_int(four);
          FI_UNROLL
          for (int p = 0; p < PANELS; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], xr, w[p]);
          settle(acc[r]);
        }
      }
    }
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int p = 0; p < PANELS; ++p) {
        int32_t* sum = c.sums + (r * PANELS + p) * kLanes;
        store_int(sum, c.first ? acc[r][p] : add_int(acc[r][p], load_int(sum)));
      }
    }
  }
};
