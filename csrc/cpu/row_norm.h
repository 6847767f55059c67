// What a row is multiplied by in an RMS norm. Included once per instruction set by each_isa.h, after epilogue.h.

// Σ x² in fp64: no order of the sum shows in an fp32 mean.
template <Dtype T>
double sum_squares(const char* x, int64_t left) {
  Double sums[kLineVecs][2];
  Float values[kLineVecs];
  for (int v = 0; v < kLineVecs; ++v) sums[v][0] = sums[v][1] = zero_double();
  for (; left > 0; left -= kChunk, x += kChunk * bytes_in(T)) {
    load_some<T>(x, left, values);
    FI_UNROLL
    for (int v = 0; v < kLineVecs; ++v) add_squares(values[v], sums[v]);
  }
  alignas(64) double lanes[kChunk];
  for (int v = 0; v < 2 * kLineVecs; ++v) store_double(lanes + v * kLanes / 2, sums[v / 2][v % 2]);
  double sum = 0;
  for (int i = 0; i < kChunk; ++i) sum += lanes[i];
  return sum;
}

// 1 / sqrt(mean(x²) + eps)
template <Dtype T>
float rms_factor(const char* x, int64_t k, float eps) {
  const float mean = static_cast<float>(sum_squares<T>(x, k)) / static_cast<float>(k);
  return 1.0f / std::sqrt(mean + eps);
}
