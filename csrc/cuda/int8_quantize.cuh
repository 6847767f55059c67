// The activation quantiser's launcher, which int8_scaled_matmul shares with the op.
#pragma once

#include "common/cuda.cuh"

namespace fastinfer {

// x [M, K] contiguous → q [M, padded K] int8, zero from column K on, and x_scale [M] fp32; after an RMS norm where
// there is a norm_weight [K]. May start early inside of dependent_launch.
void launch_int8_quantize(const char* op, const Tensor& x, const std::optional<Tensor>& norm_weight, double eps,
                          const Tensor& q, const Tensor& x_scale, const LaunchContext& context);

}  // namespace fastinfer
