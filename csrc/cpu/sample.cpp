// sample: tokens[B] from logits[B, V]: the likeliest, or drawn after penalty, temperature, top-k, top-p and min-p
// Source    Philox: Salmon et al., SC 2011; the steps are those of transformers' logits processors
// Layout    rows at any distance, their elements side by side; `seen` in plain rows
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   threads over rows; the scores of a row and their exponentials stay in the L2 or L3 between passes
// Bound     passes over the row: 2 for greedy, 5 to draw. top-k leaves few scores to the later passes: those not below the
//           k-th highest of the maxima of 16. top-k and top-p find their thresholds by digits of the scores' bits (11, 11,
//           10), a pass each, without a sort
// Numerics  the tokens of the reference: fastinfer/ops/sample.py says how every number is rounded
// Verified  tests/test_sample.py, tests/test_sample_steps.py

#include "common/sample.h"
#include "cpu/matmul.h"

#include <climits>
#include <cstring>

namespace fastinfer {

struct SampleJob {
  int64_t v;
  const char* logits;
  Dtype dtype;
  int64_t row_bytes;
  const uint8_t* seen;  // [B, V], or null
  float penalty, temperature, min_p;
  double top_p;
  int64_t top_k;
  uint64_t seed, offset;
  int64_t* tokens;  // [B]
};

}  // namespace fastinfer

#define FASTINFER_KERNEL "cpu/sample_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

Tensor sample_cpu(const Tensor& logits, const Tensor& seed, const Tensor& offset, double temperature, int64_t top_k,
                  double top_p, double min_p, double repetition_penalty, const std::optional<Tensor>& seen) {
  constexpr const char* kOp = "sample";
  check_sample(kOp, logits, seed, offset, {temperature, top_k, top_p, min_p, repetition_penalty}, seen);
  check_isa(kOp);
  const int64_t batch = logits.size(0), v = logits.size(1);
  const bool dense_rows = v == 1 || logits.stride(1) == 1;
  const Tensor rows = dense_rows ? logits : torch::stable::contiguous(logits);
  Tensor tokens = torch::stable::new_empty(logits, {&batch, 1}, ScalarType::Long);
  SampleJob job{v, static_cast<const char*>(rows.const_data_ptr()), dtype_of(rows)};
  job.row_bytes = rows.stride(0) * bytes_of(job.dtype);
  if (seen && repetition_penalty != 1) job.seen = static_cast<const uint8_t*>(seen->const_data_ptr());
  job.penalty = static_cast<float>(repetition_penalty);
  job.temperature = static_cast<float>(temperature);
  job.min_p = static_cast<float>(min_p);
  job.top_p = top_p;
  job.top_k = top_k;
  job.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  job.offset = static_cast<uint64_t>(*static_cast<const int64_t*>(offset.const_data_ptr()));
  job.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const auto sample = cpu_isa() == Isa::kAvx512Vnni ? avx512::sample_rows : avx2::sample_rows;
  parallel(batch, 8 * v, [&](int64_t begin, int64_t end) { sample(job, begin, end); });
  return tokens;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("sample", TORCH_BOX(&fastinfer::sample_cpu)); }
