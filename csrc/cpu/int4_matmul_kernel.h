// int4 weights in groups times float activations. Included once per instruction set by each_isa.h.

#include "cpu/panel_matmul.h"

#include "cpu/float_op.h"

struct Int4Op : FloatOp {
  // Beside the lines, for every 32 columns: 16 scales, then 16 offsets −zero · scale; a weight is q · scale + offset.
  using Side = float;
  static constexpr int64_t kUnit = 8, kGroup = 32, kSideGroup = 2 * kPanel, kSide = kBlock / kGroup * kSideGroup;
  static constexpr int kStreamAccumulators = kLanes == 8 ? 4 : 8;

  template <Dtype T>
  static FI_INLINE void load_group(const Job& job, int64_t panel, int64_t group, Float* scale, Float* zero) {
    constexpr int64_t kBytes = T == Dtype::kFloat ? 4 : 2;
    const int64_t groups = job.k / job.group;
    if (job.w.in_panel(panel)) {
      const int64_t at = (panel * groups + group) * kPanel * kBytes;
      load_some<T>(job.group_scale + at, kPanel, scale);
      load_some<T>(job.group_zero + at, kPanel, zero);
      return;
    }
    alignas(64) char rows[2][kPanel * 4] = {};
    for (int64_t row = 0; row < kPanel && panel * kPanel + row < job.n; ++row) {
      const int64_t at = ((panel * kPanel + row) * groups + group) * kBytes;
      std::memcpy(rows[0] + row * kBytes, job.group_scale + at, kBytes);
      std::memcpy(rows[1] + row * kBytes, job.group_zero + at, kBytes);
    }
    load_some<T>(rows[0], kPanel, scale);
    load_some<T>(rows[1], kPanel, zero);
  }

  template <Dtype T>
  static void prepare_as(const Job& job, int64_t panel, int64_t k0, int64_t len, float* side) {
    Float scale[kLineVecs], zero[kLineVecs];
    for (int64_t k = k0; k < k0 + len; k += kGroup, side += kSideGroup) {
      if (k == k0 || k % job.group == 0) load_group<T>(job, panel, k / job.group, scale, zero);
      for (int v = 0; v < kLineVecs; ++v) {
        store(side + v * kLanes, scale[v]);
        store(side + kPanel + v * kLanes, mul(scale[v], mul(zero[v], broadcast(-1.0f))));
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
  static FI_INLINE void expand_unit(Int lanes, Float scale, Float offset, float* out, int64_t stride) {
    store(out + I * stride, fma(nibble_to_float<I>(lanes), scale, offset));
    if constexpr (I + 1 < kUnit) expand_unit<I + 1>(lanes, scale, offset, out, stride);
  }

  // Lines of a panel to fp32 [len][channels], of which this panel's 16 start at `out`.
  static void expand(const uint8_t* line, const float* side, int64_t len, float* out, int64_t panels) {
    const int64_t stride = panels * kPanel;
    for (int64_t k = 0; k < len; k += kUnit, line += 4 * kPanel, out += kUnit * stride) {
      const float* group = side + k / kGroup * kSideGroup;
      FI_UNROLL
      for (int v = 0; v < kLineVecs; ++v) {
        const Float scale = load(group + v * kLanes), offset = load(group + kPanel + v * kLanes);
        expand_unit(load_int(line + v * 4 * kLanes), scale, offset, out + v * kLanes, stride);
      }
    }
  }

  // Columns I … 7 of a unit: 4 bits to weights in registers, then the multiply-adds of every row.
  template <int I, int ROWS, int VECS>
  static FI_INLINE void columns(const float* x, const Int* lanes, const Float* scale, const Float* offset,
                                Float (&acc)[ROWS][VECS]) {
    FI_UNROLL
    for (int v = 0; v < VECS; ++v) {
      const Float w = fma(nibble_to_float<I>(lanes[v]), scale[v], offset[v]);
      FI_UNROLL
      for (int r = 0; r < ROWS; ++r) acc[r][v] = fma(broadcast(x[r * kChunk + I]), w, acc[r][v]);
    }
    if constexpr (I + 1 < kUnit) columns<I + 1, ROWS, VECS>(x, lanes, scale, offset, acc);
  }

  template <int ROWS, int PANELS>
  static void stream(const float* x, const uint8_t* const* lines, const float* side, int64_t len, bool first,
                     float* sums) {
    constexpr int kVecs = PANELS * kLineVecs;
    const uint8_t* line[PANELS];
    for (int p = 0; p < PANELS; ++p) line[p] = lines[p];
    int64_t position = 0;
    for (int64_t k = 0; k < len;) {  // K > 0: there is a group
      Float acc[ROWS][kVecs];
      clear(acc);
      const int64_t end = len - k < kSumColumns ? len : k + kSumColumns;
      for (; k < end; k += kGroup, side += kSideGroup, x += ROWS * kGroup) {
        Float scale[kVecs], offset[kVecs];
        FI_UNROLL
        for (int v = 0; v < kVecs; ++v) {
          const float* group = side + v / kLineVecs * kSide + v % kLineVecs * kLanes;
          scale[v] = load(group), offset[v] = load(group + kPanel);
        }
        for (int64_t u = 0; u < kGroup / kUnit; ++u, position += 4 * kPanel) {
          Int lanes[kVecs];
          FI_UNROLL
          for (int v = 0; v < kVecs; ++v) {
            lanes[v] = load_int(line[v / kLineVecs] + position + v % kLineVecs * 4 * kLanes);
          }
          columns<0, ROWS, kVecs>(x + u / 2 * ROWS * kChunk + u % 2 * kUnit, lanes, scale, offset, acc);
        }
      }
      add_up<ROWS, kVecs>(acc, 1.0f, first, sums);
      first = false;
    }
  }
};

constexpr Kernels kInt4Matmul = PanelMatmul<Int4Op>::kernels();
