// The next token of rows of logits. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int kDigits = 3, kDigitBits[kDigits] = {11, 11, 10}, kDigitShift[kDigits] = {21, 10, 0};

// Bits that order like the numbers; there is no −0 among the scores.
FI_INLINE int32_t order_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits ^ ((bits >> 31) & INT32_MAX);
}
FI_INLINE float from_order(int32_t order) {
  const int32_t bits = order ^ ((order >> 31) & INT32_MAX);
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

FI_INLINE int64_t weight_of(float e) { return static_cast<int64_t>(e * kWeightOne); }

// Keeps the compiler from fusing a product with a sum: the reference rounds both.
FI_INLINE Float rounded(Float v) {
  Float one[1] = {v};
  settle(one);
  return one[0];
}

// s = the penalised logits / temperature in whole chunks, +0 for −0.
template <Dtype T>
FI_NOINLINE void scores(const SampleJob& job, int64_t row, float* s) {
  const char* logits = job.logits + row * job.row_bytes;
  const uint8_t* seen = job.seen == nullptr ? nullptr : job.seen + row * job.v;
  const Float temperature = broadcast(job.temperature == 0 ? 1.0f : job.temperature);
  const float penalty = job.penalty;
  for (int64_t i = 0; i < job.v; i += kChunk, logits += kChunk * bytes_in(T), s += kChunk) {
    Float values[kLineVecs];
    load_some<T>(logits, job.v - i, values);
    if (seen != nullptr) {
      uint8_t marks[kChunk] = {};
      std::memcpy(marks, seen + i, job.v - i < kChunk ? job.v - i : kChunk);
      for (int v = 0; v < kLineVecs; ++v) store(s + v * kLanes, values[v]);
      for (int j = 0; j < kChunk; ++j) {
        const float punished = s[j] < 0 ? s[j] * penalty : s[j] / penalty;
        s[j] = marks[j] ? punished : s[j];
      }
      for (int v = 0; v < kLineVecs; ++v) values[v] = load(s + v * kLanes);
    }
    for (int v = 0; v < kLineVecs; ++v) store(s + v * kLanes, add(div(values[v], temperature), zero_float()));
  }
}

// The order of the highest score; the highest of each chunk; whether there is NaN.
FI_NOINLINE int32_t highest_order(const float* s, int64_t v, float* of_chunk, bool& nan) {
  int32_t top = INT32_MIN, spoiled = 0;
  for (int64_t i = 0; i < v; i += kChunk) {
    const int64_t count = v - i < kChunk ? v - i : kChunk;
    int32_t highest = INT32_MIN;
    if (count == kChunk) {
      for (int j = 0; j < kChunk; ++j) {
        const int32_t order = order_of(s[i + j]);
        highest = order > highest ? order : highest;
        spoiled |= order > kInfinityBits || order < ~kInfinityBits;
      }
    } else {
      for (int j = 0; j < count; ++j) {
        const int32_t order = order_of(s[i + j]);
        highest = order > highest ? order : highest;
        spoiled |= order > kInfinityBits || order < ~kInfinityBits;
      }
    }
    of_chunk[i / kChunk] = from_order(highest);
    top = highest > top ? highest : top;
  }
  nan = spoiled != 0;
  return top;
}

// e[i] = e^(s[i] − top) as fastinfer/ops/sample.py spells it out.
FI_NOINLINE void exponentials(const float* s, int64_t v, float top, float* e) {
  if (std::isinf(top)) {
    for (int64_t i = 0; i < v; ++i) e[i] = s[i] == top ? 1.0f : 0.0f;
    return;
  }
  const Float highest = broadcast(top);
  for (int64_t i = 0; i < v; i += kLanes) {
    const Float d = clamp(sub(load(s + i), highest), kFarthest);
    const Int n = round_to_int(mul(d, broadcast(1.44269504f)));
    const Float whole = to_float(n);
    Float r = sub(d, rounded(mul(whole, broadcast(0.693359375f))));
    r = add(r, rounded(mul(whole, broadcast(2.12194440e-4f))));
    Float sum = add(rounded(mul(r, broadcast(1.0f / 5040))), broadcast(1.0f / 720));
    sum = add(rounded(mul(sum, r)), broadcast(1.0f / 120));
    sum = add(rounded(mul(sum, r)), broadcast(1.0f / 24));
    sum = add(rounded(mul(sum, r)), broadcast(1.0f / 6));
    sum = add(rounded(mul(sum, r)), broadcast(0.5f));
    sum = add(rounded(mul(sum, r)), broadcast(1.0f));
    sum = add(rounded(mul(sum, r)), broadcast(1.0f));
    store(e + i, mul(sum, power_of_two(n)));
  }
}

// Where a sum over falling scores reaches what is needed.
struct Cut {
  int32_t order;  // of the score at which it does
  int64_t above;  // the sum over higher scores
};

// The sum is of weights, or counts those scores that are `floor` or higher. Finds a digit a pass, the highest first.
template <bool WEIGHTED>
FI_NOINLINE Cut find_cut(const float* s, const float* e, int64_t v, int32_t floor, int64_t need) {
  int64_t sums[1 << kDigitBits[0]];
  uint32_t found = 0;
  Cut cut{0, 0};
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = kDigitShift[digit];
    const uint32_t mask = (1u << kDigitBits[digit]) - 1;
    const uint32_t settled = digit == 0 ? 0 : ~uint32_t{0} << kDigitShift[digit == 0 ? 0 : digit - 1];
    std::memset(sums, 0, sizeof(sums));
    for (int64_t i = 0; i < v; ++i) {
      const int32_t order = order_of(s[i]);
      const uint32_t key = static_cast<uint32_t>(order) ^ 0x80000000u;
      if (order < floor || ((key ^ found) & settled) != 0) continue;
      sums[key >> shift & mask] += WEIGHTED ? weight_of(e[i]) : 1;
    }
    uint32_t at = mask;
    for (; at > 0 && cut.above + sums[at] < need; --at) cut.above += sums[at];
    found |= at << shift;
  }
  cut.order = static_cast<int32_t>(found ^ 0x80000000u);
  return cut;
}

FI_NOINLINE int64_t total_weight(const float* e, int64_t v) {
  int64_t total = 0;
  for (int64_t i = 0; i < v; ++i) total += weight_of(e[i]);
  return total;
}

FI_NOINLINE void drop_below(const float* s, int64_t v, int32_t floor, float* e) {
  for (int64_t i = 0; i < v; ++i) e[i] = order_of(s[i]) < floor ? 0.0f : e[i];
}

// top-p: keeps scores while the weights of higher ones, and of equal ones of higher index, sum up to less than `need`.
FI_NOINLINE void keep_share(const float* s, int64_t v, int32_t floor, double top_p, float* e) {
  const int64_t total = total_weight(e, v);
  int64_t need = total - static_cast<int64_t>(static_cast<double>(total) * (1.0 - top_p));
  if (need < 1) need = 1;
  const Cut cut = find_cut<true>(s, e, v, floor, need);
  drop_below(s, v, cut.order, e);
  int64_t above = cut.above;
  for (int64_t i = v - 1; i >= 0; --i) {
    if (order_of(s[i]) != cut.order) continue;
    const int64_t weight = weight_of(e[i]);
    if (above >= need) e[i] = 0.0f;
    above += weight;
  }
}

FI_NOINLINE int64_t draw(const float* e, int64_t v, uint32_t r) {
  int64_t target = share_of(r, total_weight(e, v)), i = 0;
  for (; i + kChunk < v; i += kChunk) {  // a chunk at a time, then within the one that exceeds the target
    const int64_t sum = total_weight(e + i, kChunk);
    if (sum > target) break;
    target -= sum;
  }
  for (; i < v - 1; ++i) {
    target -= weight_of(e[i]);
    if (target < 0) break;
  }
  return i;
}

// Moves the scores that may be among the k highest to the front, in order, and their indices with them. Returns how many
// there are: all but few are lower than the k highest chunks' maxima, which are k scores themselves.
FI_NOINLINE int64_t gather_highest(float* s, int64_t v, int64_t k, const float* of_chunk, int32_t* indices) {
  const int64_t chunks = ceil_div(v, kChunk);
  const int32_t floor = find_cut<false>(of_chunk, nullptr, chunks, INT32_MIN, k).order;
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (order_of(of_chunk[chunk]) < floor) continue;
    const int64_t end = v < (chunk + 1) * kChunk ? v : (chunk + 1) * kChunk;
    for (int64_t i = chunk * kChunk; i < end; ++i) {
      if (order_of(s[i]) < floor) continue;
      s[count] = s[i];
      indices[count++] = static_cast<int32_t>(i);
    }
  }
  return count;
}

inline int64_t first_nan(const float* s) {
  int64_t i = 0;
  while (!std::isnan(s[i])) ++i;
  return i;
}

// `s` holds the row's scores and is overwritten; `e` and `indices` have room for as many.
inline int64_t next_token(const SampleJob& job, int64_t row, float* s, float* e, int32_t* indices) {
  int64_t v = job.v;
  bool nan;
  const int32_t highest = highest_order(s, v, e, nan);
  if (nan) return first_nan(s);
  if (job.temperature == 0) {
    int64_t chunk = 0;
    while (order_of(e[chunk]) != highest) ++chunk;
    int64_t i = chunk * kChunk;
    while (order_of(s[i]) != highest) ++i;
    return i;
  }
  const bool cuts = job.top_k > 0 && job.top_k < v, gathers = cuts && job.top_k <= ceil_div(v, kChunk);
  if (gathers) v = gather_highest(s, v, job.top_k, e, indices);
  exponentials(s, v, from_order(highest), e);
  int32_t floor = INT32_MIN;
  if (cuts) {
    floor = find_cut<false>(s, e, v, floor, job.top_k).order;
    drop_below(s, v, floor, e);
  }
  if (job.top_p < 1) keep_share(s, v, floor, job.top_p, e);
  if (job.min_p > 0) {
    for (int64_t i = 0; i < v; ++i) e[i] = e[i] < job.min_p ? 0.0f : e[i];
  }
  const int64_t at = draw(e, v, random_word(job.seed, job.offset, static_cast<uint64_t>(row)));
  return gathers ? indices[at] : at;
}

inline void sample_rows(const SampleJob& job, int64_t row0, int64_t row1) {
  const int64_t padded = ceil_div(job.v, kChunk) * kChunk;
  auto* s = reinterpret_cast<float*>(scratch(3 * padded * sizeof(float)));
  auto* indices = reinterpret_cast<int32_t*>(s + 2 * padded);
  for (int64_t row = row0; row < row1; ++row) {
    if (job.dtype == Dtype::kFloat) scores<Dtype::kFloat>(job, row, s);
    if (job.dtype == Dtype::kBFloat16) scores<Dtype::kBFloat16>(job, row, s);
    if (job.dtype == Dtype::kHalf) scores<Dtype::kHalf>(job, row, s);
    job.tokens[row] = next_token(job, row, s, s + padded, indices);
  }
}
