// What the matmuls share on the host side: tensors taken apart into plain pointers, work split over threads.
#pragma once

#include "common/matmul_checks.h"
#include "cpu/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace fastinfer {

constexpr int64_t kPanel = 16;       // rows of weights in a panel, LAYOUTS.md#panel16
constexpr int64_t kChunk = 16;       // columns of x that lie together in the packed rows
constexpr int64_t kChunkRows = 192;  // rows of x that one pass over a panel serves

enum class Dtype { kFloat, kBFloat16, kHalf };

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      return Dtype::kFloat;
  }
}

inline int64_t bytes_of(Dtype t) { return t == Dtype::kFloat ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The weights as stored: rows of `row_bytes` bytes, in panels of 16 rows where `panels` says so.
struct PackedWeights {
  const uint8_t* data;
  int64_t n, row_bytes;
  bool panels;

  bool in_panel(int64_t panel) const { return panels && (panel + 1) * kPanel <= n; }
};

// Where the results of a matmul go, and what happens to them on the way: y = activation(v + bias) + residual.
struct Output {
  int64_t n;                       // columns of v; y has half as many where gated
  char* y;                         // [M, columns()] row-major
  Dtype dtype;                     // of y and residual
  const char* residual = nullptr;  // [M, columns()], or null
  const char* bias = nullptr;      // [N], or null
  Dtype bias_dtype = Dtype::kFloat;
  Gate gate = Gate::kNone;

  int64_t columns() const { return out_features(gate, n); }
};

// One matmul in plain pointers, as the kernels take it.
struct Job {
  int64_t m, n, k;
  const char* x;  // [M, K] row-major
  Dtype x_dtype;
  PackedWeights w;
  Output out;

  const float* quantised_scale = nullptr;  // [M]: x is int8, quantised before, with these scales
  const float* w_scale = nullptr;          // [N], or null for 1

  const char* group_scale = nullptr;  // int4: [N, K/G] in the layout of w
  const char* group_zero = nullptr;
  Dtype group_dtype = Dtype::kFloat;
  int group_shift = 0;  // log2 G

  // Filled in by run(): x in blocks of rows, [M / rows_per_block][K / 16][rows of the block][16], zero-padded in K.
  int64_t rows_per_block = 0;
  char* packed = nullptr;
  float* x_scale = nullptr;  // [M], where the kernels multiply int8 x
};

// The compiled kernels of one op and instruction set.
struct Kernels {
  int64_t max_rows;  // the most rows of x in a block
  int64_t x_bytes;   // bytes of an element of packed x
  bool scales_x;     // pack() fills in x_scale
  void (*pack)(const Job&, int64_t block0, int64_t block1);
  void (*matmul)(const Job&, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1);
};

// Memory that a thread keeps between calls.
inline char* scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, ceil_div(bytes, 4096) * 4096)));
    if (memory == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

// Runs f(begin, end) over [0, count) on torch's threads, each with at least 2^16 operations to do.
template <class F>
void parallel(int64_t count, int64_t operations, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, operations));
  if (count <= grain) {
    if (count > 0) f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// Packs x, as many rows at a time as kScratchBytes hold, then goes over (chunk of rows × panel), split evenly.
inline void run(const Kernels& kernels, Job job) {
  constexpr int64_t kScratchBytes = 4 << 20;
  const int64_t columns = ceil_div(job.k, kChunk) * kChunk, panels = ceil_div(job.n, kPanel);
  const int64_t row_bytes = columns * kernels.x_bytes + sizeof(float);
  const int64_t most = std::max<int64_t>(kScratchBytes / row_bytes / kChunkRows * kChunkRows, 2 * kernels.max_rows);
  const int64_t total = job.m, x_row = job.k * (job.quantised_scale == nullptr ? bytes_of(job.x_dtype) : 1);
  const int64_t y_row = job.out.columns() * bytes_of(job.out.dtype);
  if (total == 0 || job.n == 0) return;
  job.packed = scratch(std::min(most, total) * row_bytes);
  for (int64_t done = 0; done < total; done += job.m, job.x += job.m * x_row, job.out.y += job.m * y_row) {
    job.m = std::min(most, total - done);
    if (kernels.scales_x) job.x_scale = reinterpret_cast<float*>(job.packed + job.m * columns * kernels.x_bytes);
    job.rows_per_block = ceil_div(job.m, ceil_div(job.m, kernels.max_rows));
    const int64_t blocks = ceil_div(job.m, job.rows_per_block);
    parallel(blocks, job.rows_per_block * columns, [&](int64_t begin, int64_t end) { kernels.pack(job, begin, end); });
    const int64_t chunks = ceil_div(blocks, kChunkRows / job.rows_per_block);  // of equal size, for an even split
    const int64_t chunk = ceil_div(blocks, chunks) * job.rows_per_block;
    const int64_t operations = std::min(chunk, job.m) * kPanel * columns;
    parallel(ceil_div(job.m, chunk) * panels, operations, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / panels * chunk, panel = begin % panels;
        const int64_t stop = std::min(panels, panel + end - begin);
        kernels.matmul(job, row, std::min(row + chunk, job.m), panel, stop);
        begin += stop - panel;
      }
    });
    if (job.out.residual != nullptr) job.out.residual += job.m * y_row;
    if (job.quantised_scale != nullptr) job.quantised_scale += job.m;
  }
}

inline void check_isa(const char* op) {
  FASTINFER_CHECK(op, cpu_isa() != Isa::kNone, "the CPU kernels need AVX2, FMA and F16C");
}

// An uninitialised y for x [..., K], of N columns or half as many, and the Output that describes it.
inline Output make_output(const char* op, const EpilogueArguments& e, const Tensor& x, int64_t n, Tensor& y) {
  Output out{n, nullptr, Dtype::kFloat};
  out.gate = check_epilogue(op, e, x, n);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out.columns();
  y = torch::stable::new_empty(x, {sizes.data(), sizes.size()}, e.y_type);
  out.y = static_cast<char*>(y.mutable_data_ptr());
  out.dtype = dtype_of(y);
  if (e.residual) out.residual = static_cast<const char*>(e.residual->const_data_ptr());
  if (e.bias) out.bias = static_cast<const char*>(e.bias->const_data_ptr()), out.bias_dtype = dtype_of(*e.bias);
  return out;
}

// A matmul's job with the tensors that own its memory. Checks what matmul_checks.h leaves open: CPU and layout.
struct Matmul {
  Tensor x, y;
  Job job;

  Matmul(const char* op, const MatmulShape& shape, const Tensor& x_, const Tensor& w, const EpilogueArguments& epilogue,
         const std::string& layout)
      : x(torch::stable::contiguous(x_)) {
    check_isa(op);
    const bool panels = layout == "panel16";
    FASTINFER_CHECK(op, panels || layout == "row", "layout must be 'row' or 'panel16', got '", layout, "'");
    FASTINFER_CHECK(op, !panels || w.size(1) % 4 == 0, "layout 'panel16' needs rows of w in units of 4 bytes, got ",
                    shape_text(w));
    job.m = shape.m, job.n = shape.n, job.k = shape.k;
    job.x = static_cast<const char*>(x.const_data_ptr());
    job.x_dtype = dtype_of(x);
    job.w = {static_cast<const uint8_t*>(w.const_data_ptr()), shape.n, w.size(1), panels};
    job.out = make_output(op, epilogue, x, shape.n, y);
  }
};

}  // namespace fastinfer
