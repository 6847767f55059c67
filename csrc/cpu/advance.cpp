// advance: the end of a decode step: ids = ring[steps mod S] = tokens, then lengths, offset and steps grow by 1
// Source    –
// Layout    plain
// Requires  –
// Mapping   one thread
// Bound     latency
// Numerics  exact
// Verified  tests/test_advance.py

#include "common/embed.h"

namespace fastinfer {

void advance_cpu(const Tensor& tokens, const Tensor& ids, const Tensor& lengths, const Tensor& offset,
                 const Tensor& ring, const Tensor& steps) {
  const AdvanceArgs args = check_advance("advance", tokens, ids, lengths, offset, ring, steps);
  int64_t* slot = args.slot();
  for (int64_t i = 0; i < args.b; ++i) {
    args.ids[i] = slot[i] = args.tokens[i];
    ++args.lengths[i];
  }
  ++*args.offset;
  ++*args.steps;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) { m.impl("advance", TORCH_BOX(&fastinfer::advance_cpu)); }
