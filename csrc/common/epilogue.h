// What every matmul can do with its result before it is stored: y = activation(v + bias) + residual.
// A gated activation takes rows of w that are interleaved as in LAYOUTS.md#gate-up, and halves the columns.
#pragma once

#include "common/tensor.h"

namespace fastinfer {

enum class Gate : int { kNone, kSilu, kGelu, kGeluTanh };

constexpr int64_t kGateRows = 8;  // rows of a gate that stand together

inline int64_t out_features(Gate gate, int64_t n) { return gate == Gate::kNone ? n : n / 2; }

// The gate that an op's `activation` names, for N rows of w.
inline Gate check_activation(const char* op, const std::string& activation, int64_t n) {
  if (activation == "none") return Gate::kNone;
  FASTINFER_CHECK(op, activation == "silu_mul" || activation == "gelu_mul" || activation == "gelu_tanh_mul",
                  "activation must be 'none', 'silu_mul', 'gelu_mul' or 'gelu_tanh_mul', got '", activation, "'");
  FASTINFER_CHECK(op, n % (2 * kGateRows) == 0, "activation '", activation, "' needs w with rows in multiples of ",
                  2 * kGateRows, ", got ", n);
  return activation == "silu_mul" ? Gate::kSilu : activation == "gelu_mul" ? Gate::kGelu : Gate::kGeluTanh;
}

}  // namespace fastinfer
