// Argument checks of the quantised matmuls, the same on every device. Errors name the op, the argument and what was expected.
#pragma once

#include "common/tensor.h"

namespace fastinfer {

inline std::string shape_text(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

inline int64_t rows_of(const Tensor& x) {  // the product of all dimensions but the last; right for K = 0 too
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  FASTINFER_CHECK(op, t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), name,
                  " must be on the device of x");
}

inline void check_activations(const char* op, const Tensor& x) {
  FASTINFER_CHECK(op, x.dim() >= 1, "x must have at least one dimension, got a scalar");
  FASTINFER_CHECK(op, is_float(x.scalar_type()), "x must be float32, bfloat16 or float16");
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (!bias.has_value()) return;
  check_same_device(op, "bias", *bias, x);
  FASTINFER_CHECK(op, bias->dim() == 1 && bias->size(0) == n, "bias must be [", n, "], got ", shape_text(*bias));
  FASTINFER_CHECK(op, bias->scalar_type() == x.scalar_type() || bias->scalar_type() == ScalarType::Float,
                  "bias must have the dtype of x or float32");
  FASTINFER_CHECK(op, bias->is_contiguous(), "bias must be contiguous");
}

// x [..., K], w [N, K] int8, w_scale [N] fp32.
inline MatmulShape check_int8_matmul(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                                     const std::optional<Tensor>& bias) {
  check_activations(op, x);
  check_same_device(op, "w", w, x);
  check_same_device(op, "w_scale", w_scale, x);
  FASTINFER_CHECK(op, w.dim() == 2, "w must be [N, K], got ", shape_text(w));
  FASTINFER_CHECK(op, w.scalar_type() == ScalarType::Char, "w must be int8");
  FASTINFER_CHECK(op, w.is_contiguous(), "w must be contiguous");
  const int64_t n = w.size(0), k = w.size(1);
  FASTINFER_CHECK(op, x.size(x.dim() - 1) == k, "x must be [..., ", k, "] to match w ", shape_text(w), ", got ",
                  shape_text(x));
  FASTINFER_CHECK(op, w_scale.dim() == 1 && w_scale.size(0) == n, "w_scale must be [", n, "], got ",
                  shape_text(w_scale));
  FASTINFER_CHECK(op, w_scale.scalar_type() == ScalarType::Float, "w_scale must be float32");
  FASTINFER_CHECK(op, w_scale.is_contiguous(), "w_scale must be contiguous");
  check_bias(op, bias, x, n);
  return {rows_of(x), n, k};
}

// x [..., K], w [N, K/2] int8, w_scale and w_zero [N, K/G] fp16, bf16 or fp32; G is 32, 64 or 128.
inline MatmulShape check_int4_matmul(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                                     const Tensor& w_zero, const std::optional<Tensor>& bias) {
  check_activations(op, x);
  check_same_device(op, "w", w, x);
  check_same_device(op, "w_scale", w_scale, x);
  check_same_device(op, "w_zero", w_zero, x);
  FASTINFER_CHECK(op, w.dim() == 2, "w must be [N, K/2], got ", shape_text(w));
  FASTINFER_CHECK(op, w.scalar_type() == ScalarType::Char, "w must be int8 (two 4-bit values a byte)");
  FASTINFER_CHECK(op, w.is_contiguous(), "w must be contiguous");
  const int64_t n = w.size(0), k = 2 * w.size(1);
  FASTINFER_CHECK(op, x.size(x.dim() - 1) == k, "x must be [..., ", k, "] to match w ", shape_text(w), ", got ",
                  shape_text(x));
  FASTINFER_CHECK(op, is_float(w_scale.scalar_type()), "w_scale must be float16, bfloat16 or float32");
  FASTINFER_CHECK(op, w_scale.dim() == 2 && w_scale.size(0) == n, "w_scale must be [", n, ", K/G], got ",
                  shape_text(w_scale));
  const int64_t groups = w_scale.size(1);
  FASTINFER_CHECK(op, groups > 0 && (k == 32 * groups || k == 64 * groups || k == 128 * groups), "w_scale must be [", n,
                  ", K/G] with G = 32, 64 or 128 and K = ", k, ", got ", shape_text(w_scale));
  FASTINFER_CHECK(op, w_scale.is_contiguous(), "w_scale must be contiguous");
  FASTINFER_CHECK(op, w_zero.scalar_type() == w_scale.scalar_type(), "w_zero must have the dtype of w_scale");
  FASTINFER_CHECK(op, w_zero.dim() == 2 && w_zero.size(0) == n && w_zero.size(1) == groups, "w_zero must be ",
                  shape_text(w_scale), " like w_scale, got ", shape_text(w_zero));
  FASTINFER_CHECK(op, w_zero.is_contiguous(), "w_zero must be contiguous");
  check_bias(op, bias, x, n);
  return {rows_of(x), n, k};
}

}  // namespace fastinfer
