// torch's own linear, called through its dispatcher.
#pragma once

#include <array>

#include "common/tensor.h"

namespace fastinfer {

// y = x · wᵀ + bias, everything in one dtype.
inline Tensor torch_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fastinfer
