// Argument checks of kv_attention, the same on every device. Errors name the op, the argument and what was expected.
#pragma once

#include "common/matmul_checks.h"

namespace fastinfer {

constexpr int64_t kMaxHead = 256;  // largest D

// q [B, T, H, D], k and v [B, T, G, D], caches [B, G, L, D], cos and sin [B or 1, T, R] (R = 0: none).
struct AttentionShape {
  int64_t b, t, h, g, d, l, r;

  int64_t group() const { return h / g; }       // query heads that share a head of the cache
  int64_t rows() const { return t * (h / g); }  // queries that do, row t · group() + head
};

struct AttentionTensors {
  const Tensor &q, &k, &v, &k_cache, &v_cache, &lengths;
  const std::optional<Tensor>&k_scale, &v_scale, &cos, &sin, &starts;
};

inline void check_new_tokens(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_same_device(op, name, t, q, "q");
  FASTINFER_CHECK(op, t.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  FASTINFER_CHECK(op, t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(3) == q.size(3), name,
                  " must be [B, T, G, D] beside q ", shape_text(q), ", got ", shape_text(t));
  FASTINFER_CHECK(op, t.stride(3) == 1, "the last dimension of ", name, " must be contiguous");
}

inline void check_cache(const char* op, const char* name, const Tensor& cache, const char* scale_name,
                        const std::optional<Tensor>& scale, const AttentionTensors& a, const AttentionShape& s) {
  check_same_device(op, name, cache, a.q, "q");
  const bool int8 = a.k_cache.scalar_type() == ScalarType::Char;
  FASTINFER_CHECK(op, int8 || a.k_cache.scalar_type() == a.q.scalar_type(),
                  "k_cache must have the dtype of q or be int8");
  FASTINFER_CHECK(op, cache.scalar_type() == a.k_cache.scalar_type(), name, " must have the dtype of k_cache");
  FASTINFER_CHECK(op,
                  cache.dim() == 4 && cache.size(0) == s.b && cache.size(1) == s.g && cache.size(2) == s.l &&
                      cache.size(3) == s.d && s.l >= s.t,
                  name, " must be [", s.b, ", ", s.g, ", L, ", s.d, "] with L >= T = ", s.t, ", got ",
                  shape_text(cache));
  FASTINFER_CHECK(op, cache.is_contiguous(), name, " must be contiguous");
  FASTINFER_CHECK(op, scale.has_value() == int8, scale_name, " must be given with an int8 cache, and only then");
  if (!int8) return;
  check_same_device(op, scale_name, *scale, a.q, "q");
  FASTINFER_CHECK(op,
                  scale->scalar_type() == ScalarType::Float && scale->dim() == 3 && scale->size(0) == s.b &&
                      scale->size(1) == s.g && scale->size(2) == s.l && scale->is_contiguous(),
                  scale_name, " must be float32 [", s.b, ", ", s.g, ", ", s.l, "], contiguous, got ",
                  shape_text(*scale));
}

inline void check_row_positions(const char* op, const char* name, const Tensor& rows, const Tensor& q) {
  check_same_device(op, name, rows, q, "q");
  FASTINFER_CHECK(op, rows.scalar_type() == ScalarType::Int, name, " must be int32");
  FASTINFER_CHECK(op, rows.dim() == 1 && rows.size(0) == q.size(0) && rows.is_contiguous(), name, " must be [",
                  q.size(0), "], contiguous, got ", shape_text(rows));
}

inline void check_rotation(const char* op, const char* name, const Tensor& t, const AttentionTensors& a) {
  check_same_device(op, name, t, a.q, "q");
  FASTINFER_CHECK(op, t.scalar_type() == a.q.scalar_type() || t.scalar_type() == ScalarType::Float, name,
                  " must have the dtype of q or float32");
  FASTINFER_CHECK(op, t.scalar_type() == a.cos->scalar_type(), name, " must have the dtype of cos");
  FASTINFER_CHECK(op, t.dim() == 3 && (t.size(0) == 1 || t.size(0) == a.q.size(0)) && t.size(1) == a.q.size(1), name,
                  " must be [B or 1, T, R] with T = ", a.q.size(1), ", got ", shape_text(t));
  FASTINFER_CHECK(op, t.size(2) % 2 == 0 && t.size(2) <= a.q.size(3) && t.size(2) == a.cos->size(2) && t.stride(2) == 1,
                  name, " must have an even R <= ", a.q.size(3), ", cos and sin alike, contiguous, got ",
                  shape_text(t));
}

inline AttentionShape check_kv_attention(const char* op, const AttentionTensors& a, int64_t window, double softcap) {
  const Tensor& q = a.q;
  FASTINFER_CHECK(op, is_float(q.scalar_type()), "q must be float32, bfloat16 or float16");
  FASTINFER_CHECK(op, q.dim() == 4 && q.size(3) % 8 == 0 && q.size(3) > 0 && q.size(3) <= kMaxHead,
                  "q must be [B, T, H, D] with D a multiple of 8 up to ", kMaxHead, ", got ", shape_text(q));
  FASTINFER_CHECK(op, q.stride(3) == 1, "the last dimension of q must be contiguous");
  check_new_tokens(op, "k", a.k, q);
  check_new_tokens(op, "v", a.v, q);
  FASTINFER_CHECK(op, a.k.size(2) > 0 && q.size(2) % a.k.size(2) == 0, "k must have G heads that divide those of q, ",
                  q.size(2), ", got ", shape_text(a.k));
  FASTINFER_CHECK(op, a.v.size(2) == a.k.size(2), "v must have the shape of k, got ", shape_text(a.v));
  FASTINFER_CHECK(op, a.k_cache.dim() == 4, "k_cache must be [B, G, L, D], got ", shape_text(a.k_cache));
  AttentionShape s{q.size(0), q.size(1), q.size(2), a.k.size(2), q.size(3), a.k_cache.size(2), 0};
  check_cache(op, "k_cache", a.k_cache, "k_scale", a.k_scale, a, s);
  check_cache(op, "v_cache", a.v_cache, "v_scale", a.v_scale, a, s);
  check_row_positions(op, "lengths", a.lengths, q);
  if (a.starts) check_row_positions(op, "starts", *a.starts, q);
  FASTINFER_CHECK(op, a.cos.has_value() == a.sin.has_value(), "cos and sin must be given together");
  if (a.cos) {
    check_rotation(op, "cos", *a.cos, a);
    check_rotation(op, "sin", *a.sin, a);
    s.r = a.cos->size(2);
  }
  FASTINFER_CHECK(op, window >= 0, "window must be 0 or more, got ", window);
  FASTINFER_CHECK(op, softcap >= 0, "softcap must be 0 or more, got ", softcap);
  return s;
}

}  // namespace fastinfer
