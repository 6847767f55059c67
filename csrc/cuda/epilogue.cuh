// What a matmul does with its sums before they are stored: scales, bias, gate, residual, the cast.
// y = gate(v) + residual with v = sum · x_scale · w_scale + bias; gates take rows of w as in LAYOUTS.md#gate-up, or
// those of the gate before those of what it is multiplied with (halves).
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/hopper.cuh"
#include "common/matmul_checks.h"

namespace fastinfer {

__device__ __forceinline__ float gate_value(Gate gate, float v) {
  if (gate == Gate::kSilu) return v / (1.f + __expf(-v));
  if (gate == Gate::kGelu) return 0.5f * v * (1.f + erff(v * 0.70710678f));
  return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
}

struct Epilogue {
  const float* x_scale = nullptr;  // [M], int8 activations
  const float* w_scale = nullptr;  // [N], int8 weights
  const void* bias = nullptr;      // [N] of bias_type
  const void* residual = nullptr;  // as y
  void* y = nullptr;               // [M, N], or [M, N/2] where gated, of y_type
  Element bias_type{}, y_type{};
  Gate gate = Gate::kNone;
  bool halves = false;
  int n = 0;         // rows of w that are written, N
  int y_stride = 0;  // elements from row to row of y and residual: columns of y

  // What the epilogue reads of 16 rows from `row` on, brought near while the kernel multiplies: it is cold and needed last.
  __device__ __forceinline__ void prefetch(int row) const {
    if (w_scale != nullptr) prefetch_global(w_scale + row);
    if (bias != nullptr) prefetch_global(static_cast<const char*>(bias) + row * (bias_type == Element::kFloat ? 4 : 2));
  }
  // The last steps of the int8 result are rounded alike in every kernel: a row must not depend on which one ran.
  template <typename Accumulator>
  __device__ __forceinline__ float value(int token, int row, Accumulator sum) const {
    float v = static_cast<float>(sum);
    if (x_scale != nullptr) v = __fmul_rn(v, x_scale[token]);
    if (w_scale != nullptr) v = __fmul_rn(v, w_scale[row]);
    if (bias != nullptr) v = __fadd_rn(v, load_float(bias, bias_type, row));
    return v;
  }
  // `v` plus the residual to column `column` of y.
  __device__ __forceinline__ void store_value(int token, int column, float v) const {
    const int64_t at = int64_t(token) * y_stride + column;
    if (residual != nullptr) v += load_float(residual, y_type, at);
    store_float(y, y_type, at, v);
  }
  // The one way from sums to y: what a lane holds of a tile of 16 rows, sums of rows `row` and row + 8 for a token. They
  // are two values of y, or where gated (N is a multiple of 16 then) one. Rows from N on are dropped. Halves are numbered
  // as if they were interleaved.
  template <typename Accumulator>
  __device__ __forceinline__ void store_pair(int token, int row, Accumulator sum, Accumulator sum_of_row_8) const {
    if (row >= n) return;
    if (gate != Gate::kNone) {
      const int column = row / 16 * 8 + row % 8;
      const float v = value(token, halves ? column : row, sum);
      const float factor = value(token, halves ? n / 2 + column : row + 8, sum_of_row_8);
      store_value(token, column, gate_value(gate, v) * factor);
      return;
    }
    store_value(token, row, value(token, row, sum));
    if (row + 8 < n) store_value(token, row + 8, value(token, row + 8, sum_of_row_8));
  }
};

// What a lane's rows `row` and row + 8 contribute to every token, read once.
struct RowTerms {
  int row;
  float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f};
  __device__ __forceinline__ RowTerms(const Epilogue& epilogue, int first) : row(first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = min(row + 8 * i, epilogue.n - 1);
      if (epilogue.w_scale != nullptr) scale[i] = epilogue.w_scale[at];
      if (epilogue.bias != nullptr) bias[i] = load_float(epilogue.bias, epilogue.bias_type, at);
    }
  }
  // As Epilogue::value, rounding for rounding.
  template <typename Accumulator>
  __device__ __forceinline__ float value(const Epilogue& epilogue, int token, int i, Accumulator sum) const {
    float v = static_cast<float>(sum);
    if constexpr (std::is_same_v<Accumulator, int32_t>) v = __fmul_rn(v, epilogue.x_scale[token]);
    return __fadd_rn(__fmul_rn(v, scale[i]), bias[i]);
  }
};

// The epilogue of an op whose kernel writes y [M, N_out] itself.
inline Epilogue make_epilogue(const Tensor& y, const MatmulShape& shape, const EpilogueArguments& arguments,
                              Gate gate) {
  Epilogue e;
  e.y = y.mutable_data_ptr();
  e.y_type = element_of(y.scalar_type());
  e.bias = data_or_null(arguments.bias);
  e.bias_type = arguments.bias.has_value() ? element_of(arguments.bias->scalar_type()) : Element::kFloat;
  e.residual = data_or_null(arguments.residual);
  e.gate = gate;
  e.halves = arguments.halves;
  e.n = static_cast<int>(shape.n);
  e.y_stride = static_cast<int>(out_features(gate, shape.n));
  return e;
}

}  // namespace fastinfer
