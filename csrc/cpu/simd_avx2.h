// The vector types and operations that the kernels are written in, AVX2 + FMA + F16C. simd_avx512.h is the twin.
// Included once per instruction set by each_isa.h.

constexpr int kLanes = 8;
constexpr int kLineVecs = kPanel / kLanes;  // vectors in the 16 channels of a panel
constexpr int kMaxRows = 6;                 // rows of x in a block: 6 × 2 vectors = 12 accumulators of 16 registers
constexpr int kMaxAccumulators = 12;

using Float = __m256;
using Int = __m256i;

// Ends one row's multiply-adds: without it gcc loads all rows ahead, runs out of registers and spills accumulators.
template <class V, int VECS>
FI_INLINE void settle(V (&acc)[VECS]) {
  FI_UNROLL
  for (int v = 0; v < VECS; ++v) asm volatile("" : "+x"(acc[v]) : : "memory");
}

FI_INLINE Float zero_float() { return _mm256_setzero_ps(); }
FI_INLINE Float broadcast(float v) { return _mm256_set1_ps(v); }
FI_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
FI_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
FI_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
FI_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
FI_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
FI_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
FI_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
template <int DISTANCE>
FI_INLINE Float swap_lanes(Float v) {  // lane i gets what lane i ^ DISTANCE has, 1, 2 or 4
  return DISTANCE == 4 ? _mm256_permute2f128_ps(v, v, 1) : _mm256_permute_ps(v, DISTANCE == 2 ? 0x4e : 0xb1);
}

using Double = __m256d;
FI_INLINE Double zero_double() { return _mm256_setzero_pd(); }
FI_INLINE void store_double(double* p, Double v) { _mm256_storeu_pd(p, v); }
FI_INLINE void add_squares(Float v, Double (&sums)[2]) {  // of the lower lanes and of the upper ones
  const Double low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  sums[0] = _mm256_fmadd_pd(low, low, sums[0]);
  sums[1] = _mm256_fmadd_pd(high, high, sums[1]);
}

FI_INLINE Int zero_int() { return _mm256_setzero_si256(); }
FI_INLINE Int broadcast_int(int32_t v) { return _mm256_set1_epi32(v); }
FI_INLINE Int load_int(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
FI_INLINE void store_int(void* p, Int v) { _mm256_storeu_si256(static_cast<Int*>(p), v); }
FI_INLINE Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
FI_INLINE Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }

FI_INLINE Float power_of_two(Int n) {  // −126 … 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(add_int(n, broadcast_int(127)), 23));
}

FI_INLINE Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }
FI_INLINE Int magnitude_bits(Float v) { return _mm256_and_si256(_mm256_castps_si256(v), broadcast_int(0x7fffffff)); }
FI_INLINE Int round_to_int(Float v) { return _mm256_cvtps_epi32(v); }        // halves to even, as threads start
FI_INLINE Float max_float(Float a, Float b) { return _mm256_max_ps(a, b); }  // b where one is NaN
FI_INLINE Float clamp(Float v, float most) {                                 // NaN stays NaN
  return _mm256_min_ps(broadcast(most), max_float(broadcast(-most), v));
}
FI_INLINE void store_quantised(int8_t* out, const Int* q) {  // 16 numbers that fit a byte
  const Int words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(low, high));
}
inline int32_t reduce_max(Int v) {
  alignas(32) int32_t lanes[kLanes];
  store_int(lanes, v);
  int32_t top = lanes[0];
  for (int i = 1; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}
inline float reduce_add(Float v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

inline float reduce_max(Float v) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
FI_INLINE void store_sums(float* out, const Float* v) {  // the sums of four vectors, side by side
  const Float sums = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

// Byte J of each lane, signed, times 2^24, as a float: a shuffle puts it into the top byte, so that no shift is needed.
template <int J>
FI_INLINE Float byte_to_float(Int lanes) {
  constexpr char z = -128;  // zero
  const __m128i to_top = _mm_setr_epi8(z, z, z, J, z, z, z, J + 4, z, z, z, J + 8, z, z, z, J + 12);
  return to_float(_mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(to_top)));
}

// The 4-bit numbers q of each lane as floats, (q − 8) · 2^28: with its top bit flipped a nibble is q − 8 in two's
// complement; low and high nibbles are moved to the tops of their bytes once, the rest is byte_to_float.
struct Nibbles {
  static constexpr float kScale = 1.0f / (1 << 28);
  Int low, high;

  Nibbles() = default;
  FI_INLINE explicit Nibbles(Int lanes) {
    const Int signs = _mm256_set1_epi8(static_cast<char>(0x88)), tops = _mm256_set1_epi8(static_cast<char>(0xf0));
    const Int flipped = _mm256_xor_si256(lanes, signs);
    low = _mm256_and_si256(_mm256_slli_epi32(flipped, 4), tops);
    high = _mm256_and_si256(flipped, tops);
  }
  template <int I>
  FI_INLINE Float get() const {
    return byte_to_float<I / 2>(I % 2 == 0 ? low : high);
  }
};

template <Dtype T>
FI_INLINE Float load_as_float(const void* p) {
  if constexpr (T == Dtype::kFloat) return load(static_cast<const float*>(p));
  const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(p));
  if constexpr (T == Dtype::kHalf) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

template <Dtype T>
FI_INLINE Float load_8_as_float(const void* p) {
  return load_as_float<T>(p);
}

FI_INLINE Float load_bytes_as_float(const void* p) {  // int8
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
FI_INLINE Float load_8_bytes_as_float(const void* p) { return load_bytes_as_float(p); }

template <Dtype T>
FI_INLINE void store_from_float(void* p, Float v) {
  if constexpr (T == Dtype::kFloat) {
    store(static_cast<float*>(p), v);
  } else if constexpr (T == Dtype::kHalf) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {  // bf16: round to nearest even in integers, a NaN stays one
    const Int bits = _mm256_castps_si256(v);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Int rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const Int nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const Int words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const Int packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
}
