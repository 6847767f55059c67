// The plain path: dequantise the weights to the dtype of x, then torch's own linear (cuBLAS).
// It wins where M is large, and it is the only path for fp32 activations with many rows.
#pragma once

#include "common/cuda.cuh"

namespace fastinfer {

// w [N, K] int8 · w_scale [N] as [N, K] in the dtype of x.
Tensor dequantize_int8(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& x,
                       const LaunchContext& context);

// (w [N, K/2] − w_zero [N, K/G]) · w_scale [N, K/G] as [N, K] in the dtype of x.
Tensor dequantize_int4(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& w_zero, const Tensor& x,
                       const LaunchContext& context);

// The same from the layouts tile_w4a16 and tile_w8a16; x is fp32.
Tensor dequantize_int8_tiles(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& x,
                             const LaunchContext& context);
Tensor dequantize_int4_tiles(const char* op, const Tensor& w, const Tensor& w_scale, const Tensor& w_zero,
                             const Tensor& x, const LaunchContext& context);

// y = x · wᵀ + bias by torch.
Tensor dense_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias);

}  // namespace fastinfer
