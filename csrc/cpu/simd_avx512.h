// The vector types and operations that the kernels are written in, AVX-512 (F, BW, VL, DQ). simd_avx2.h is the twin.
// Included once per instruction set by each_isa.h.

constexpr int kLanes = 16;
constexpr int kLineVecs = kPanel / kLanes;  // vectors in the 16 channels of a panel
constexpr int kMaxRows = 12;                // rows of x in a block: 12 × 2 panels = 24 accumulators of 32 registers
constexpr int kMaxAccumulators = 24;

using Float = __m512;
using Int = __m512i;

// Ends one row's multiply-adds: without it gcc loads all rows ahead, runs out of registers and spills accumulators.
template <class V, int VECS>
FI_INLINE void settle(V (&acc)[VECS]) {
  FI_UNROLL
  for (int v = 0; v < VECS; ++v) asm volatile("" : "+v"(acc[v]) : : "memory");
}

FI_INLINE Float zero_float() { return _mm512_setzero_ps(); }
FI_INLINE Float broadcast(float v) { return _mm512_set1_ps(v); }
FI_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
FI_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
FI_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
FI_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
FI_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
FI_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
FI_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
template <int DISTANCE>
FI_INLINE Float swap_lanes(Float v) {  // lane i gets what lane i ^ DISTANCE has, 1, 2, 4 or 8
  constexpr int kOrder = DISTANCE == 2 || DISTANCE == 8 ? 0x4e : 0xb1;
  return DISTANCE >= 4 ? _mm512_shuffle_f32x4(v, v, kOrder) : _mm512_permute_ps(v, kOrder);
}

using Double = __m512d;
FI_INLINE Double zero_double() { return _mm512_setzero_pd(); }
FI_INLINE void store_double(double* p, Double v) { _mm512_storeu_pd(p, v); }
FI_INLINE void add_squares(Float v, Double (&sums)[2]) {  // of the lower lanes and of the upper ones
  const Double low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  sums[0] = _mm512_fmadd_pd(low, low, sums[0]);
  sums[1] = _mm512_fmadd_pd(high, high, sums[1]);
}

FI_INLINE Int zero_int() { return _mm512_setzero_si512(); }
FI_INLINE Int broadcast_int(int32_t v) { return _mm512_set1_epi32(v); }
FI_INLINE Int load_int(const void* p) { return _mm512_loadu_si512(p); }
FI_INLINE void store_int(void* p, Int v) { _mm512_storeu_si512(p, v); }
FI_INLINE Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
FI_INLINE Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }

FI_INLINE Float power_of_two(Int n) {  // −126 … 127
  return _mm512_castsi512_ps(_mm512_slli_epi32(add_int(n, broadcast_int(127)), 23));
}

FI_INLINE Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }
FI_INLINE Int magnitude_bits(Float v) { return _mm512_and_si512(_mm512_castps_si512(v), broadcast_int(0x7fffffff)); }
FI_INLINE Int round_to_int(Float v) {  // halves to even
  return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FI_INLINE Float max_float(Float a, Float b) { return _mm512_max_ps(a, b); }  // b where one is NaN
FI_INLINE Float clamp(Float v, float most) {                                 // NaN stays NaN
  return _mm512_min_ps(broadcast(most), max_float(broadcast(-most), v));
}
FI_INLINE void store_quantised(int8_t* out, const Int* q) {  // 16 numbers that fit a byte
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(q[0]));
}
FI_INLINE int32_t reduce_max(Int v) { return _mm512_reduce_max_epi32(v); }
FI_INLINE float reduce_add(Float v) { return _mm512_reduce_add_ps(v); }

inline float reduce_max(Float v) { return _mm512_reduce_max_ps(v); }
FI_INLINE __m256 add_halves(Float v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
FI_INLINE void store_sums(float* out, const Float* v) {  // the sums of four vectors, side by side
  const __m256 low = _mm256_hadd_ps(add_halves(v[0]), add_halves(v[1]));
  const __m256 sums = _mm256_hadd_ps(low, _mm256_hadd_ps(add_halves(v[2]), add_halves(v[3])));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

// Byte J of each lane, signed, times 2^24, as a float: a shuffle puts it into the top byte, so that no shift is needed.
template <int J>
FI_INLINE Float byte_to_float(Int lanes) {
  constexpr char z = -128;  // zero
  const __m128i to_top = _mm_setr_epi8(z, z, z, J, z, z, z, J + 4, z, z, z, J + 8, z, z, z, J + 12);
  return to_float(_mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(to_top)));
}

// The 4-bit numbers q of each lane as floats, q − 8: a table of floats, looked up by the low four bits.
struct Nibbles {
  static constexpr float kScale = 1.0f;
  Int lanes;

  Nibbles() = default;
  FI_INLINE explicit Nibbles(Int lanes) : lanes(lanes) {}
  template <int I>
  FI_INLINE Float get() const {
    const Float table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(I == 0 ? lanes : _mm512_srli_epi32(lanes, 4 * I), table);
  }
};

template <Dtype T>
FI_INLINE Float load_as_float(const void* p) {
  if constexpr (T == Dtype::kFloat) return load(static_cast<const float*>(p));
  const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  if constexpr (T == Dtype::kHalf) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <Dtype T>
FI_INLINE Float load_8_as_float(const void* p) {  // 8 elements, then zeros
  const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(p));
  if constexpr (T == Dtype::kFloat) return _mm512_zextps256_ps512(_mm256_loadu_ps(static_cast<const float*>(p)));
  if constexpr (T == Dtype::kHalf) return _mm512_zextps256_ps512(_mm256_cvtph_ps(bits));
  return _mm512_zextps256_ps512(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
}

FI_INLINE Float load_bytes_as_float(const void* p) {  // int8
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
FI_INLINE Float load_8_bytes_as_float(const void* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

template <Dtype T>
FI_INLINE void store_from_float(void* p, Float v) {
  if constexpr (T == Dtype::kFloat) {
    store(static_cast<float*>(p), v);
  } else if constexpr (T == Dtype::kHalf) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  } else {  // bf16: round to nearest even in integers, a NaN stays one
    const Int bits = _mm512_castps_si512(v);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Int rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const Int words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
  }
}
