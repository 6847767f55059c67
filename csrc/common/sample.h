// sample's argument checks, its random numbers and its draw: the same on every device.
#pragma once

#include "common/matmul_checks.h"

#include <cmath>
#include <cstdint>

namespace fastinfer {

constexpr int64_t kMaxVocabulary = int64_t{1} << 20;  // so that the sum of all weights stays below 2^60
constexpr float kWeightOne = 0x1p40f;                 // the weight of the likeliest token
constexpr float kFarthest = 30.0f;                    // e^-30 is less than a unit of weight

// What is done to the scores before the draw.
struct SampleOptions {
  double temperature;
  int64_t top_k;
  double top_p;
  double min_p;
  double repetition_penalty;
};

inline void check_one_number(const char* op, const char* name, const Tensor& t, const Tensor& logits) {
  FASTINFER_CHECK(op, t.scalar_type() == ScalarType::Long, name, " must be int64");
  FASTINFER_CHECK(op, t.numel() == 1, name, " must have one element, got ", shape_text(t));
  check_same_device(op, name, t, logits, "logits");
}

inline void check_sample(const char* op, const Tensor& logits, const Tensor& seed, const Tensor& offset,
                         const SampleOptions& o, const std::optional<Tensor>& seen) {
  constexpr double kSmallest = 0x1p-126, kLargest = 3.4028234663852886e38;
  FASTINFER_CHECK(op, is_float(logits.scalar_type()), "logits must be float32, bfloat16 or float16");
  FASTINFER_CHECK(op, logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxVocabulary,
                  "logits must be [B, V] with V from 1 to ", kMaxVocabulary, ", got ", shape_text(logits));
  check_one_number(op, "seed", seed, logits);
  check_one_number(op, "offset", offset, logits);
  FASTINFER_CHECK(op, o.temperature == 0 || (o.temperature >= kSmallest && o.temperature <= kLargest),
                  "temperature must be 0 or a positive float32, got ", o.temperature);
  FASTINFER_CHECK(op, o.top_k >= 0, "top_k must be at least 0, got ", o.top_k);
  FASTINFER_CHECK(op, o.top_p >= 0 && o.top_p <= 1, "top_p must be between 0 and 1, got ", o.top_p);
  FASTINFER_CHECK(op, o.min_p >= 0 && o.min_p <= 1, "min_p must be between 0 and 1, got ", o.min_p);
  FASTINFER_CHECK(op, o.repetition_penalty >= kSmallest && o.repetition_penalty <= kLargest,
                  "repetition_penalty must be a positive float32, got ", o.repetition_penalty);
  if (!seen) return;
  FASTINFER_CHECK(op, seen->scalar_type() == ScalarType::Bool, "seen must be bool");
  FASTINFER_CHECK(op, seen->dim() == 2 && seen->size(0) == logits.size(0) && seen->size(1) == logits.size(1),
                  "seen must have the shape of logits ", shape_text(logits), ", got ", shape_text(*seen));
  FASTINFER_CHECK(op, seen->is_contiguous(), "seen must be contiguous");
  check_same_device(op, "seen", *seen, logits, "logits");
}

// The first word of Philox 4x32-10 (Salmon et al., SC 2011) for a row of the batch.
FASTINFER_BOTH inline uint32_t random_word(uint64_t seed, uint64_t offset, uint64_t row) {
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32);
  uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return c0;
}

// ⌊r · total / 2^32⌋ for total < 2^62.
FASTINFER_BOTH inline int64_t share_of(uint32_t r, int64_t total) {
  const uint64_t high = static_cast<uint64_t>(total) >> 30, low = static_cast<uint64_t>(total) & ((1u << 30) - 1);
  return static_cast<int64_t>((r * high + (r * low >> 30)) >> 2);
}

}  // namespace fastinfer
