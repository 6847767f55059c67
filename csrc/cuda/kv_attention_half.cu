#include "cuda/kv_attention_launch.cuh"

namespace fastinfer {

template <>
bool launch_tile_attention<__half>(const char* op, AttentionArgs args, bool int8, const Tensor& like,
                                   const LaunchContext& context) {
  return int8 ? launch_tile_attention_of<__half, true>(op, args, like, context)
              : launch_tile_attention_of<__half, false>(op, args, like, context);
}

}  // namespace fastinfer
