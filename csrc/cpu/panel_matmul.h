// The one path of all quantised matmuls: y[M, N] = x[M, K] · w[N, K]ᵀ over panels of 16 rows of w.
// Source    Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008: x in blocks
//           that stay in L2, a panel of w in L1, a register tile of both; here the panel is expanded from 8 or 4 bits.
// Layout    LAYOUTS.md#panel16; row-order weights, the last N mod 16 rows and ragged K are packed on the stack first
// Mapping   lanes are output channels, so nothing is summed across lanes; per k one column of x is broadcast:
//
//             x [rows][16 k] ──broadcast──┐           M ≤ kMaxRows: stream(): bytes → registers → multiply-add
//             w [k][16 channels] ─────────┴→ tile     else: expand() a block of K once, tile() for each row block
//
// Memory    a block's lines prefetch those of the next block: the hardware is slow to follow several streams
// Included once per instruction set by each_isa.h, after epilogue.h. `Op` is the arithmetic (float_op.h, dot_avx2.h, dot_avx512.h):
//   X, Acc, Expanded, Side   element types: packed x, sums, expanded weights, whatever a panel needs beside its lines
//   kUnit, kBlock, kSide     columns in a unit of 4 bytes; columns a pass; Side elements for a panel and pass
//   kExpands, kExpandedPanel whether there is expand() and tile(); elements from a panel's first to the next panel's
//   kScalesX                 whether pack_row quantises x and fills in x_scale; there is copy_row for an int8 x then
//   kStreamAccumulators      the most accumulators of stream()
//   pack_row, prepare        a row of x to the packed form; what a panel needs in Side for a pass
//   expand, tile, stream     the work itself

// Accumulators that a tile of `rows` × `panels` takes fit into the registers.
constexpr bool tile_fits(int64_t rows, int64_t panels, int64_t most = kMaxAccumulators) {
  return panels == 1 || rows * panels * kLineVecs <= most;
}

constexpr int64_t kMaxPanels = 4;
constexpr int64_t kTileChannels = kMaxAccumulators / (kMaxRows * kLineVecs) * kPanel;  // of an expanded tile

// `count` units of a panel's 16 rows from `unit` on, in a panel's order: in place, or packed with 0 past the end.
inline const uint8_t* panel_lines(const PackedWeights& w, int64_t panel, int64_t unit, int64_t count, uint8_t* packed) {
  if (w.in_panel(panel)) return w.data + panel * kPanel * w.row_bytes + unit * 4 * kPanel;
  const int64_t rows = w.n - panel * kPanel < kPanel ? w.n - panel * kPanel : kPanel;
  const int64_t left = w.row_bytes - unit * 4, whole = left / 4 < count ? left / 4 : count;
  if (rows < kPanel) std::memset(packed, 0, count * 4 * kPanel);
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* source = w.data + (panel * kPanel + row) * w.row_bytes + unit * 4;
    uint8_t* target = packed + row * 4;
    for (int64_t u = 0; u < whole; ++u) std::memcpy(target + u * 4 * kPanel, source + u * 4, 4);
    if (whole < count) {
      uint32_t last = 0;
      std::memcpy(&last, source + whole * 4, left - whole * 4);
      std::memcpy(target + whole * 4 * kPanel, &last, 4);
    }
  }
  return packed;
}

FI_INLINE Float load_sums(const float* p) { return load(p); }
FI_INLINE Float load_sums(const int32_t* p) { return to_float(load_int(p)); }

// v = sum · (x_scale · w_scale) + bias for sums [rows][channels] at (row0, column), and on to y. PLAIN: without a gate or
// a residual; apart, for its loop needs all the registers.
template <Dtype T, bool PLAIN, class Acc>
void finish(const Job& job, int64_t row0, int64_t rows, int64_t column, int64_t channels, const Acc* sums,
            const float* x_scales, const float* scale, const float* bias) {
  for (int64_t row = 0; row < rows; ++row) {
    const Float x_scale = broadcast(x_scales == nullptr ? 1.0f : x_scales[row0 + row]);
    for (int64_t c = 0; c < channels && column + c < job.n; c += kPanel) {
      Float values[kLineVecs];
      FI_UNROLL
      for (int v = 0; v < kLineVecs; ++v) {
        const int64_t at = c + v * kLanes;
        values[v] = fma(load_sums(sums + row * channels + at), mul(x_scale, load(scale + at)), load(bias + at));
      }
      if constexpr (PLAIN) {
        char* y = job.out.y + ((row0 + row) * job.n + column + c) * bytes_in(T);
        store_some<T>(y, job.n - column - c, values);
      } else {
        store_panel<T>(job.out, row0 + row, column + c, values);
      }
    }
  }
}

// One block of K for one block of rows.
template <class Op>
struct BlockCall {
  const typename Op::X* x;                // [len / 16][rows][16]
  const uint8_t* const* lines;            // a pointer a panel
  const uint8_t* const* next;             // the lines of the block that comes next, to prefetch
  const typename Op::Side* side;          // [panels][kSide]
  const typename Op::Expanded* expanded;  // null to stream
  int64_t len;
  bool first;              // sums start from zero
  typename Op::Acc* sums;  // [rows][panels · 16]
};

// A position in the lines of PANELS panels that are read side by side.
template <int PANELS>
struct Lines {
  const uint8_t *line[PANELS], *next[PANELS];
  int64_t offset = 0;

  FI_INLINE Lines(const uint8_t* const* lines, const uint8_t* const* next_lines) {
    FI_UNROLL
    for (int p = 0; p < PANELS; ++p) line[p] = lines[p], next[p] = next_lines[p];
  }
  FI_INLINE Int load(int v) const {  // vector v of the lines at this position
    return load_int(line[v / kLineVecs] + offset + v % kLineVecs * 4 * kLanes);
  }
  FI_INLINE void advance() {
    FI_UNROLL
    for (int p = 0; p < PANELS; ++p) _mm_prefetch(reinterpret_cast<const char*>(next[p] + offset), _MM_HINT_T0);
    offset += 4 * kPanel;
  }
};

template <class Op>
struct PanelMatmul {
  using X = typename Op::X;
  using Acc = typename Op::Acc;
  using Side = typename Op::Side;
  using Call = BlockCall<Op>;

  template <int ROWS, int PANELS>
  static void call(const Call& c) {
    if constexpr (PANELS * kPanel <= kTileChannels && Op::kExpands) {
      if (c.expanded != nullptr) return Op::template tile<ROWS, PANELS>(c.x, c.expanded, c.len, c.first, c.sums);
    }
    Op::template stream<ROWS, PANELS>(c);
  }

  template <int ROWS = kMaxRows>
  static void dispatch(int64_t rows, int64_t panels, const Call& c) {
    if (rows < ROWS) {
      if constexpr (ROWS > 1) dispatch<ROWS - 1>(rows, panels, c);
      return;
    }
    if constexpr (tile_fits(ROWS, 4, Op::kStreamAccumulators)) {
      if (panels == 4) return call<ROWS, 4>(c);
    }
    if constexpr (tile_fits(ROWS, 2)) {
      if (panels == 2) return call<ROWS, 2>(c);
    }
    call<ROWS, 1>(c);
  }

  // The widest group of panels that is left and fits the registers with this many rows.
  static int64_t width(int64_t rows, int64_t left, bool expands) {
    if (!expands && left >= 4 && tile_fits(rows, 4, Op::kStreamAccumulators)) return 4;
    return left >= 2 && tile_fits(rows, 2, expands ? kMaxAccumulators : Op::kStreamAccumulators) ? 2 : 1;
  }

  static void matmul(const Job& job, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
    alignas(64) uint8_t packed[kMaxPanels][Op::kBlock / Op::kUnit * 4 * kPanel];
    alignas(64) Side side[kMaxPanels * Op::kSide];
    alignas(64) typename Op::Expanded expanded[Op::kExpands ? Op::kBlock * kTileChannels : 1];
    alignas(64) Acc sums[kChunkRows * kTileChannels];
    alignas(64) float scale[kMaxPanels * kPanel], bias[kMaxPanels * kPanel];
    const uint8_t *lines[kMaxPanels], *next[kMaxPanels];
    const bool expands = Op::kExpands && row1 - row0 > job.rows_per_block;
    const int64_t columns = ceil_div(job.k, kChunk) * kChunk;

    for (int64_t panel = panel0, panels; panel < panel1; panel += panels) {
      panels = width(job.rows_per_block, panel1 - panel, expands);
      const int64_t channels = panels * kPanel, column = panel * kPanel;
      for (int64_t c = 0; c < channels; c += kPanel) load_channels(job, column + c, scale + c, bias + c);
      int64_t k0 = 0;
      do {  // once for K = 0 too
        const int64_t len = job.k - k0 < Op::kBlock ? job.k - k0 : Op::kBlock;
        for (int64_t p = 0; p < panels; ++p) {
          lines[p] = panel_lines(job.w, panel + p, k0 / Op::kUnit, ceil_div(len, Op::kUnit), packed[p]);
          next[p] = next_lines(job, panel + p, panel + p + panels, panel1, k0, lines[p]);
          Op::prepare(job, panel + p, k0, len, lines[p], side + p * Op::kSide);
          if constexpr (Op::kExpands) {
            if (expands) Op::expand(lines[p], side + p * Op::kSide, len, expanded + p * Op::kExpandedPanel, panels);
          }
        }
        for (int64_t row = row0; row < row1; row += job.rows_per_block) {
          const int64_t rows = row1 - row < job.rows_per_block ? row1 - row : job.rows_per_block;
          const X* x = reinterpret_cast<const X*>(job.packed) + row * columns + k0 * rows;
          Acc* tile = sums + (row - row0) * channels;
          dispatch(rows, panels,
                   {x, lines, row == row0 ? next : lines, side, expands ? expanded : nullptr, len, k0 == 0, tile});
          if (k0 + len == job.k) write(job, row, rows, column, channels, tile, scale, bias);
        }
        k0 += Op::kBlock;
      } while (k0 < job.k);
    }
  }

  // The lines that this panel's place in the group sees next: its next block of K, or the next group's panel.
  static const uint8_t* next_lines(const Job& job, int64_t panel, int64_t next_panel, int64_t end, int64_t k0,
                                   const uint8_t* lines) {
    if (!job.w.in_panel(panel)) return lines;
    if (k0 + Op::kBlock < job.k) return lines + Op::kBlock / Op::kUnit * 4 * kPanel;
    return next_panel < end && job.w.in_panel(next_panel) ? job.w.data + next_panel * kPanel * job.w.row_bytes : lines;
  }

  static void load_channels(const Job& job, int64_t column, float* scale, float* bias) {
    const int64_t count = job.n - column;
    for (int64_t c = 0; c < kPanel; ++c) scale[c] = 1.0f, bias[c] = 0.0f;
    if (job.w_scale != nullptr) {
      load_some(Dtype::kFloat, reinterpret_cast<const char*>(job.w_scale), column, count, scale);
    }
    if (job.out.bias != nullptr) load_some(job.out.bias_dtype, job.out.bias, column, count, bias);
  }

  static void write(const Job& job, int64_t row, int64_t rows, int64_t column, int64_t channels, const Acc* sums,
                    const float* scale, const float* bias) {
    switch (job.out.dtype) {
      case Dtype::kFloat:
        return write_as<Dtype::kFloat>(job, row, rows, column, channels, sums, scale, bias);
      case Dtype::kBFloat16:
        return write_as<Dtype::kBFloat16>(job, row, rows, column, channels, sums, scale, bias);
      case Dtype::kHalf:
        return write_as<Dtype::kHalf>(job, row, rows, column, channels, sums, scale, bias);
    }
  }

  template <Dtype T>
  static void write_as(const Job& job, int64_t row, int64_t rows, int64_t column, int64_t channels, const Acc* sums,
                       const float* scale, const float* bias) {
    if (job.out.gate == Gate::kNone && job.out.residual == nullptr) {
      finish<T, true>(job, row, rows, column, channels, sums, job.x_scale, scale, bias);
    } else {
      finish<T, false>(job, row, rows, column, channels, sums, job.x_scale, scale, bias);
    }
  }

  // Blocks of rows of x into the packed form, `Op::pack_row` doing one row.
  static void pack(const Job& job, int64_t block0, int64_t block1) {
    const int64_t columns = ceil_div(job.k, kChunk) * kChunk;
    for (int64_t block = block0; block < block1; ++block) {
      const int64_t row0 = block * job.rows_per_block;
      const int64_t rows = job.m - row0 < job.rows_per_block ? job.m - row0 : job.rows_per_block;
      X* target = reinterpret_cast<X*>(job.packed) + row0 * columns;
      for (int64_t r = 0; r < rows; ++r) pack_one(job, row0 + r, target + r * kChunk, rows * kChunk);
    }
  }

  static void pack_one(const Job& job, int64_t row, X* target, int64_t stride) {
    if constexpr (Op::kScalesX) {
      if (job.quantised_scale != nullptr) return Op::copy_row(job, row, target, stride);
    }
    switch (job.x_dtype) {
      case Dtype::kFloat:
        return Op::template pack_row<Dtype::kFloat>(job, row, target, stride);
      case Dtype::kBFloat16:
        return Op::template pack_row<Dtype::kBFloat16>(job, row, target, stride);
      case Dtype::kHalf:
        return Op::template pack_row<Dtype::kHalf>(job, row, target, stride);
    }
  }

  static constexpr Kernels kernels() { return {kMaxRows, sizeof(X), Op::kScalesX, &pack, &matmul}; }
};
