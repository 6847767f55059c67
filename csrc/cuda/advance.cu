// advance: the end of a decode step: ids = ring[steps mod S] = tokens, then lengths, offset and steps grow by 1
// Source    –
// Layout    plain
// Requires  sm80+
// Mapping   one block
// Bound     latency
// Numerics  exact
// Verified  tests/test_advance.py

#include "common/embed.h"
#include "common/hopper.cuh"
#include "cuda/row_norm.cuh"

namespace fastinfer {

constexpr int kAdvanceThreads = 256;

__global__ void __launch_bounds__(kAdvanceThreads) advance_kernel(const __grid_constant__ AdvanceArgs args) {
#if __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  wait_for_previous_kernel();
#endif
  int64_t* slot = args.slot();
  __syncthreads();  // all have read steps
  for (int64_t i = threadIdx.x; i < args.b; i += kAdvanceThreads) {
    args.ids[i] = slot[i] = args.tokens[i];
    ++args.lengths[i];
  }
  if (threadIdx.x == 0) ++*args.offset, ++*args.steps;
}

void advance_cuda(const Tensor& tokens, const Tensor& ids, const Tensor& lengths, const Tensor& offset,
                  const Tensor& ring, const Tensor& steps) {
  constexpr const char* op = "advance";
  const AdvanceArgs args = check_advance(op, tokens, ids, lengths, offset, ring, steps);
  const LaunchContext context(op, tokens);
  launch_rows(op, advance_kernel, 1, kAdvanceThreads, args, context);
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) { m.impl("advance", TORCH_BOX(&fastinfer::advance_cuda)); }
