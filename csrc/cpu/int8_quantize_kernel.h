// Rows of x to int8, after an RMS norm if there is one. Included once per instruction set by each_isa.h.

#include "cpu/epilogue.h"

#include "cpu/quantize_row.h"
#include "cpu/row_norm.h"

template <Dtype T>
FI_INLINE Float round_to(Float v) {  // to the values that T has
  if constexpr (T == Dtype::kFloat) return v;
  alignas(64) char rounded[kLanes * 4];
  store_from_float<T>(rounded, v);
  return load_as_float<T>(rounded);
}

// x / sqrt(mean(x²) + eps) · norm_weight in whole chunks, rounded to T after each product.
template <Dtype T>
void rms_norm(const QuantizeJob& job, const char* x, float* out) {
  const Float factor = broadcast(rms_factor<T>(x, job.k, job.eps));
  alignas(64) float weight[kChunk];
  for (int64_t k = 0; k < job.k; k += kChunk) {
    Float values[kLineVecs];
    load_some<T>(x + k * bytes_in(T), job.k - k, values);
    load_some(job.norm_dtype, job.norm_weight, k, job.k - k, weight);
    for (int v = 0; v < kLineVecs; ++v) {
      const Float normed = round_to<T>(mul(values[v], factor));
      store(out + k + v * kLanes, round_to<T>(mul(normed, load(weight + v * kLanes))));
    }
  }
}

template <Dtype T>
void quantize_rows_as(const QuantizeJob& job, int64_t row0, int64_t row1) {
  const int64_t padded = ceil_div(job.k, kChunk) * kChunk;
  char* memory = scratch(padded * (sizeof(float) + 1));  // a row of v, and one of q where K is ragged
  auto* v = reinterpret_cast<float*>(memory);
  auto* ragged = reinterpret_cast<int8_t*>(memory + padded * sizeof(float));
  for (int64_t row = row0; row < row1; ++row) {
    const char* x = job.x + row * job.k * bytes_in(T);
    int8_t* q = padded == job.k ? job.q + row * job.k : ragged;
    if (job.norm_weight == nullptr) {
      job.x_scale[row] = quantize_row<T>(x, job.k, q, kChunk);
    } else {
      rms_norm<T>(job, x, v);
      job.x_scale[row] = quantize_row<Dtype::kFloat>(memory, job.k, q, kChunk);
    }
    if (q == ragged) std::memcpy(job.q + row * job.k, ragged, job.k);
  }
}

inline void quantize_rows(const QuantizeJob& job, int64_t row0, int64_t row1) {
  switch (job.x_dtype) {
    case Dtype::kFloat:
      return quantize_rows_as<Dtype::kFloat>(job, row0, row1);
    case Dtype::kBFloat16:
      return quantize_rows_as<Dtype::kBFloat16>(job, row0, row1);
    case Dtype::kHalf:
      return quantize_rows_as<Dtype::kHalf>(job, row0, row1);
  }
}
