// A row of x to int8 with one scale. Included once per instruction set by each_isa.h, after epilogue.h
// and dot_*.h.
// `Q` is what q is stored as: int8_t, or the X of dot_*.h; there is a store_quantised for it.

constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kSmallestNormal = 0x1p-126f;

// The largest of the bits of |x|: they order like the numbers, NaN above infinity above all finite ones.
template <Dtype T>
FI_INLINE uint32_t largest_bits(const char* x, int64_t left) {
  Int top[kLineVecs];
  Float values[kLineVecs];
  for (int v = 0; v < kLineVecs; ++v) top[v] = zero_int();
  for (; left >= kChunk; left -= kChunk, x += kChunk * bytes_in(T)) {
    load_chunk<T>(x, values);
    FI_UNROLL
    for (int v = 0; v < kLineVecs; ++v) top[v] = max_int(top[v], magnitude_bits(values[v]));
  }
  load_some<T>(x, left, values);
  for (int v = 0; v < kLineVecs; ++v) top[0] = max_int(top[0], max_int(top[v], magnitude_bits(values[v])));
  return reduce_max(top[0]);
}

// Below the normal numbers a scale is rounded so coarsely that x / scale can exceed 127: Rounding::kClamp.
enum class Rounding { kZero, kRound, kClamp };

template <Rounding MODE, class Q>
FI_INLINE void quantise_chunk(const Float* values, Float divisor, Q* target) {
  Int q[kLineVecs];
  FI_UNROLL
  for (int v = 0; v < kLineVecs; ++v) {
    const Float scaled = div(values[v], divisor);
    q[v] =
        MODE == Rounding::kZero ? zero_int() : round_to_int(MODE == Rounding::kClamp ? clamp(scaled, 127.0f) : scaled);
  }
  store_quantised(target, q);
}

template <Dtype T, Rounding MODE, class Q>
FI_INLINE void quantise(const char* x, int64_t left, float scale, Q* target, int64_t stride) {
  const Float divisor = broadcast(scale);
  Float values[kLineVecs];
  for (; left >= kChunk; left -= kChunk, x += kChunk * bytes_in(T), target += stride) {
    load_chunk<T>(x, values);
    quantise_chunk<MODE>(values, divisor, target);
  }
  if (left == 0) return;
  load_some<T>(x, left, values);
  quantise_chunk<MODE>(values, divisor, target);
}

// x_scale = max|x| / 127, q = round(x / x_scale) to even; a row with NaN or infinity gets x_scale NaN and q = 0. Writes
// chunks of 16 that lie `stride` apart, whole ones: q of a ragged end is 0. Returns x_scale.
template <Dtype T, class Q>
float quantize_row(const char* x, int64_t k, Q* target, int64_t stride) {
  const uint32_t bits = largest_bits<T>(x, k);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool finite = bits < kInfinity;
  const float scale = largest / 127.0f;
  if (!finite || !(scale > 0)) {
    quantise<T, Rounding::kZero>(x, k, 1.0f, target, stride);
  } else if (scale < kSmallestNormal) {
    quantise<T, Rounding::kClamp>(x, k, scale, target, stride);
  } else {
    quantise<T, Rounding::kRound>(x, k, scale, target, stride);
  }
  return finite ? scale : __builtin_nanf("");
}
