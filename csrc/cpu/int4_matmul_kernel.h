// int4 weights in groups times float activations. Included once per instruction set by each_isa.h.
// A weight is (q − zero) · scale = (q − 8) · scale + offset with offset = (8 − zero) · scale. Few rows or many, each weight is
// made before it is multiplied: scale · Σ x · (q − 8) + offset · Σ x would spare a multiply-add, but cancels where a group's
// weights have one sign, and overflows where x is large.

#include "cpu/epilogue.h"

#include "cpu/panel_matmul.h"

#include "cpu/float_op.h"

struct Int4Op : FloatOp {
  static constexpr int64_t kGroupColumns = 32;  // the finest group
  using Side = float;  // for every 32 columns: 16 scales (times Nibbles::kScale), then 16 offsets
  static constexpr int64_t kUnit = 8, kSideGroup = 2 * kPanel, kSide = kBlock / kGroupColumns * kSideGroup;
  static constexpr int kStreamAccumulators = kLanes == 8 ? 4 : kMaxAccumulators;

  template <Dtype T>
  static FI_INLINE void load_group(const Job& job, int64_t panel, int64_t group, Float* scale, Float* zero) {
    constexpr int64_t kBytes = bytes_in(T);
    const int64_t groups = job.k >> job.group_shift;
    if (job.w.in_panel(panel)) {
      const int64_t at = (panel * groups + group) * kPanel * kBytes;
      load_chunk<T>(job.group_scale + at, scale);
      load_chunk<T>(job.group_zero + at, zero);
      return;
    }
    alignas(64) char rows[2][kPanel * 4] = {};
    for (int64_t row = 0; row < kPanel && panel * kPanel + row < job.n; ++row) {
      const int64_t at = ((panel * kPanel + row) * groups + group) * kBytes;
      std::memcpy(rows[0] + row * kBytes, job.group_scale + at, kBytes);
      std::memcpy(rows[1] + row * kBytes, job.group_zero + at, kBytes);
    }
    load_chunk<T>(rows[0], scale);
    load_chunk<T>(rows[1], zero);
  }

  template <Dtype T>
  static void prepare_as(const Job& job, int64_t panel, int64_t k0, int64_t len, float* side) {
    Float scale[kLineVecs], zero[kLineVecs];
    for (int64_t k = k0; k < k0 + len; k += kGroupColumns, side += kSideGroup) {
      if (k == k0 || (k >> job.group_shift << job.group_shift) == k) {
        load_group<T>(job, panel, k >> job.group_shift, scale, zero);
      }
      for (int v = 0; v < kLineVecs; ++v) {
        store(side + v * kLanes, mul(scale[v], broadcast(Nibbles::kScale)));
        store(side + kPanel + v * kLanes, mul(scale[v], sub(broadcast(8.0f), zero[v])));
      }
    }
  }

  static void prepare(const Job& job, int64_t panel, int64_t k0, int64_t len, const uint8_t*, float* side) {
    switch (job.group_dtype) {
      case Dtype::kFloat:
        return prepare_as<Dtype::kFloat>(job, panel, k0, len, side);
      case Dtype::kBFloat16:
        return prepare_as<Dtype::kBFloat16>(job, panel, k0, len, side);
      case Dtype::kHalf:
        return prepare_as<Dtype::kHalf>(job, panel, k0, len, side);
    }
  }

  template <int I = 0>
  static FI_INLINE void expand_unit(const Nibbles& q, Float scale, Float offset, float* out, int64_t stride) {
    store(out + I * stride, fma(q.get<I>(), scale, offset));
    if constexpr (I + 1 < kUnit) expand_unit<I + 1>(q, scale, offset, out, stride);
  }

  // Lines of a panel to fp32 [len][channels], of which this panel's 16 start at `out`.
  static void expand(const uint8_t* line, const float* side, int64_t len, float* out, int64_t panels) {
    const int64_t stride = panels * kPanel;
    for (int64_t k = 0; k < len; k += kUnit, line += 4 * kPanel, out += kUnit * stride) {
      const float* group = side + k / kGroupColumns * kSideGroup;
      FI_UNROLL
      for (int v = 0; v < kLineVecs; ++v) {
        const Float scale = load(group + v * kLanes), offset = load(group + kPanel + v * kLanes);
        expand_unit(Nibbles(load_int(line + v * 4 * kLanes)), scale, offset, out + v * kLanes, stride);
      }
    }
  }

  // Vectors V … V + kTogether − 1 of the channels advance together: as many as registers hold the nibbles of.
  static constexpr int kTogether = kLanes == 8 ? 2 : 4;

  template <int I, int V, int COUNT, int ROWS, int VECS>
  static FI_INLINE void columns(const float* x, const Nibbles* q, const Float* scale, const Float* offset,
                                Float (&acc)[ROWS][VECS]) {  // I … 7 of a unit
    FI_UNROLL
    for (int v = 0; v < COUNT; ++v) {
      const Float w = fma(q[v].get<I>(), scale[v], offset[v]);
      FI_UNROLL
      for (int r = 0; r < ROWS; ++r) acc[r][V + v] = fma(broadcast(x[r * kChunk + I]), w, acc[r][V + v]);
    }
    if constexpr (I + 1 < kUnit) columns<I + 1, V, COUNT, ROWS, VECS>(x, q, scale, offset, acc);
  }

  template <int V, int ROWS, int VECS, class L>
  static FI_INLINE void unit(const float* x, const float* side, const L& lines, Float (&acc)[ROWS][VECS]) {
    constexpr int kCount = VECS - V < kTogether ? VECS - V : kTogether;
    Nibbles q[kCount];
    Float scale[kCount], offset[kCount];
    FI_UNROLL
    for (int v = 0; v < kCount; ++v) {
      const float* group = side + (V + v) / kLineVecs * kSide + (V + v) % kLineVecs * kLanes;
      q[v] = Nibbles(lines.load(V + v)), scale[v] = load(group), offset[v] = load(group + kPanel);
    }
    columns<0, V, kCount, ROWS, VECS>(x, q, scale, offset, acc);
    settle(acc[0]);
    if constexpr (V + kCount < VECS) unit<V + kCount, ROWS, VECS>(x, side, lines, acc);
  }

  template <int ROWS, int PANELS, class Call>
  static FI_NOINLINE void stream(const Call& c) {
    constexpr int kVecs = PANELS * kLineVecs;
    Lines<PANELS> lines(c.lines, c.next);
    const float* x = c.x;
    const int64_t groups = c.len / kGroupColumns;
    for (int64_t group = 0; group < groups;) {  // sums as tile() makes them: a row is the same bits for every M
      const bool first = c.first && group == 0;
      Float acc[ROWS][kVecs];
      clear(acc);
      for (int64_t i = 0; i < kSumColumns / kGroupColumns && group < groups; ++i, ++group, x += kGroupColumns * ROWS) {
        for (int64_t u = 0; u < kGroupColumns / kUnit; ++u, lines.advance()) {
          unit<0, ROWS, kVecs>(x + u / 2 * ROWS * kChunk + u % 2 * kUnit, c.side + group * kSideGroup, lines, acc);
        }
      }
      add_up<ROWS, kVecs>(acc, 1.0f, first, c.sums);
    }
  }
};

constexpr Kernels kInt4Matmul = PanelMatmul<Int4Op>::kernels();
