// int8 weights times float activations. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

#include "cpu/panel_matmul.h"

#include "cpu/float_op.h"

struct Int8Op : FloatOp {
  using Side = char;
  static constexpr int64_t kUnit = 4, kSide = 1;
  static constexpr int kStreamAccumulators = kLanes == 8 ? 8 : kMaxAccumulators;
  static constexpr float kByteScale = 1.0f / (1 << 24);  // undoes byte_to_float's factor, exactly

  static void prepare(const Job&, int64_t, int64_t, int64_t, const uint8_t*, char*) {}

  // Lines of a panel to fp32 [len][channels], of which this panel's 16 start at `out`.
  static void expand(const uint8_t* line, const char*, int64_t len, float* out, int64_t panels) {
    const Float scale = broadcast(kByteScale);
    const int64_t stride = panels * kPanel;
    for (int64_t k = 0; k < len; k += kUnit, line += 4 * kPanel, out += kUnit * stride) {
      FI_UNROLL
      for (int v = 0; v < kLineVecs; ++v) {
        const Int bytes = load_int(line + v * 4 * kLanes);
        float* to = out + v * kLanes;
        store(to, mul(byte_to_float<0>(bytes), scale));
        store(to + stride, mul(byte_to_float<1>(bytes), scale));
        store(to + 2 * stride, mul(byte_to_float<2>(bytes), scale));
        store(to + 3 * stride, mul(byte_to_float<3>(bytes), scale));
      }
    }
  }

  // Column J of a unit: bytes to floats in registers, then the multiply-adds of every row.
  template <int J, int ROWS, int VECS>
  static FI_INLINE void column(const float* x, const Int* bytes, Float (&acc)[ROWS][VECS]) {
    FI_UNROLL
    for (int v = 0; v < VECS; ++v) {
      const Float w = byte_to_float<J>(bytes[v]);
      FI_UNROLL
      for (int r = 0; r < ROWS; ++r) acc[r][v] = fma(broadcast(x[r * kChunk + J]), w, acc[r][v]);
    }
  }

  template <int ROWS, int PANELS, class Call>
  static FI_NOINLINE void stream(const Call& c) {
    constexpr int kVecs = PANELS * kLineVecs;
    Lines<PANELS> lines(c.lines, c.next);
    const float* x = c.x;
    bool first = c.first;
    int64_t k = 0;
    do {
      Float acc[ROWS][kVecs];
      clear(acc);
      const int64_t end = c.len - k < kSumColumns ? c.len : k + kSumColumns;
      for (; k < end; k += kChunk, x += (ROWS - 1) * kChunk) {
        const int64_t units = end - k < kChunk ? ceil_div(end - k, kUnit) : kChunk / kUnit;
        for (int64_t u = 0; u < units; ++u, lines.advance(), x += kUnit) {
          Int bytes[kVecs];
          FI_UNROLL
          for (int v = 0; v < kVecs; ++v) bytes[v] = lines.load(v);
          column<0, ROWS, kVecs>(x, bytes, acc);
          column<1, ROWS, kVecs>(x, bytes, acc);
          column<2, ROWS, kVecs>(x, bytes, acc);
          column<3, ROWS, kVecs>(x, bytes, acc);
        }
      }
      add_up<ROWS, kVecs>(acc, kByteScale, first, c.sums);
      first = false;
    } while (k < c.len);
  }
};

constexpr Kernels kInt8Matmul = PanelMatmul<Int8Op>::kernels();
