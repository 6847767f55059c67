// Argument checks of the matmuls, the same on every device. Errors name the op, the argument and what was expected.
#pragma once

#include "common/epilogue.h"

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

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& other,
                              const char* other_name = "x") {
  FASTINFER_CHECK(op, t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), name,
                  " must be on the device of ", other_name);
}

inline void check_x(const char* op, const Tensor& x) {
  FASTINFER_CHECK(op, x.dim() >= 1, "x must have at least one dimension, got a scalar");
  FASTINFER_CHECK(op, is_float(x.scalar_type()), "x must be float32, bfloat16 or float16");
}

// The arguments of an op that say what becomes of x · wᵀ, and the dtype of y.
struct EpilogueArguments {
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  const std::string& activation;
  ScalarType y_type;
  bool halves = false;  // gates take the rows of the gate before those of what it is multiplied with, not in eights
};

// bias [N] of the dtype of y or fp32, residual [..., N_out] of the dtype of y.
inline Gate check_epilogue(const char* op, const EpilogueArguments& e, const Tensor& x, int64_t n) {
  if (e.bias.has_value()) {
    const Tensor& bias = *e.bias;
    check_same_device(op, "bias", bias, x);
    FASTINFER_CHECK(op, bias.dim() == 1 && bias.size(0) == n, "bias must be [", n, "], got ", shape_text(bias));
    FASTINFER_CHECK(op, bias.scalar_type() == e.y_type || bias.scalar_type() == ScalarType::Float,
                    "bias must have the dtype of y or float32");
    FASTINFER_CHECK(op, bias.is_contiguous(), "bias must be contiguous");
  }
  const Gate gate = check_activation(op, e.activation, n);
  if (e.residual.has_value()) {
    const Tensor& residual = *e.residual;
    check_same_device(op, "residual", residual, x);
    bool fits = residual.dim() == x.dim() && residual.size(x.dim() - 1) == out_features(gate, n);
    for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = residual.size(i) == x.size(i);
    FASTINFER_CHECK(op, fits, "residual must be [..., ", out_features(gate, n), "] with the rows of x ", shape_text(x),
                    ", got ", shape_text(residual));
    FASTINFER_CHECK(op, residual.scalar_type() == e.y_type, "residual must have the dtype of y");
    FASTINFER_CHECK(op, residual.is_contiguous(), "residual must be contiguous");
  }
  return gate;
}

// w_scale [N] fp32 of w [N, K] int8.
inline void check_int8_scale(const char* op, const Tensor& w_scale, const Tensor& w) {
  check_same_device(op, "w_scale", w_scale, w);
  FASTINFER_CHECK(op, w_scale.dim() == 1 && w_scale.size(0) == w.size(0), "w_scale must be [", w.size(0), "], got ",
                  shape_text(w_scale));
  FASTINFER_CHECK(op, w_scale.scalar_type() == ScalarType::Float, "w_scale must be float32");
  FASTINFER_CHECK(op, w_scale.is_contiguous(), "w_scale must be contiguous");
}

// x [..., K], w [N, K] int8, w_scale [N] fp32; the dtype of x is left to the caller.
inline MatmulShape check_int8_matmul(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale) {
  FASTINFER_CHECK(op, x.dim() >= 1, "x must have at least one dimension, got a scalar");
  check_same_device(op, "w", w, x);
  FASTINFER_CHECK(op, w.dim() == 2, "w must be [N, K], got ", shape_text(w));
  FASTINFER_CHECK(op, w.scalar_type() == ScalarType::Char, "w must be int8");
  FASTINFER_CHECK(op, w.is_contiguous(), "w must be contiguous");
  const int64_t n = w.size(0), k = w.size(1);
  FASTINFER_CHECK(op, x.size(x.dim() - 1) == k, "x must be [..., ", k, "] to match w ", shape_text(w), ", got ",
                  shape_text(x));
  check_int8_scale(op, w_scale, w);
  return {rows_of(x), n, k};
}

// What int8_scaled_matmul takes x as, float or int8 with x_scale [...] fp32 and the dtype of y; returns that dtype.
inline ScalarType check_scaled_activations(const char* op, const Tensor& x, const std::optional<Tensor>& x_scale,
                                           const std::optional<ScalarType>& out_dtype) {
  if (x.scalar_type() != ScalarType::Char) {
    check_x(op, x);
    FASTINFER_CHECK(op, !x_scale.has_value() && !out_dtype.has_value(),
                    "x_scale and out_dtype must be None beside float x");
    return x.scalar_type();
  }
  FASTINFER_CHECK(op, x_scale.has_value(), "x_scale must be given beside int8 x");
  check_same_device(op, "x_scale", *x_scale, x);
  bool fits = x_scale->dim() + 1 == x.dim();
  for (int64_t i = 0; fits && i < x_scale->dim(); ++i) fits = x_scale->size(i) == x.size(i);
  FASTINFER_CHECK(op, fits, "x_scale must have the rows of x ", shape_text(x), ", got ", shape_text(*x_scale));
  FASTINFER_CHECK(op, x_scale->scalar_type() == ScalarType::Float, "x_scale must be float32");
  FASTINFER_CHECK(op, x_scale->is_contiguous(), "x_scale must be contiguous");
  FASTINFER_CHECK(op, out_dtype.has_value() && is_float(*out_dtype),
                  "out_dtype must be float32, bfloat16 or float16 beside int8 x");
  return *out_dtype;
}

// x [..., K] and w [N, K] of one float dtype.
inline MatmulShape check_linear(const char* op, const Tensor& x, const Tensor& w) {
  check_x(op, x);
  check_same_device(op, "w", w, x);
  FASTINFER_CHECK(op, w.dim() == 2, "w must be [N, K], got ", shape_text(w));
  FASTINFER_CHECK(op, w.scalar_type() == x.scalar_type(), "w must have the dtype of x");
  FASTINFER_CHECK(op, w.is_contiguous(), "w must be contiguous");
  FASTINFER_CHECK(op, x.size(x.dim() - 1) == w.size(1), "x must be [..., ", w.size(1), "] to match w ", shape_text(w),
                  ", got ", shape_text(x));
  return {rows_of(x), w.size(0), w.size(1)};
}

// The weight [K] of a norm of x [..., K], of the dtype of x or fp32, or none.
inline void check_norm_weight(const char* op, const char* name, const std::optional<Tensor>& weight, const Tensor& x) {
  if (!weight.has_value()) return;
  const int64_t k = x.size(x.dim() - 1);
  check_same_device(op, name, *weight, x);
  FASTINFER_CHECK(op, weight->dim() == 1 && weight->size(0) == k, name, " must be [", k, "], got ",
                  shape_text(*weight));
  FASTINFER_CHECK(op, weight->scalar_type() == x.scalar_type() || weight->scalar_type() == ScalarType::Float, name,
                  " must have the dtype of x or float32");
  FASTINFER_CHECK(op, weight->is_contiguous(), name, " must be contiguous");
}

inline void check_int8_quantize(const char* op, const Tensor& x, const std::optional<Tensor>& norm_weight) {
  check_x(op, x);
  check_norm_weight(op, "norm_weight", norm_weight, x);
}

// x [..., K], weight [K] or none, residual as x or none.
inline void check_rms_norm(const char* op, const Tensor& x, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& residual) {
  check_x(op, x);
  check_norm_weight(op, "weight", weight, x);
  if (!residual.has_value()) return;
  check_same_device(op, "residual", *residual, x);
  bool fits = residual->dim() == x.dim();
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = residual->size(i) == x.size(i);
  FASTINFER_CHECK(op, fits, "residual must be ", shape_text(x), " as x, got ", shape_text(*residual));
  FASTINFER_CHECK(op, residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x");
}

// x [..., K], w [N, K/2] int8, w_scale and w_zero [N, K/G] fp16, bf16 or fp32; G is 32, 64 or 128.
inline MatmulShape check_int4_matmul(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                                     const Tensor& w_zero) {
  check_x(op, x);
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
  return {rows_of(x), n, k};
}

}  // namespace fastinfer
