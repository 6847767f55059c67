// embed: x[B,T,K] = w[ids] · w_scale[ids] · factor, and rows of cos and sin at position lengths − starts + t
// Source    –
// Layout    plain rows; int8 w also LAYOUTS.md#panel16 and the tiles
// Requires  –
// Mapping   threads over tokens
// Bound     memory
// Numerics  those of the reference, bit for bit: fastinfer/ops/embed.py
// Verified  tests/test_embed.py

#include "common/embed.h"
#include "cpu/matmul.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <cstring>

namespace fastinfer {

// T is the type of x, and of w where W is not int8_t.
template <typename T, typename W>
static void embed_row(const EmbedShape& s, const W* w, const float* w_scale, float factor, int64_t id, T* x) {
  const float rounded = static_cast<float>(static_cast<T>(factor));
  for (int64_t i = 0; i < s.k; ++i) {
    T v;
    if constexpr (std::is_same_v<W, int8_t>) {
      v = static_cast<T>(static_cast<float>(w[packed_index(s.layout, id, i, s.v, s.k)]) * w_scale[id]);
    } else {
      v = w[id * s.k + i];
    }
    x[i] = rounded == 1.0f ? v : static_cast<T>(static_cast<float>(v) * rounded);
  }
}

template <typename T>
static void embed_rows(const EmbedShape& s, const Tensor& ids, const Tensor& w, const std::optional<Tensor>& w_scale,
                       float factor, const Tensor& x) {
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  auto* out = static_cast<T*>(x.mutable_data_ptr());
  parallel(s.b * s.t, 2 * s.k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (w_scale.has_value()) {
        const auto* scale = static_cast<const float*>(w_scale->const_data_ptr());
        embed_row(s, static_cast<const int8_t*>(w.const_data_ptr()), scale, factor, id[i], out + i * s.k);
      } else {
        embed_row(s, static_cast<const T*>(w.const_data_ptr()), nullptr, factor, id[i], out + i * s.k);
      }
    }
  });
}

Tensor embed_cpu(const Tensor& ids, const Tensor& w, const std::optional<Tensor>& w_scale, double factor,
                 const std::string& layout, std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "embed";
  const EmbedShape s = check_embed(kOp, ids, w, w_scale, layout, out_dtype);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < s.b * s.t; ++i) {
    FASTINFER_CHECK(kOp, id[i] >= 0 && id[i] < s.v, "ids must be from 0 to ", s.v - 1, ", got ", id[i]);
  }
  const Tensor x = torch::stable::new_empty(w, {s.b, s.t, s.k}, s.x_type);
  const auto f = static_cast<float>(factor);
  if (s.x_type == ScalarType::Float) embed_rows<float>(s, ids, w, w_scale, f, x);
  if (s.x_type == ScalarType::BFloat16) embed_rows<torch::headeronly::BFloat16>(s, ids, w, w_scale, f, x);
  if (s.x_type == ScalarType::Half) embed_rows<torch::headeronly::Half>(s, ids, w, w_scale, f, x);
  return x;
}

std::tuple<Tensor, Tensor, Tensor> embed_rotary_cpu(const Tensor& ids, const Tensor& w,
                                                    const std::optional<Tensor>& w_scale, double factor,
                                                    const std::string& layout, std::optional<ScalarType> out_dtype,
                                                    const Tensor& cos, const Tensor& sin, const Tensor& lengths,
                                                    const std::optional<Tensor>& starts) {
  check_rotary_tables("embed", ids, cos, sin, lengths, starts);
  const Tensor x = embed_cpu(ids, w, w_scale, factor, layout, out_dtype);
  const std::vector<int64_t> sizes = rotary_sizes(ids, cos);
  const Tensor cos_rows = torch::stable::new_empty(cos, sizes), sin_rows = torch::stable::new_empty(cos, sizes);
  const RotaryRows rows = rotary_rows(cos, sin, lengths, starts, cos_rows, sin_rows);
  const int64_t b = ids.size(0), t = ids.size(1);
  for (int64_t i = 0; i < rows.tables * b * t; ++i) {
    const int64_t from = i / (b * t) * rows.positions + rows.position(i / t % b, i % t);
    std::memcpy(rows.cos_rows + i * rows.r, rows.cos + from * rows.r, rows.r * sizeof(float));
    std::memcpy(rows.sin_rows + i * rows.r, rows.sin + from * rows.r, rows.r * sizeof(float));
  }
  return {x, cos_rows, sin_rows};
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) {
  m.impl("embed", TORCH_BOX(&fastinfer::embed_cpu));
  m.impl("embed.rotary", TORCH_BOX(&fastinfer::embed_rotary_cpu));
}
