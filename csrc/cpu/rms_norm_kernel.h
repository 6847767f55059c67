// Rows of x, plus those of a residual if there is one, to their RMS norm. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

#include "cpu/row_norm.h"

template <Dtype T>
void add_row(const char* x, const char* residual, int64_t left, char* sum) {
  constexpr int64_t kBytes = kChunk * bytes_in(T);
  for (; left > 0; left -= kChunk, x += kBytes, residual += kBytes, sum += kBytes) {
    Float values[kLineVecs], added[kLineVecs];
    load_some<T>(x, left, values);
    load_some<T>(residual, left, added);
    FI_UNROLL
    for (int v = 0; v < kLineVecs; ++v) values[v] = add(values[v], added[v]);
    store_some<T>(sum, left, values);
  }
}

// y = x · factor · scale, the scales in whole chunks.
template <Dtype T>
void scale_row(const char* x, float factor, const float* scale, int64_t left, char* y) {
  constexpr int64_t kBytes = kChunk * bytes_in(T);
  const Float f = broadcast(factor);
  for (; left > 0; left -= kChunk, x += kBytes, scale += kChunk, y += kBytes) {
    Float values[kLineVecs];
    load_some<T>(x, left, values);
    FI_UNROLL
    for (int v = 0; v < kLineVecs; ++v) values[v] = mul(mul(values[v], f), load(scale + v * kLanes));
    store_some<T>(y, left, values);
  }
}

// offset + weight in whole chunks, 1 where there is no weight.
inline const float* column_scales(const RmsNormJob& job) {
  auto* scale = reinterpret_cast<float*>(scratch(ceil_div(job.k, kChunk) * kChunk * sizeof(float)));
  const Float offset = broadcast(job.offset), one = broadcast(1.0f);
  for (int64_t k = 0; k < job.k; k += kChunk) {
    if (job.weight != nullptr) load_some(job.weight_dtype, job.weight, k, job.k - k, scale + k);
    for (int v = 0; v < kLineVecs; ++v) {
      float* at = scale + k + v * kLanes;
      store(at, job.weight == nullptr ? one : add(offset, load(at)));
    }
  }
  return scale;
}

template <Dtype T>
void rms_norm_rows_as(const RmsNormJob& job, int64_t row0, int64_t row1) {
  const float* scale = column_scales(job);
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t at = row * job.k * bytes_in(T);
    const char* values = job.x + at;
    if (job.residual != nullptr) {
      add_row<T>(values, job.residual + at, job.k, job.sum + at);
      values = job.sum + at;
    }
    scale_row<T>(values, rms_factor<T>(values, job.k, job.eps), scale, job.k, job.y + at);
  }
}

inline void rms_norm_rows(const RmsNormJob& job, int64_t row0, int64_t row1) {
  switch (job.dtype) {
    case Dtype::kFloat:
      return rms_norm_rows_as<Dtype::kFloat>(job, row0, row1);
    case Dtype::kBFloat16:
      return rms_norm_rows_as<Dtype::kBFloat16>(job, row0, row1);
    case Dtype::kHalf:
      return rms_norm_rows_as<Dtype::kHalf>(job, row0, row1);
  }
}
