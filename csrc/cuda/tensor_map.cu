#include "cuda/tensor_map.cuh"

namespace fastinfer {

// The driver's function, found at run time: the library does not link against the driver.
static auto encode_tiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return function;
}

// A matrix of `rows` × `columns` elements in boxes of box_rows × box_columns.
static CUtensorMap encode(const char* op, CUtensorMapDataType type, int bytes, const void* data, int64_t rows,
                          int64_t columns, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  const auto function = encode_tiled();
  FASTINFER_CHECK(op, function != nullptr, "needs a driver with cuTensorMapEncodeTiled (CUDA 12)");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns * bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      function(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FASTINFER_CHECK(op, result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(result));
  return map;
}

CUtensorMap token_map(const char* op, const Tensor& x, int tokens) {
  const int bytes = static_cast<int>(x.element_size());
  const auto type = bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(op, type, bytes, x.const_data_ptr(), x.size(0), x.size(1), tokens, 128 / bytes,
                CU_TENSOR_MAP_SWIZZLE_128B);
}

CUtensorMap weight_map(const char* op, const void* w, int row_tiles, int blocks, int piece_bytes) {
  return encode(op, CU_TENSOR_MAP_DATA_TYPE_INT64, 8, w, row_tiles, int64_t(blocks) * piece_bytes / 8, 4,
                piece_bytes / 8, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace fastinfer
