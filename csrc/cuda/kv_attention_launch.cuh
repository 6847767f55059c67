// Launches kv_attention_tile.cuh: how many blocks, their room for partial sums, and which of its instances.
#pragma once

#include "cuda/dependent_launch.cuh"
#include "cuda/kv_attention_tile.cuh"

namespace fastinfer {

constexpr int kManyRows = 64;  // from so many pairs of row and head on, a block takes a whole group

// False where the GPU has too little shared memory.
template <typename T, bool kInt8, int kD, int kTiles>
bool launch_tile_attention_as(const char* op, AttentionArgs args, const Tensor& like, const LaunchContext& context) {
  using Kernel = TileAttention<T, kInt8, kD, kTiles>;
  if (Kernel::kSmemBytes > context.limits().smem_per_block) return false;
  const auto kernel = tile_attention_kernel<T, kInt8, kD, kTiles>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.limits().smem_per_block));
  const bool clusters = context.limits().capability >= 90;
  args.chunks = ceil_quotient(args.rows, Kernel::kQueries);
  args.units = clusters ? kRanks : 1;
  // So many that one row fills a card of 132 × 2 blocks. Nothing that differs between calls of a model may show here.
  args.unit_shift = clusters ? 3 : 0;
  while (args.unit_shift < 8 && (args.g << (args.unit_shift + 1)) <= 256) ++args.unit_shift;
  args.groups = most_groups(args.positions, args.units, args.unit_shift);
  const int64_t items = int64_t(args.b) * args.g * args.chunks;
  const bool spread = clusters && items < kManyRows &&
                      possible_clusters(kernel, Kernel::kThreads, kRanks, Kernel::kSmemBytes, context, 2) > 0;
  args.ranks = spread ? kRanks : 1;
  std::optional<Tensor> partials, counters;
  if (args.groups > 1) {
    partials = torch::stable::new_empty(like, {items * args.groups * Kernel::kPartialFloats}, ScalarType::Float);
    args.partials = static_cast<float*>(partials->mutable_data_ptr());
    if (items * args.ranks <= kMostCounters) {
      args.arrived = take_counters(items * args.ranks, context);
    } else {
      counters = torch::stable::new_zeros(like, {items}, ScalarType::Int);
      args.arrived = static_cast<unsigned*>(counters->mutable_data_ptr());
    }
  }
  const int64_t blocks = items * args.groups * args.ranks;
  if (context.limits().capability == 90 || spread) {
    const bool dependent = take_dependent_launch() && context.limits().capability == 90 && !counters.has_value();
    launch_clusters(op, kernel, blocks, Kernel::kThreads, args.ranks, Kernel::kSmemBytes, dependent, args, context);
  } else {
    kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, Kernel::kSmemBytes, context.stream()>>>(args);
    check_launch(op);
  }
  return true;
}

template <typename T, bool kInt8, int kD>
bool launch_tile_attention_for(const char* op, const AttentionArgs& args, const Tensor& like,
                               const LaunchContext& context) {
  if (args.rows > 8 && launch_tile_attention_as<T, kInt8, kD, 2>(op, args, like, context)) return true;
  return launch_tile_attention_as<T, kInt8, kD, 1>(op, args, like, context);
}

template <typename T, bool kInt8>
bool launch_tile_attention_of(const char* op, const AttentionArgs& args, const Tensor& like,
                              const LaunchContext& context) {
  if (args.d <= 64) return launch_tile_attention_for<T, kInt8, 64>(op, args, like, context);
  if (args.d <= 96) return launch_tile_attention_for<T, kInt8, 96>(op, args, like, context);
  if (args.d <= 128) return launch_tile_attention_for<T, kInt8, 128>(op, args, like, context);
  return launch_tile_attention_as<T, kInt8, 256, 1>(op, args, like, context);
}

}  // namespace fastinfer
