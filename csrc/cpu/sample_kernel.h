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

// The order of the highest score; whether there is NaN.
FI_NOINLINE int32_t highest_order(const float* s, int64_t v, bool& nan) {
  int32_t top = INT32_MIN, spoiled = 0;
  for (int64_t i = 0; i < v; ++i) {
    const int32_t order = order_of(s[i]);
    top = order > top ? order : top;
    spoiled |= order > kInfinityBits || order < (kInfinityBits ^ -1);
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

inline int64_t first_nan(const float* s) {
  int64_t i = 0;
  while (!std::isnan(s[i])) ++i;
  return i;
}

// `s` holds the row's scores, `e` has room for as many.
inline int64_t next_token(const SampleJob& job, int64_t row, const float* s, float* e) {
  const int64_t v = job.v;
  bool nan;
  const int32_t highest = highest_order(s, v, nan);
  if (nan) return first_nan(s);
  if (job.temperature == 0) {
    int64_t i = 0;
    while (order_of(s[i]) != highest) ++i;
    return i;
  }
  exponentials(s, v, from_order(highest), e);
  int32_t floor = INT32_MIN;
  if (job.top_k > 0 && job.top_k < v) {
    floor = find_cut<false>(s, e, v, floor, job.top_k).order;
    drop_below(s, v, floor, e);
  }
  if (job.top_p < 1) keep_share(s, v, floor, job.top_p, e);
  if (job.min_p > 0) {
    for (int64_t i = 0; i < v; ++i) e[i] = e[i] < job.min_p ? 0.0f : e[i];
  }
  return draw(e, v, random_word(job.seed, job.offset, static_cast<uint64_t>(row)));
}

inline void sample_rows(const SampleJob& job, int64_t row0, int64_t row1) {
  const int64_t padded = ceil_div(job.v, kChunk) * kChunk;
  auto* s = reinterpret_cast<float*>(scratch(2 * padded * sizeof(float)));
  for (int64_t row = row0; row < row1; ++row) {
    if (job.dtype == Dtype::kFloat) scores<Dtype::kFloat>(job, row, s);
    if (job.dtype == Dtype::kBFloat16) scores<Dtype::kBFloat16>(job, row, s);
    if (job.dtype == Dtype::kHalf) scores<Dtype::kHalf>(job, row, s);
    job.tokens[row] = next_token(job, row, s, s + padded);
  }
}
