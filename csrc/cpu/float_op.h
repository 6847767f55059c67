// Arithmetic of the matmuls whose activations stay floats: x in fp32, weights expanded to fp32, fp32 sums.
// Sums run over k in order within kSumColumns columns, which keeps rounding errors small, and then over those partial
// sums in order. tile() and int8's stream() do the same, so that a row of int8_matmul is the same bits for every M.
// Included once per instruction set by each_isa.h, after panel_matmul.h.

struct FloatOp {
  using X = float;
  using Acc = float;
  using Expanded = float;
  static constexpr int64_t kBlock = 256, kSumColumns = 64;
  static constexpr bool kExpands = true, kScalesX = false;
  static constexpr int64_t kExpandedPanel = kPanel;  // elements from a panel's expanded column to the next panel's

  template <Dtype T>
  static void pack_row(const Job& job, int64_t row, float* target, int64_t stride) {
    const char* x = job.x + row * job.k * bytes_in(T);
    Float values[kLineVecs];
    int64_t left = job.k;
    for (; left >= kChunk; left -= kChunk, x += kChunk * bytes_in(T), target += stride) {
      load_chunk<T>(x, values);
      for (int v = 0; v < kLineVecs; ++v) store(target + v * kLanes, values[v]);
    }
    if (left == 0) return;
    load_some<T>(x, left, values);
    for (int v = 0; v < kLineVecs; ++v) store(target + v * kLanes, values[v]);
  }

  // acc[r][v] += x[r] · w[v] for one column k; x points at row 0, rows lie kChunk apart.
  template <int ROWS, int VECS>
  static FI_INLINE void multiply_add(const float* x, const Float* w, Float (&acc)[ROWS][VECS]) {
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Float xr = broadcast(x[r * kChunk]);
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) acc[r][v] = fma(xr, w[v], acc[r][v]);
      settle(acc[r]);
    }
  }

  template <int ROWS, int VECS>
  static FI_INLINE void clear(Float (&acc)[ROWS][VECS]) {
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) acc[r][v] = zero_float();
    }
  }

  // sums (+)= acc · scale, scale a power of two.
  template <int ROWS, int VECS>
  static FI_INLINE void add_up(const Float (&acc)[ROWS][VECS], float scale, bool first, float* sums) {
    const Float s = broadcast(scale);
    FI_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      FI_UNROLL
      for (int v = 0; v < VECS; ++v) {
        float* sum = sums + (r * VECS + v) * kLanes;
        store(sum, first ? mul(acc[r][v], s) : fma(acc[r][v], s, load(sum)));
      }
    }
  }

  // The register tile over expanded weights w [len][channels].
  template <int ROWS, int PANELS>
  static FI_NOINLINE void tile(const float* x, const float* w, int64_t len, bool first, float* sums) {
    constexpr int kVecs = PANELS * kLineVecs;
    int64_t k = 0;
    do {
      Float acc[ROWS][kVecs];
      clear(acc);
      const int64_t end = len - k < kSumColumns ? len : k + kSumColumns;
      for (; k < end; k += kChunk, x += ROWS * kChunk) {
        const int64_t count = end - k < kChunk ? end - k : kChunk;
        for (int64_t j = 0; j < count; ++j, w += kVecs * kLanes) {
          Float column[kVecs];
          FI_UNROLL
          for (int v = 0; v < kVecs; ++v) column[v] = load(w + v * kLanes);
          multiply_add<ROWS, kVecs>(x + j, column, acc);
        }
      }
      add_up<ROWS, kVecs>(acc, 1.0f, first, sums);
      first = false;
    } while (k < len);
  }
};
