// What a matmul does with its sums before they are stored: scales, bias, residual, gated activation, the cast.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"

namespace fastinfer {

enum class Gate : int { kNone, kSilu, kGelu, kGeluTanh };

// The first half of the rows of w is the gate, the second what it multiplies: y[m, n] = gate(v[m, n]) · v[m, N/2 + n].
__device__ __forceinline__ float gate_value(Gate gate, float v) {
  if (gate == Gate::kSilu) return v / (1.f + __expf(-v));
  if (gate == Gate::kGelu) return 0.5f * v * (1.f + erff(v * 0.70710678f));
  return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
}

struct Epilogue {
  const float* x_scale = nullptr;  // [M], int8 activations
  const float* w_scale = nullptr;  // [N], int8 weights
  const void* bias = nullptr;      // [N] of bias_type
  const void* residual = nullptr;  // [M, N] of y_type
  void* y = nullptr;               // [M, N], or [M, N/2] where gated, of y_type
  Element bias_type{}, y_type{};
  Gate gate = Gate::kNone;
  int n = 0;         // rows of w that are written, N
  int y_stride = 0;  // elements from row to row of y and residual

  // The last steps of the int8 result are rounded alike in every kernel: a row must not depend on which one ran.
  template <typename Accumulator>
  __device__ __forceinline__ float value(int token, int row, Accumulator sum) const {
    float v = static_cast<float>(sum);
    if (x_scale != nullptr) v = __fmul_rn(v, x_scale[token]);
    if (w_scale != nullptr) v = __fmul_rn(v, w_scale[row]);
    if (bias != nullptr) v = __fadd_rn(v, load_float(bias, bias_type, row));
    return v;
  }
  template <typename Accumulator>
  __device__ __forceinline__ void store(int token, int row, Accumulator sum) const {
    if (row >= n) return;
    float v = value(token, row, sum);
    const int64_t at = int64_t(token) * y_stride + row;
    if (residual != nullptr) v += load_float(residual, y_type, at);
    store_float(y, y_type, at, v);
  }
  template <typename Accumulator>
  __device__ __forceinline__ void store_gated(int token, int row, Accumulator gate_sum, Accumulator up_sum) const {
    if (row >= n / 2) return;
    const float v = gate_value(gate, value(token, row, gate_sum)) * value(token, n / 2 + row, up_sum);
    store_float(y, y_type, int64_t(token) * y_stride + row, v);
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

}  // namespace fastinfer
