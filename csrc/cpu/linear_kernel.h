// The epilogue of a linear that torch has computed. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

// Rows [row0, row1) of v [M, N], of the dtype of y, to y.
template <Dtype T>
void apply_epilogue_as(const Output& out, const char* v, int64_t row0, int64_t row1) {
  Float values[kLineVecs];
  alignas(64) float bias[kPanel] = {};
  for (int64_t column = 0; column < out.n; column += kPanel) {
    if (out.bias != nullptr) load_some(out.bias_dtype, out.bias, column, out.n - column, bias);
    for (int64_t row = row0; row < row1; ++row) {
      load_some<T>(v + (row * out.n + column) * bytes_in(T), out.n - column, values);
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
