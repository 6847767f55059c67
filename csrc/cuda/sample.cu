// sample: tokens[B] from logits[B, V]: the likeliest, or drawn after penalty, temperature, top-k, top-p and min-p
// Source    Philox: Salmon et al., SC 2011; the steps are those of transformers' logits processors
// Layout    rows at any distance, their elements side by side; `seen` in plain rows
// Requires  sm80+; clusters on compute capability 9.0
// Mapping   one launch. A cluster of up to 8 blocks of 1024 threads has a row, a block a contiguous part of it (a block a
//           row elsewhere, or in large batches). Blocks exchange what they found through distributed shared memory; scores
//           stay there between passes, or in the L2 where a part does not fit
// Bound     latency: greedy is one pass and one exchange, a draw from all tokens two. top-k and top-p find by a histogram a
//           score that the kept ones reach; these, if they are at most 2048, are sorted and drawn from by one block.
//           Otherwise the threshold is found exactly, by at most five further histograms, and the draw is another pass
// Numerics  the tokens of the reference: fastinfer/ops/sample.py says how every number is rounded. Nothing is fused into
//           an FMA, and sums are integers, so that their order does not matter
// Verified  tests/test_sample.py, tests/test_sample_steps.py

#include "cuda/dependent_launch.cuh"
#include "cuda/sample_row.cuh"

namespace fastinfer {

__device__ __forceinline__ Part part_of(const SampleArgs& args, const Place& place) {
  const int begin = place.rank * args.part;
  return {blockIdx.x / args.ranks, begin, max(0, min(args.part, args.vocabulary - begin))};
}

__device__ __forceinline__ void start_row() {
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  cluster_arrive_relaxed();
  wait_for_previous_kernel();
#endif
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kSampleThreads) greedy_kernel(const __grid_constant__ SampleArgs args) {
  __shared__ Inbox inbox;
  __shared__ Best smem_best[kSampleWarps];
  Place place{static_cast<int>(blockIdx.x % args.ranks), args.ranks};
  start_row();
  const Part part = part_of(args, place);
  const Best best = best_of_row<T, kCount, true>(args, part, place, inbox, smem_best, nullptr);
  if (place.rank == 0 && threadIdx.x == 0) args.tokens[part.row] = best.index;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ uint4 dynamic_smem[];
  SampleSmem& smem = *reinterpret_cast<SampleSmem*>(dynamic_smem);
  Place place{static_cast<int>(blockIdx.x % args.ranks), args.ranks};
  if (threadIdx.x < kCollections) smem.listed[threadIdx.x] = 0;
  start_row();
  const Part part = part_of(args, place);
  float* scores = args.scores == nullptr ? reinterpret_cast<float*>(&smem + 1)
                                         : args.scores + static_cast<int64_t>(blockIdx.x) * args.part;
  const Best best = best_of_row<T, kCount, false>(args, part, place, smem.inbox, smem.best, scores);
  if (best.key == kNanKey) {
    if (place.rank == 0 && threadIdx.x == 0) args.tokens[part.row] = best.index;
    return;
  }
  RowSampler sampler{args, smem, part, place, scores, score_of_key(best.key)};
  bool drawn = false;
#pragma unroll 1  // one copy of the code
  for (int step = 0; step < 2 && !drawn; ++step) {
    const bool by_weight = step == 1;
    if (by_weight ? args.removed_share > 0.0 : args.top_k > 0) drawn = sampler.cut(by_weight);
  }
  if (!drawn) sampler.draw_from_row();
  sync_row();  // until then others may read this block's shared memory
}

// ---- launch -------------------------------------------------------------------------------------------------------------

struct SampleKernels {
  void (*greedy)(SampleArgs);
  void (*draw)(SampleArgs);
};

template <typename T>
static SampleKernels kernels_of(bool wide) {
  if (wide) return {greedy_kernel<T, 8>, sample_kernel<T, 4>};
  return {greedy_kernel<T, 1>, sample_kernel<T, 1>};
}

// As many blocks a row as the batch leaves room for, each with some thousands of tokens; for a draw at least as many as
// keep a part in shared memory, where a cluster can.
static void divide_rows(SampleArgs& args, int64_t batch, bool draws, const LaunchContext& context) {
  const auto part_for = [&](int ranks) { return (args.vocabulary + 8 * ranks - 1) / (8 * ranks) * 8; };
  const int64_t room = context.limits().smem_per_block - static_cast<int64_t>(sizeof(SampleSmem));
  const auto fits = [&](int ranks) { return !draws || int64_t{4} * part_for(ranks) <= room; };
  args.ranks = 1;
  while (context.limits().capability == 90 && args.ranks < kMaxRanks && args.vocabulary > 2048 * args.ranks &&
         (2 * args.ranks * batch <= context.limits().multiprocessors || !fits(args.ranks))) {
    args.ranks *= 2;
  }
  args.part = part_for(args.ranks);
}

static int draw_smem_bytes(const SampleArgs& args, const LaunchContext& context) {
  const int64_t bytes = static_cast<int64_t>(sizeof(SampleSmem)) + int64_t{4} * args.part;
  return bytes <= context.limits().smem_per_block ? static_cast<int>(bytes) : static_cast<int>(sizeof(SampleSmem));
}

static void launch_sample(void (*kernel)(SampleArgs), int64_t batch, int smem_bytes, const SampleArgs& args,
                          const LaunchContext& context) {
  constexpr const char* op = "sample";
  if (smem_bytes > 0) {  // always to the same limit, so that threads do not disturb each other
    const int limit = context.limits().smem_per_block;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  }
  if (context.limits().capability == 90) {
    launch_clusters(op, kernel, batch * args.ranks, kSampleThreads, args.ranks, smem_bytes, take_dependent_launch(),
                    args, context);
  } else {
    kernel<<<static_cast<unsigned>(batch), kSampleThreads, smem_bytes, context.stream()>>>(args);
    check_launch(op);
  }
}

static SampleArgs arguments_of(const Tensor& logits, const Tensor& seed, const Tensor& offset, const SampleOptions& o,
                               const std::optional<Tensor>& seen) {
  SampleArgs args;
  args.logits = logits.const_data_ptr();
  if (seen && o.repetition_penalty != 1) args.seen = static_cast<const bool*>(seen->const_data_ptr());
  args.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  args.offset = static_cast<const int64_t*>(offset.const_data_ptr());
  args.vocabulary = static_cast<int>(logits.size(1));
  args.row_stride = logits.stride(0);
  if (o.top_k < args.vocabulary) args.top_k = static_cast<int>(o.top_k);
  args.temperature = o.temperature == 0 ? 1.f : static_cast<float>(o.temperature);
  args.penalty = static_cast<float>(o.repetition_penalty);
  args.min_p = static_cast<float>(o.min_p);
  args.removed_share = 1.0 - o.top_p;
  return args;
}

// Whether all rows can be read in packs of 8.
static bool reads_packs(const SampleArgs& args, ScalarType type) {
  const int64_t row_bytes = args.row_stride * (type == ScalarType::Float ? 4 : 2);
  return args.vocabulary % 8 == 0 && row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(args.logits) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.seen) % 8 == 0;
}

Tensor sample_cuda(const Tensor& logits, const Tensor& seed, const Tensor& offset, double temperature, int64_t top_k,
                   double top_p, double min_p, double repetition_penalty, const std::optional<Tensor>& seen) {
  const SampleOptions options{temperature, top_k, top_p, min_p, repetition_penalty};
  check_sample("sample", logits, seed, offset, options, seen);
  const LaunchContext context("sample", logits);
  const int64_t batch = logits.size(0);
  const Tensor tokens = torch::stable::new_empty(logits, {&batch, 1}, ScalarType::Long);
  if (batch == 0) return tokens;
  const Tensor rows = logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
  SampleArgs args = arguments_of(rows, seed, offset, options, seen);
  args.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const bool draws = temperature != 0;
  divide_rows(args, batch, draws, context);
  const int smem_bytes = draws ? draw_smem_bytes(args, context) : 0;
  std::optional<Tensor> scores;
  if (smem_bytes == sizeof(SampleSmem)) {
    const int64_t size = batch * args.ranks * args.part;
    scores = torch::stable::new_empty(logits, {&size, 1}, ScalarType::Float);
    args.scores = static_cast<float*>(scores->mutable_data_ptr());
  }
  dispatch_float(rows.scalar_type(), [&](auto zero) {
    const SampleKernels kernels = kernels_of<decltype(zero)>(reads_packs(args, rows.scalar_type()));
    launch_sample(draws ? kernels.draw : kernels.greedy, batch, smem_bytes, args, context);
  });
  return tokens;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("sample", TORCH_BOX(&fastinfer::sample_cuda)); }
