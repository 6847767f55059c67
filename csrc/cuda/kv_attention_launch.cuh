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
  const bool hopper = context.limits().capability >= 90;
  const int clusters = hopper ? possible_clusters(kernel, Kernel::kThreads, kRanks, Kernel::kSmemBytes, context, 2) : 0;
  args.chunks = ceil_quotient(args.rows, Kernel::kQueries);
  args.units = hopper ? kRanks : 1;
  // So many that one row fills the card, and its blocks run all at once. The batch may not show here, nor the capacity.
  const int pairs = args.g * args.chunks;
  args.most_units = hopper ? kRanks * larger(1, clusters / pairs) : larger(1, 256 / pairs);
  args.groups = most_groups(args.positions, args.units, args.most_units);
  const int64_t items = int64_t(args.b) * args.g * args.chunks;
  const bool spread = clusters > 0 && items < kManyRows;
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
    args.early = dependent && previous_has_settled(args.k_cache);
    launch_clusters(op, kernel, blocks, Kernel::kThreads, args.ranks, Kernel::kSmemBytes, dependent, args, context);
    leave_settled(args.k_cache);
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
