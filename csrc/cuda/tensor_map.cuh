// Tensor maps: how the copy engine finds boxes of a matrix.
#pragma once

#include <cuda.h>

#include "common/cuda.cuh"

namespace fastinfer {

// A map of x [M, K] (16-bit or int8, contiguous, 16-byte aligned rows) in boxes of `tokens` rows × 128 bytes, which it
// writes to shared memory in the 128-byte swizzle; zeros past the end.
CUtensorMap token_map(const char* op, const Tensor& x, int tokens);

// A map of weights in a tile layout, `row_tiles` rows of `blocks` pieces of `piece_bytes` (512, 1024 or 2048), in boxes of
// four row tiles × one piece; zeros past the end.
CUtensorMap weight_map(const char* op, const void* w, int row_tiles, int blocks, int piece_bytes);

}  // namespace fastinfer
