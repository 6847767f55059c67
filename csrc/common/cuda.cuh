// What every CUDA op needs around its kernel: device guard, stream, device limits, dtype switches, aligned operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace fastinfer {

// ---- element types known at run time ------------------------------------------------------------------------------------

enum class Element : int { kFloat, kHalf, kBFloat16 };

inline Element element_of(ScalarType t) {
  return t == ScalarType::Float ? Element::kFloat : t == ScalarType::Half ? Element::kHalf : Element::kBFloat16;
}

__device__ __forceinline__ float load_float(const void* data, Element type, int64_t i) {
  if (type == Element::kHalf) return __half2float(static_cast<const __half*>(data)[i]);
  if (type == Element::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}
__device__ __forceinline__ void store_float(void* data, Element type, int64_t i, float v) {
  if (type == Element::kHalf) {
    static_cast<__half*>(data)[i] = __float2half_rn(v);
  } else if (type == Element::kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
  } else {
    static_cast<float*>(data)[i] = v;
  }
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// kCount neighbouring elements, moved with 16-byte accesses where they fill them; the address must be aligned to match.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T v[kCount];
};

// Calls f with a value of the C++ type of `t`: dispatch_float(t, [&](auto zero) { using T = decltype(zero); … }).
template <typename F>
void dispatch_float(ScalarType t, F&& f) {
  if (t == ScalarType::Half) {
    f(__half{});
  } else if (t == ScalarType::BFloat16) {
    f(__nv_bfloat16{});
  } else {
    f(float{});
  }
}

// ---- device ---------------------------------------------------------------------------------------------------------------

struct DeviceLimits {
  int capability = 0;  // 80, 86, 90 …
  int multiprocessors = 0;
  int smem_per_block = 0;  // bytes, with the opt-in above 48 KiB
  int smem_per_multiprocessor = 0;
};

// Read once a device; the attribute queries are legal while a CUDA graph is being captured.
inline const DeviceLimits& device_limits(int device) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceLimits, kMaxDevices> limits;
  static std::array<std::once_flag, kMaxDevices> once;
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("fastinfer: device index out of range");
  std::call_once(once[device], [device] {
    const auto get = [device](cudaDeviceAttr attribute) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    DeviceLimits& l = limits[device];
    l.multiprocessors = get(cudaDevAttrMultiProcessorCount);
    l.smem_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    l.smem_per_multiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    l.capability = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  });
  return limits[device];
}

// One per op call: makes x's device current until the end of the scope, holds its current stream, refuses old GPUs.
class LaunchContext {
 public:
  LaunchContext(const char* op, const Tensor& x)
      : device_(x.get_device_index()), guard_(device_), limits_(device_limits(device_)) {
    FASTINFER_CHECK(op, limits_.capability >= 80, "needs a GPU of compute capability 8.0 or newer, this one has ",
                    limits_.capability / 10, ".", limits_.capability % 10);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  int device() const { return device_; }
  const DeviceLimits& limits() const { return limits_; }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  const DeviceLimits& limits_;
  cudaStream_t stream_ = nullptr;
};

// ---- operands -------------------------------------------------------------------------------------------------------------

inline bool is_aligned16(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// `t` [rows, columns] contiguous, starting on a 16-byte boundary, its columns zero-padded to a multiple of `multiple`;
// `t` itself where it is so already.
inline Tensor aligned_rows(const Tensor& t, int64_t multiple) {
  const int64_t columns = t.size(1), padded = (columns + multiple - 1) / multiple * multiple;
  if (columns == padded && t.is_contiguous() && is_aligned16(t)) return t;
  Tensor out = torch::stable::new_zeros(t, {t.size(0), padded});
  Tensor inner = columns == padded ? out : torch::stable::narrow(out, 1, 0, columns);
  torch::stable::copy_(inner, t);
  return out;
}

// x [..., K] as [M, K].
inline Tensor as_matrix(const Tensor& x, const MatmulShape& shape) {
  if (x.dim() == 2) return x;
  return torch::stable::reshape(x, {shape.m, shape.k});
}

// An uninitialised y [..., N] for x [..., K], by default of the dtype of x.
inline Tensor empty_output(const Tensor& x, int64_t n, std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return torch::stable::new_empty(x, sizes, type);
}

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// Runtime launch errors (bad configuration, no code for this GPU) as exceptions naming the op.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  FASTINFER_CHECK(op, error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// ---- launches of compute capability 9.0 -------------------------------------------------------------------------------

struct LaunchConfig {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
};

// Clusters of `ranks` blocks; `dependent` lets the kernel start before the previous one of the stream has finished.
inline void configure(LaunchConfig& out, int64_t blocks, int threads, int ranks, int smem_bytes, bool dependent,
                      cudaStream_t stream) {
  out.attributes[0].id = cudaLaunchAttributeClusterDimension;
  out.attributes[0].val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  out.attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  out.attributes[1].val.programmaticStreamSerializationAllowed = 1;
  out.config.gridDim = dim3(static_cast<unsigned>(blocks));
  out.config.blockDim = dim3(threads);
  out.config.dynamicSmemBytes = smem_bytes;
  out.config.stream = stream;
  out.config.attrs = out.attributes;
  out.config.numAttrs = dependent ? 2 : 1;
}

template <typename Args>
void launch_clusters(const char* op, void (*kernel)(Args), int64_t blocks, int threads, int ranks, int smem_bytes,
                     bool dependent, const Args& args, const LaunchContext& context) {
  FASTINFER_CHECK(op, blocks > 0 && blocks < (int64_t(1) << 31), "the matrices are too large: ", blocks, " blocks");
  LaunchConfig launch;
  configure(launch, blocks, threads, ranks, smem_bytes, dependent, context.stream());
  const cudaError_t error = cudaLaunchKernelEx(&launch.config, kernel, args);
  FASTINFER_CHECK(op, error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// How many clusters of the kernel run at once with `resident` blocks a multiprocessor, as many as it has room for; some
// multiprocessors fit no whole cluster, and a part of a GPU may have none that do: 0.
template <typename Args>
int possible_clusters(void (*kernel)(Args), int threads, int ranks, int smem_bytes, const LaunchContext& context,
                      int resident = 1) {
  const int limit = context.limits().multiprocessors * resident / ranks;
  if (ranks <= 2) return limit;
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;  // of kernel, device, ranks, shared memory
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key{reinterpret_cast<const void*>(kernel), context.device(), ranks, smem_bytes};
  auto found = known.find(key);
  if (found == known.end()) {
    int count = 0;
    LaunchConfig launch;
    configure(launch, ranks, threads, ranks, smem_bytes, false, nullptr);
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, context.limits().smem_per_block));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config));
    found = known.emplace(key, count).first;
  }
  return std::min(found->second, limit);
}
// The same, and at least one: where there is none the launch fails.
template <typename Args>
int resident_clusters(void (*kernel)(Args), int threads, int ranks, int smem_bytes, const LaunchContext& context,
                      int resident = 1) {
  return std::max(1, possible_clusters(kernel, threads, ranks, smem_bytes, context, resident));
}

}  // namespace fastinfer
