// The passes of kv_attention. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

#include "cpu/quantize_row.h"

constexpr int kTileRows = FASTINFER_AVX512 ? 4 : 2;  // queries in a register tile, beside 4 keys or 4 vectors of values
constexpr int kTile = 4;

// ---- append ---------------------------------------------------------------------------------------------------------

inline void widen(Dtype type, const char* p, int64_t index, int64_t count, float* out) {  // whole chunks of 16
  for (int64_t i = 0; i < count; i += kChunk) load_some(type, p, index + i, count - i, out + i);
}

// a + b and a − b of lanes DISTANCE apart: an fma with 1 or −1, whose product is exact, rounds the sum alone.
template <int DISTANCE>
FI_INLINE Float add_and_subtract(Float v) {
  alignas(64) float signs[kLanes];
  FI_UNROLL
  for (int i = 0; i < kLanes; ++i) signs[i] = i & DISTANCE ? -1.0f : 1.0f;
  return fma(v, load(signs), swap_lanes<DISTANCE>(v));
}

// The transform of keys and queries beside an int8 cache, LAYOUTS.md#kv-cache; x has room for whole vectors.
inline void hadamard(float* x, int64_t d) {
  const int64_t n = d & -d;
  for (int64_t i = 0; i < d; i += kLanes) {
    Float v = add_and_subtract<4>(add_and_subtract<2>(add_and_subtract<1>(load(x + i))));
    if constexpr (kLanes > 8) v = n > 8 ? add_and_subtract<8>(v) : v;
    store(x + i, v);
  }
  for (int64_t distance = kLanes; distance < n; distance *= 2) {
    for (int64_t i = 0; i < d; i += kLanes) {
      if (i & distance) continue;
      const Float a = load(x + i), b = load(x + i + distance);
      store(x + i, add(a, b));
      store(x + i + distance, sub(a, b));
    }
  }
}

template <Dtype T>
void append_row(const AttentionJob& job, const float* x, int64_t cache_row, char* cache, float* scales) {
  const int64_t d = job.s.d;
  if (job.int8) {
    int8_t q[kMaxHead];
    scales[cache_row] = quantize_row<Dtype::kFloat>(reinterpret_cast<const char*>(x), d, q, kChunk);
    std::memcpy(cache + cache_row * d, q, d);
    return;
  }
  for (int64_t i = 0; i < d; i += kChunk) {
    Float values[kLineVecs];
    for (int v = 0; v < kLineVecs; ++v) values[v] = load(x + i + v * kLanes);
    store_some<T>(cache + (cache_row * d + i) * bytes_in(T), d - i, values);
  }
}

// The new tokens of heads of the cache, (b, g) from `begin` to `end`, and the queries to go with them.
template <Dtype T>
void append_tokens_as(const AttentionJob& job, int64_t begin, int64_t end) {
  const AttentionShape& s = job.s;
  alignas(64) float cos[kMaxHead], sin[kMaxHead], x[kMaxHead];
  const float scale = job.int8 ? job.scale / (s.d & -s.d) : job.scale;  // what the transform leaves to divide by
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t b = pair / s.g, g = pair % s.g;
    for (int64_t t = 0; t < s.t; ++t) {
      widen(job.rotation_dtype, job.cos.data, job.cos.at(b, t), s.r, cos);
      widen(job.rotation_dtype, job.sin.data, job.sin.at(b, t), s.r, sin);
      const int64_t cache_row = job.cache_row(b, g, job.position(b, t));
      widen(T, job.k.at(b, t, g), 0, s.d, x);
      rotate(x, cos, sin, s.r / 2);
      if (job.int8) hadamard(x, s.d);
      append_row<T>(job, x, cache_row, job.k_cache, job.k_scale);
      widen(T, job.v.at(b, t, g), 0, s.d, x);
      append_row<T>(job, x, cache_row, job.v_cache, job.v_scale);
      for (int64_t i = 0; i < s.group(); ++i) {
        float* query = job.queries + (pair * s.rows() + t * s.group() + i) * job.padded;
        widen(T, job.q.at(b, t, g * s.group() + i), 0, s.d, query);
        rotate(query, cos, sin, s.r / 2);
        if (job.int8) hadamard(query, s.d);
        for (int64_t j = 0; j < job.padded; ++j) query[j] *= scale;
      }
    }
  }
}

inline void append_tokens(const AttentionJob& job, int64_t begin, int64_t end) {
  if (job.dtype == Dtype::kFloat) append_tokens_as<Dtype::kFloat>(job, begin, end);
  if (job.dtype == Dtype::kBFloat16) append_tokens_as<Dtype::kBFloat16>(job, begin, end);
  if (job.dtype == Dtype::kHalf) append_tokens_as<Dtype::kHalf>(job, begin, end);
}

// ---- attend ---------------------------------------------------------------------------------------------------------

// What the cache holds, as floats: a vector of it, or 8 elements and zeros where D ends within one.
template <Dtype T>
struct Stored {
  static constexpr int64_t kBytes = bytes_in(T);
  template <bool ENDS>
  static FI_INLINE Float get(const char* p) {
    return ENDS ? load_8_as_float<T>(p) : load_as_float<T>(p);
  }
};

struct StoredInt8 {
  static constexpr int64_t kBytes = 1;
  template <bool ENDS>
  static FI_INLINE Float get(const char* p) {
    return ENDS ? load_8_bytes_as_float(p) : load_bytes_as_float(p);
  }
};

template <class S, int ROWS, bool ENDS>
FI_INLINE void multiply_add(const float* q, int64_t padded, const char* const* keys, int64_t d,
                            Float (&acc)[ROWS][kTile]) {
  Float key[kTile];
  FI_UNROLL
  for (int i = 0; i < kTile; ++i) key[i] = S::template get<ENDS>(keys[i] + d * S::kBytes);
  FI_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const Float query = load(q + r * padded + d);
    FI_UNROLL
    for (int i = 0; i < kTile; ++i) acc[r][i] = fma(query, key[i], acc[r][i]);
  }
}

// scores[r][i] = q[r] · keys[i]. Fetches the values on the way: they are read in strips, which no hardware foresees.
template <class S, int ROWS>
FI_NOINLINE void score_keys(const float* q, int64_t padded, const char* keys, const char* values, int64_t count,
                            int64_t d, float* scores) {
  const int64_t tile_bytes = kTile * d * S::kBytes;
  for (int64_t key = 0; key < count; key += kTile, values += tile_bytes) {
    for (int64_t i = 0; i < tile_bytes; i += 64) _mm_prefetch(values + i, _MM_HINT_T1);
    const char* tile[kTile];
    for (int i = 0; i < kTile; ++i) {  // past the end, the last one again
      tile[i] = keys + (key + i < count ? key + i : count - 1) * d * S::kBytes;
    }
    Float acc[ROWS][kTile];
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int i = 0; i < kTile; ++i) acc[r][i] = zero_float();
    }
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) multiply_add<S, ROWS, false>(q, padded, tile, j, acc);
    if (j < d) multiply_add<S, ROWS, true>(q, padded, tile, j, acc);
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) store_sums(scores + r * kKeys + key, acc[r]);
  }
}

// sums[r][0 … VECS vectors) = Σ weights[r][i] · values[i], in order
template <class S, int ROWS, int VECS, bool ENDS>
FI_INLINE void add_values(const float* weights, const char* values, int64_t count, int64_t d, float* sums,
                          int64_t padded) {
  Float acc[ROWS][VECS];
  FI_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    FI_UNROLL
    for (int v = 0; v < VECS; ++v) acc[r][v] = zero_float();
  }
  for (int64_t i = 0; i < count; ++i, values += d * S::kBytes) {
    Float value[VECS];
    FI_UNROLL
    for (int v = 0; v < VECS; ++v) value[v] = S::template get<ENDS>(values + v * kLanes * S::kBytes);
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Float weight = broadcast(weights[r * kKeys + i]);
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
  FI_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    FI_UNROLL
    for (int v = 0; v < VECS; ++v) store(sums + r * padded + v * kLanes, acc[r][v]);
  }
}

template <class S, int ROWS>
FI_NOINLINE void sum_values(const float* weights, const char* values, int64_t count, int64_t d, float* sums,
                            int64_t padded) {
  int64_t j = 0;
  for (; j + kTile * kLanes <= d; j += kTile * kLanes) {
    add_values<S, ROWS, kTile, false>(weights, values + j * S::kBytes, count, d, sums + j, padded);
  }
  for (; j + kLanes <= d; j += kLanes) {
    add_values<S, ROWS, 1, false>(weights, values + j * S::kBytes, count, d, sums + j, padded);
  }
  if (j < d) add_values<S, ROWS, 1, true>(weights, values + j * S::kBytes, count, d, sums + j, padded);
}

// Scores to weights e^(score − largest), 0 outside of begin … end; scores has whole vectors. stats: largest, sum.
inline void weigh(float* scores, int64_t count, int64_t begin, int64_t end, float softcap, float* stats) {
  constexpr float kHidden = -__builtin_inff();
  const int64_t padded = ceil_div(count, kLanes) * kLanes;
  if (softcap > 0) {
    const Float cap = broadcast(softcap);
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(scores + i, mul(cap, tanh_float(div(load(scores + i), cap))));
    }
  }
  for (int64_t i = 0; i < begin; ++i) scores[i] = kHidden;
  for (int64_t i = end; i < padded; ++i) scores[i] = kHidden;
  Float top = broadcast(kHidden), sum = zero_float();
  for (int64_t i = 0; i < padded; i += kLanes) top = max_float(load(scores + i), top);
  stats[0] = reduce_max(top);
  top = broadcast(stats[0]);
  for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, exp_float(sub(load(scores + i), top)));
  for (int64_t i = 0; i < begin; ++i) scores[i] = 0;
  for (int64_t i = end; i < padded; ++i) scores[i] = 0;
  for (int64_t i = 0; i < padded; i += kLanes) sum = add(sum, load(scores + i));
  stats[1] = reduce_add(sum);
}

// ROWS queries from `row` on, over the keys from `from` to `to`.
template <class S, int ROWS>
void attend_rows(const AttentionJob& job, int64_t b, int64_t g, int64_t row, int64_t from, int64_t to, float* sums,
                 float* stats) {
  const AttentionShape& s = job.s;
  from = std::max(from, job.first_seen(b, row / s.group()));
  to = std::min(to, job.position(b, (row + ROWS - 1) / s.group()) + 1);
  if (from >= to) {
    for (int r = 0; r < ROWS; ++r) stats[2 * r] = stats[2 * r + 1] = 0;
    return;
  }
  alignas(64) float scores[ROWS * kKeys];
  const int64_t count = to - from, cache_row = job.cache_row(b, g, from);
  const char* values = job.v_cache + cache_row * s.d * S::kBytes;
  const float* queries = job.queries + ((b * s.g + g) * s.rows() + row) * job.padded;
  score_keys<S, ROWS>(queries, job.padded, job.k_cache + cache_row * s.d * S::kBytes, values, count, s.d, scores);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t t = (row + r) / s.group();
    const int64_t end = std::max<int64_t>(0, std::min(count, job.position(b, t) + 1 - from));
    const int64_t begin = std::min(end, std::max<int64_t>(0, job.first_seen(b, t) - from));
    float* weights = scores + r * kKeys;
    for (int64_t i = 0; job.int8 && i < count; ++i) weights[i] *= job.k_scale[cache_row + i];
    weigh(weights, count, begin, end, job.softcap, stats + 2 * r);
    for (int64_t i = begin; job.int8 && i < end; ++i) weights[i] *= job.v_scale[cache_row + i];
  }
  sum_values<S, ROWS>(scores, values, count, s.d, sums, job.padded);
}

template <class S, int ROWS>
FI_INLINE int64_t attend_tiles(const AttentionJob& job, int64_t b, int64_t g, int64_t row, int64_t from, int64_t to,
                               float* sums, float* stats) {
  for (; row + ROWS <= job.s.rows(); row += ROWS) {
    attend_rows<S, ROWS>(job, b, g, row, from, to, sums + row * job.padded, stats + 2 * row);
  }
  if constexpr (ROWS > 1) row = attend_tiles<S, ROWS / 2>(job, b, g, row, from, to, sums, stats);
  return row;
}

template <class S>
void attend_as(const AttentionJob& job, int64_t b, int64_t g, int64_t piece) {
  const int64_t each = (job.first[b + 1] - job.first[b]) / job.s.g;
  const int64_t at = (job.first[b] + g * each + piece) * job.s.rows();
  const int64_t from = job.first_seen(b, 0) + piece * kKeys;
  attend_tiles<S, kTileRows>(job, b, g, 0, from, from + kKeys, job.sums + at * job.padded, job.stats + 2 * at);
}

inline void attend(const AttentionJob& job, int64_t b, int64_t g, int64_t piece) {
  if (job.int8) return attend_as<StoredInt8>(job, b, g, piece);
  if (job.dtype == Dtype::kFloat) attend_as<Stored<Dtype::kFloat>>(job, b, g, piece);
  if (job.dtype == Dtype::kBFloat16) attend_as<Stored<Dtype::kBFloat16>>(job, b, g, piece);
  if (job.dtype == Dtype::kHalf) attend_as<Stored<Dtype::kHalf>>(job, b, g, piece);
}

// ---- combine --------------------------------------------------------------------------------------------------------

// One query's pieces, `step` rows apart, to y; 0 where it has seen nothing.
template <Dtype T>
void combine_row(const AttentionJob& job, int64_t at, int64_t pieces, char* y) {
  const int64_t step = job.s.rows();
  float top = -__builtin_inff(), total = 0;
  for (int64_t i = 0; i < pieces; ++i) {  // a piece in which nothing was seen has the sum 0
    const float* stats = job.stats + 2 * (at + i * step);
    if (stats[1] != 0) top = std::max(top, stats[0]);
  }
  for (int64_t i = 0; i < pieces; ++i) {  // overwrites the largest score by the piece's factor
    float* stats = job.stats + 2 * (at + i * step);
    stats[0] = stats[1] == 0 ? 0.0f : std::exp(stats[0] - top);
    total += stats[0] * stats[1];
  }
  const Float inverse = broadcast(total == 0 ? 0.0f : 1.0f / total);
  for (int64_t j = 0; j < job.s.d; j += kChunk) {
    Float values[kLineVecs];
    for (int v = 0; v < kLineVecs; ++v) values[v] = zero_float();
    for (int64_t i = 0; i < pieces; ++i) {
      const float* stats = job.stats + 2 * (at + i * step);
      if (stats[1] == 0) continue;
      const float* sums = job.sums + (at + i * step) * job.padded + j;
      for (int v = 0; v < kLineVecs; ++v) values[v] = fma(broadcast(stats[0]), load(sums + v * kLanes), values[v]);
    }
    for (int v = 0; v < kLineVecs; ++v) values[v] = mul(values[v], inverse);
    store_some<T>(y + j * bytes_in(T), job.s.d - j, values);
  }
}

inline void combine(const AttentionJob& job, int64_t begin, int64_t end) {
  const AttentionShape& s = job.s;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i % s.rows(), pair = i / s.rows(), b = pair / s.g, g = pair % s.g;
    const int64_t pieces = (job.first[b + 1] - job.first[b]) / s.g;
    const int64_t at = (job.first[b] + g * pieces) * s.rows() + row;
    const int64_t t = row / s.group(), head = g * s.group() + row % s.group();
    char* y = job.y + ((b * s.t + t) * s.h + head) * s.d * bytes_of(job.dtype);
    if (job.dtype == Dtype::kFloat) combine_row<Dtype::kFloat>(job, at, pieces, y);
    if (job.dtype == Dtype::kBFloat16) combine_row<Dtype::kBFloat16>(job, at, pieces, y);
    if (job.dtype == Dtype::kHalf) combine_row<Dtype::kHalf>(job, at, pieces, y);
  }
}
