// The rows of a weight that follow its whole tiles of 16 in a tile layout (LAYOUTS.md), as a matmul of their own.
#pragma once

#include "cuda/epilogue.cuh"

namespace fastinfer {

struct TailArgs {
  const void* x = nullptr;        // [M, K] fp16, bf16 or int8, contiguous, 16-byte aligned; K a multiple of 128
  const void* w = nullptr;        // the tail's rows alone: int8 [·, K] or pairs of 4 bits [·, K/2], 16-byte aligned
  const void* w_scale = nullptr;  // int4: theirs, [·, groups] of scale_type; int8's are in the epilogue
  const void* w_zero = nullptr;
  Element scale_type{};
  Epilogue epilogue;             // of the whole matmul, not gated
  int m = 0, k = 0, groups = 0;  // M, K; int4: K/G
  int group_shift = 0;           // int4: log2 G
  int first_row = 0;             // N − N mod 16: rows from here to N are the tail
};

// Columns first_row … N of y. An ordinary launch: a dependent kernel after it waits for its end, hence for all before it.
void launch_tail_rows(const char* op, const TailArgs& args, ScalarType x_type, const LaunchContext& context);

}  // namespace fastinfer
