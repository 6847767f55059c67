// The epilogue of a linear that torch has computed. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

// The bias of 16 columns: those from `column` on, or where gated eight of the gate and those they are multiplied with.
inline void load_bias(const Output& out, int64_t column, float* bias) {
  if (out.gate == Gate::kNone) return load_some(out.bias_dtype, out.bias, column, out.n - column, bias);
  load_some(out.bias_dtype, out.bias, column / 2, kGateRows, bias);
  load_some(out.bias_dtype, out.bias, (out.n + column) / 2, kGateRows, bias + kGateRows);
}

// The same columns of a row of v.
template <Dtype T>
FI_INLINE void load_panel(const Output& out, const char* v, int64_t column, Float* values) {
  if (out.gate == Gate::kNone) return load_some<T>(v + column * bytes_in(T), out.n - column, values);
  alignas(64) char both[kChunk * 4];
  constexpr int64_t kHalf = kGateRows * bytes_in(T);
  std::memcpy(both, v + column / 2 * bytes_in(T), kHalf);
  std::memcpy(both + kHalf, v + (out.n + column) / 2 * bytes_in(T), kHalf);
  load_chunk<T>(both, values);
}

// Rows [row0, row1) of v [M, N], of the dtype of y, to y.
template <Dtype T>
void apply_epilogue_as(const Output& out, const char* v, int64_t row0, int64_t row1) {
  Float values[kLineVecs];
  alignas(64) float bias[kPanel + kGateRows] = {};  // with what load_bias stores beyond
  for (int64_t column = 0; column < out.n; column += kPanel) {
    if (out.bias != nullptr) load_bias(out, column, bias);
    for (int64_t row = row0; row < row1; ++row) {
      load_panel<T>(out, v + row * out.n * bytes_in(T), column, values);
      for (int i = 0; i < kLineVecs; ++i) values[i] = add(values[i], load(bias + i * kLanes));
      store_panel<T>(out, row, column, values);
    }
  }
}

inline void apply_epilogue(const Output& out, const char* v, int64_t row0, int64_t row1) {
  switch (out.dtype) {
    case Dtype::kFloat:
      return apply_epilogue_as<Dtype::kFloat>(out, v, row0, row1);
    case Dtype::kBFloat16:
      return apply_epilogue_as<Dtype::kBFloat16>(out, v, row0, row1);
    case Dtype::kHalf:
      return apply_epilogue_as<Dtype::kHalf>(out, v, row0, row1);
  }
}
