// The epilogue as a kernel of its own, for the paths whose matmul has none: y = gate(v + bias) + residual.
#pragma once

#include "cuda/epilogue.cuh"

namespace fastinfer {

// What is left to do after a plain matmul has written v [..., N], which has the bias already. Where something is, the
// matmul writes v in fp32 if it can, so that y is rounded once.
struct LaterEpilogue {
  const char* op;
  const std::optional<Tensor>& residual;
  Gate gate;
  ScalarType y_type;

  bool needed() const { return residual.has_value() || gate != Gate::kNone; }
  ScalarType v_type() const { return needed() ? ScalarType::Float : y_type; }
  // y from v, of v_type() or of y_type; v itself where nothing is left to do.
  Tensor apply(const Tensor& v, const LaunchContext& context) const;
};

// y [..., N_out] of type y_type from v [..., N], fp32 or of type y_type; y has the leading dimensions of v.
Tensor apply_epilogue(const char* op, const Tensor& v, const EpilogueArguments& arguments, Gate gate,
                      const LaunchContext& context);

}  // namespace fastinfer
