// embed's and advance's argument checks, and where a packed weight holds an element: the same on every device.
#pragma once

#include "common/matmul_checks.h"

namespace fastinfer {

// ---- embed --------------------------------------------------------------------------------------------------------------

enum class WeightLayout : int { kRow, kPanel16, kTileW8A16, kTileW8A8 };

// Where int8 w [n, k] holds an element, LAYOUTS.md; the rows that fill no panel or tile are in row order.
FASTINFER_BOTH inline int64_t packed_index(WeightLayout layout, int64_t row, int64_t column, int64_t n, int64_t k) {
  constexpr int kRows = 16;  // of a panel, of a tile
  if (layout == WeightLayout::kRow || row >= n / kRows * kRows) return row * k + column;
  const int64_t first = row / kRows * kRows * k;
  const int g = static_cast<int>(row % 8), h = static_cast<int>(row % kRows / 8), c = static_cast<int>(column % 128);
  if (layout == WeightLayout::kPanel16) return first + column / 4 * (4 * kRows) + row % kRows * 4 + c % 4;
  if (layout == WeightLayout::kTileW8A8) {
    return first + column / 128 * (128 * kRows) + h * 1024 + c / 16 * 128 + g * 16 + c % 16;
  }
  return first + column / 32 * (32 * kRows) + g * 64 + c % 8 / 2 * 16 + c % 32 / 16 * 8 + c % 16 / 8 * 4 + c % 2 * 2 +
         h;
}

struct EmbedShape {
  int64_t b, t, v, k;
  WeightLayout layout;
  ScalarType x_type;
};

inline WeightLayout weight_layout(const char* op, const std::string& name, const Tensor& w) {
  const int64_t v = w.size(0), k = w.size(1);
  const bool int8 = w.scalar_type() == ScalarType::Char, tiles = v >= 16 && k % 128 == 0;
  if (name == "row") return WeightLayout::kRow;
  if (name == "panel16" && int8 && k % 4 == 0) return WeightLayout::kPanel16;
  if (name == "tile_w8a16" && int8 && tiles) return WeightLayout::kTileW8A16;
  FASTINFER_CHECK(op, name == "tile_w8a8" && int8 && tiles, "layout must be one that w ", shape_text(w),
                  " can have, got '", name, "'");
  return WeightLayout::kTileW8A8;
}

// ids [B, T], w [V, K] float, or int8 with w_scale [V] and a dtype for x.
inline EmbedShape check_embed(const char* op, const Tensor& ids, const Tensor& w, const std::optional<Tensor>& w_scale,
                              const std::string& layout, const std::optional<ScalarType>& out_dtype) {
  FASTINFER_CHECK(op, ids.scalar_type() == ScalarType::Long, "ids must be int64");
  FASTINFER_CHECK(op, ids.dim() == 2, "ids must be [B, T], got ", shape_text(ids));
  const bool int8 = w.scalar_type() == ScalarType::Char;
  FASTINFER_CHECK(op, int8 || is_float(w.scalar_type()), "w must be float32, bfloat16, float16 or int8");
  FASTINFER_CHECK(op, w.dim() == 2 && w.size(0) > 0, "w must be [V, K] with V ≥ 1, got ", shape_text(w));
  FASTINFER_CHECK(op, w.is_contiguous(), "w must be contiguous");
  FASTINFER_CHECK(op, ids.is_contiguous(), "ids must be contiguous");
  check_same_device(op, "ids", ids, w, "w");
  FASTINFER_CHECK(op, w_scale.has_value() == int8, "w_scale must be given beside int8 w alone");
  if (int8) check_int8_scale(op, *w_scale, w);
  FASTINFER_CHECK(op, out_dtype.has_value() == int8 && (!int8 || is_float(*out_dtype)),
                  "out_dtype must be float32, bfloat16 or float16 beside int8 w, None beside float w");
  return {ids.size(0),
          ids.size(1),
          w.size(0),
          w.size(1),
          weight_layout(op, layout, w),
          int8 ? *out_dtype : w.scalar_type()};
}

// cos and sin [P, R] or [N, P, R], lengths and starts [B].
inline void check_rotary_tables(const char* op, const Tensor& ids, const Tensor& cos, const Tensor& sin,
                                const Tensor& lengths, const std::optional<Tensor>& starts) {
  const auto check = [&](const char* name, const Tensor& t, ScalarType type, const char* type_name) {
    FASTINFER_CHECK(op, t.scalar_type() == type, name, " must be ", type_name);
    FASTINFER_CHECK(op, t.is_contiguous(), name, " must be contiguous");
    check_same_device(op, name, t, ids, "ids");
  };
  const auto check_table = [&](const char* name, const Tensor& t) {
    check(name, t, ScalarType::Float, "float32");
    bool fits = (t.dim() == 2 || t.dim() == 3) && t.dim() == cos.dim() && t.size(t.dim() - 2) > 0;
    for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == cos.size(i);
    FASTINFER_CHECK(op, fits, name, " must be [P, R] or [N, P, R], cos and sin alike, got ", shape_text(t));
  };
  const auto check_rows = [&](const char* name, const Tensor& t) {
    check(name, t, ScalarType::Int, "int32");
    FASTINFER_CHECK(op, t.dim() == 1 && t.size(0) == ids.size(0), name, " must be [", ids.size(0), "], got ",
                    shape_text(t));
  };
  check_table("cos", cos);
  check_table("sin", sin);
  check_rows("lengths", lengths);
  if (starts.has_value()) check_rows("starts", *starts);
}

// The rows of tables [tables, positions, r] that tokens take, [tables, B, T, r].
struct RotaryRows {
  const float *cos = nullptr, *sin = nullptr;
  const int32_t *lengths = nullptr, *starts = nullptr;
  float *cos_rows = nullptr, *sin_rows = nullptr;
  int64_t tables = 0, positions = 0, r = 0;

  FASTINFER_BOTH int64_t position(int64_t b, int64_t t) const {
    const int64_t p = int64_t{lengths[b]} - (starts != nullptr ? starts[b] : 0) + t;
    return p < 0 ? 0 : p < positions ? p : positions - 1;
  }
};

inline std::vector<int64_t> rotary_sizes(const Tensor& ids, const Tensor& cos) {
  std::vector<int64_t> sizes{ids.size(0), ids.size(1), cos.size(cos.dim() - 1)};
  if (cos.dim() == 3) sizes.insert(sizes.begin(), cos.size(0));
  return sizes;
}

inline RotaryRows rotary_rows(const Tensor& cos, const Tensor& sin, const Tensor& lengths,
                              const std::optional<Tensor>& starts, const Tensor& cos_rows, const Tensor& sin_rows) {
  RotaryRows rows;
  rows.cos = static_cast<const float*>(cos.const_data_ptr());
  rows.sin = static_cast<const float*>(sin.const_data_ptr());
  rows.lengths = static_cast<const int32_t*>(lengths.const_data_ptr());
  if (starts.has_value()) rows.starts = static_cast<const int32_t*>(starts->const_data_ptr());
  rows.cos_rows = static_cast<float*>(cos_rows.mutable_data_ptr());
  rows.sin_rows = static_cast<float*>(sin_rows.mutable_data_ptr());
  rows.tables = cos.dim() == 3 ? cos.size(0) : 1;
  rows.positions = cos.size(cos.dim() - 2), rows.r = cos.size(cos.dim() - 1);
  return rows;
}

// ---- advance ------------------------------------------------------------------------------------------------------------

struct AdvanceArgs {
  const int64_t* tokens;           // [b]
  int64_t* ids;                    // [b]
  int32_t* lengths;                // [b]
  int64_t *offset, *ring, *steps;  // ring [slots, b]
  int64_t b, slots;

  FASTINFER_BOTH int64_t* slot() const { return ring + *steps % slots * b; }
};

inline AdvanceArgs check_advance(const char* op, const Tensor& tokens, const Tensor& ids, const Tensor& lengths,
                                 const Tensor& offset, const Tensor& ring, const Tensor& steps) {
  FASTINFER_CHECK(op, tokens.dim() == 1, "tokens must be [B], got ", shape_text(tokens));
  const int64_t b = tokens.size(0);
  const auto check = [&](const char* name, const Tensor& t, bool fits, const char* shape) {
    const bool is_lengths = &t == &lengths;
    FASTINFER_CHECK(op, t.scalar_type() == (is_lengths ? ScalarType::Int : ScalarType::Long), name, " must be ",
                    is_lengths ? "int32" : "int64");
    FASTINFER_CHECK(op, fits, name, " must be ", shape, " with B = ", b, ", got ", shape_text(t));
    FASTINFER_CHECK(op, t.is_contiguous(), name, " must be contiguous");
    check_same_device(op, name, t, tokens, "tokens");
  };
  check("tokens", tokens, true, "[B]");
  check("ids", ids, ids.dim() == 2 && ids.size(0) == b && ids.size(1) == 1, "[B, 1]");
  check("lengths", lengths, lengths.dim() == 1 && lengths.size(0) == b, "[B]");
  check("offset", offset, offset.numel() == 1, "one element");
  check("ring", ring, ring.dim() == 2 && ring.size(0) > 0 && ring.size(1) == b, "[S, B] with S ≥ 1");
  check("steps", steps, steps.numel() == 1, "one element");
  const auto data = [](const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  return {data(tokens),
          data(ids),
          static_cast<int32_t*>(lengths.mutable_data_ptr()),
          data(offset),
          data(ring),
          data(steps),
          b,
          ring.size(0)};
}

}  // namespace fastinfer
