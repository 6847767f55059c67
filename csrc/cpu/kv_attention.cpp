// kv_attention: new keys and values into a static cache, keys rotated on the way; then y = softmax(q · keysᵀ) · values
// Source    split over keys with a combine: Dao et al., Flash-Decoding, 2023; here the pieces are of a fixed size, and no
//           running maximum is kept inside of one; transformed keys: Ashkboos et al., QuaRot, arXiv 2404.00456
// Layout    LAYOUTS.md#kv-cache
// Requires  AVX2, FMA, F16C; AVX-512 where there is one
// Mapping   three passes over threads: rotate and append by (row, head of the cache); attend by (row, head of the cache,
//           kKeys keys), all queries of that head side by side; combine by query
// Bound     memory: the cache is read once
// Numerics  pieces start at the first key that a row sees and are combined in order: no thread count, batch or padding
//           changes a bit
// Verified  tests/test_kv_attention.py

#include "common/attention_checks.h"
#include "cpu/matmul.h"

namespace fastinfer {

constexpr int64_t kKeys = 256;  // keys in a piece: they and their values stay in L2 for all queries

struct Tokens {  // [B, T, heads, D], strides in bytes
  const char* data;
  int64_t row, token, head;

  const char* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * token + h * head; }
};

struct Rotation {  // [B, T, R], strides in elements
  const char* data = nullptr;
  int64_t row = 0, token = 0;

  int64_t at(int64_t b, int64_t t) const { return b * row + t * token; }
};

struct AttentionJob {
  AttentionShape s;
  Dtype dtype;
  bool int8;  // the cache
  Tokens q, k, v;
  char *k_cache, *v_cache;          // [B, G, L, D]
  float *k_scale, *v_scale;         // [B, G, L] beside an int8 cache
  const int32_t *lengths, *starts;  // [B]; starts may be null
  Rotation cos, sin;
  Dtype rotation_dtype;
  float scale, softcap;
  int64_t window;
  char* y;  // [B, T, H, D]

  int64_t padded;        // D in whole vectors
  float* queries;        // [B, G, rows, padded]: q, rotated and scaled
  const int64_t* first;  // [B + 1]: index of a row's first piece, G times its pieces a head
  float* sums;           // [pieces, rows, padded]: values times weights
  float* stats;          // [pieces, rows, 2]: the largest score, the sum of the weights

  int64_t position(int64_t b, int64_t t) const { return lengths[b] + t; }
  int64_t first_seen(int64_t b, int64_t t) const {
    const int64_t start = starts == nullptr ? 0 : starts[b];
    return window == 0 ? start : std::max(start, position(b, t) - window + 1);
  }
  int64_t pieces(int64_t b) const {  // of each head
    return std::max<int64_t>(0, ceil_div(lengths[b] + s.t - first_seen(b, 0), kKeys));
  }
  int64_t cache_row(int64_t b, int64_t g, int64_t position) const { return (b * s.g + g) * s.l + position; }
};

// x[0 … 2 · half) rotated in pairs half apart. It stands here, for plain x86-64, and not beside the kernels, so that no
// product is fused with the sum: torch rounds it first.
__attribute__((noinline)) static void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

}  // namespace fastinfer

#define FASTINFER_KERNEL "cpu/kv_attention_kernel.h"
#include "cpu/each_isa.h"

namespace fastinfer {

static Tokens tokens_of(const Tensor& t) {
  const int64_t bytes = bytes_of(dtype_of(t));
  return {static_cast<const char*>(t.const_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

static Rotation rotation_of(const Tensor& t) {
  return {static_cast<const char*>(t.const_data_ptr()), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1)};
}

static void check_positions(const char* op, const AttentionJob& job) {
  const int64_t l = job.s.l, t = job.s.t;
  for (int64_t b = 0; b < job.s.b; ++b) {
    FASTINFER_CHECK(op, job.lengths[b] >= 0 && job.lengths[b] + t <= l, "lengths must be 0 ... ", l - t, " for T = ", t,
                    ", L = ", l, ", got ", job.lengths[b]);
    FASTINFER_CHECK(op, job.starts == nullptr || (job.starts[b] >= 0 && job.starts[b] <= l), "starts must be 0 ... ", l,
                    ", got ", job.starts[b]);
  }
}

static AttentionJob make_job(const AttentionTensors& a, const AttentionShape& s, Tensor& y) {
  AttentionJob job{s, dtype_of(a.q), a.k_cache.scalar_type() == ScalarType::Char};
  job.q = tokens_of(a.q), job.k = tokens_of(a.k), job.v = tokens_of(a.v);
  job.k_cache = static_cast<char*>(a.k_cache.mutable_data_ptr());
  job.v_cache = static_cast<char*>(a.v_cache.mutable_data_ptr());
  if (job.int8) {
    job.k_scale = static_cast<float*>(a.k_scale->mutable_data_ptr());
    job.v_scale = static_cast<float*>(a.v_scale->mutable_data_ptr());
  }
  job.lengths = static_cast<const int32_t*>(a.lengths.const_data_ptr());
  if (a.starts) job.starts = static_cast<const int32_t*>(a.starts->const_data_ptr());
  if (a.cos) job.cos = rotation_of(*a.cos), job.sin = rotation_of(*a.sin), job.rotation_dtype = dtype_of(*a.cos);
  job.y = static_cast<char*>(y.mutable_data_ptr());
  return job;
}

struct AttentionKernels {
  void (*append)(const AttentionJob&, int64_t begin, int64_t end);
  void (*attend)(const AttentionJob&, int64_t b, int64_t g, int64_t piece);
  void (*combine)(const AttentionJob&, int64_t begin, int64_t end);
};

static void run(const AttentionKernels& kernels, AttentionJob job) {
  const AttentionShape& s = job.s;
  std::vector<int64_t> first(s.b + 1, 0);
  for (int64_t b = 0; b < s.b; ++b) first[b + 1] = first[b] + s.g * job.pieces(b);
  const int64_t rows = s.rows(), queries = s.b * s.g * rows, pieces = first[s.b];
  job.padded = ceil_div(s.d, kChunk) * kChunk;
  job.first = first.data();
  job.queries = reinterpret_cast<float*>(scratch((queries * job.padded + pieces * rows * (job.padded + 2)) * 4));
  job.sums = job.queries + queries * job.padded;
  job.stats = job.sums + pieces * rows * job.padded;
  parallel(s.b * s.g, 8 * (rows + 2 * s.t) * s.d, [&](int64_t begin, int64_t end) { kernels.append(job, begin, end); });
  parallel(pieces, 2 * rows * s.d * kKeys, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t b = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      const int64_t each = (first[b + 1] - first[b]) / s.g, piece = begin - first[b];
      kernels.attend(job, b, piece / each, piece % each);
    }
  });
  parallel(queries, s.d / 4 * (ceil_div(pieces, s.b * s.g) + 1),
           [&](int64_t begin, int64_t end) { kernels.combine(job, begin, end); });
}

Tensor kv_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, const std::optional<Tensor>& k_scale,
                        const std::optional<Tensor>& v_scale, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin, const std::optional<Tensor>& starts, double scale,
                        int64_t window, double softcap) {
  constexpr const char* kOp = "kv_attention";
  const AttentionTensors tensors{q, k, v, k_cache, v_cache, lengths, k_scale, v_scale, cos, sin, starts};
  const AttentionShape s = check_kv_attention(kOp, tensors, window, softcap);
  check_isa(kOp);
  Tensor y = torch::stable::new_empty(q, {s.b, s.t, s.h, s.d});
  if (y.numel() == 0) return y;
  AttentionJob job = make_job(tensors, s, y);
  job.scale = static_cast<float>(scale), job.softcap = static_cast<float>(softcap), job.window = window;
  check_positions(kOp, job);
  const AttentionKernels wide{avx512::append_tokens, avx512::attend, avx512::combine};
  const AttentionKernels narrow{avx2::append_tokens, avx2::attend, avx2::combine};
  run(cpu_isa() == Isa::kAvx512Vnni ? wide : narrow, job);
  return y;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("kv_attention", TORCH_BOX(&fastinfer::kv_attention_cpu)); }
