// Helpers on torch's stable ABI that the CPU and the CUDA library share: checks that name op and argument, dtype switch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

namespace fastinfer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Before a function of C++ that kernels for GPUs call too.
#ifdef __CUDACC__
#define FASTINFER_BOTH __host__ __device__
#else
#define FASTINFER_BOTH
#endif

// The error text a user sees: "int8_matmul: w must be …".
#define FASTINFER_CHECK(op, condition, ...)                                            \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      throw std::runtime_error(std::string(op) + ": " + fastinfer::text(__VA_ARGS__)); \
    }                                                                                  \
  } while (0)

template <typename... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  ((out << args), ...);
  return out.str();
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// M, N, K of y[M, N] = x[M, K] · w[N, K]ᵀ; x may have any number of leading dimensions.
struct MatmulShape {
  int64_t m, n, k;
};

}  // namespace fastinfer
