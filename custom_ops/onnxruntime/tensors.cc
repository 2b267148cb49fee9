#include "tensors.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "op.h"

namespace ibnorm::ort {

bool Shape::operator==(const Shape& other) const {
  return rank == other.rank && std::equal(dims, dims + std::min(rank, kMaxRank), other.dims);
}

void Shape::print(char* text, std::size_t size) const {
  std::size_t at = static_cast<std::size_t>(std::snprintf(text, size, "["));
  for (std::size_t i = 0; i < std::min(rank, kMaxRank) && at + 24 < size; ++i)
    at += static_cast<std::size_t>(
        std::snprintf(text + at, size - at, "%s%" PRId64, i == 0 ? "" : ", ", dims[i]));
  if (at + 2 < size) std::snprintf(text + at, size - at, "]");
}

OrtStatus* read_shape(const OrtApi& api, const OrtValue* value, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  IBNORM_TRY(api.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api.GetDimensionsCount(info, &shape->rank);
  if (status == nullptr) status = api.GetDimensions(info, shape->dims, std::min(shape->rank, kMaxRank));
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

#if ORT_API_VERSION >= 24
OrtStatus* read_shape_in_place(const OrtApi& api, const OrtValue* value, Shape* shape) {
  ONNXTensorElementDataType type;
  const std::int64_t* dims = nullptr;
  IBNORM_TRY(api.GetTensorElementTypeAndShapeDataReference(value, &type, &dims, &shape->rank));
  std::copy_n(dims, std::min(shape->rank, kMaxRank), shape->dims);
  return nullptr;
}
#endif

OrtStatus* read_data(const OrtApi& api, const OrtValue* value, const void** data) {
  // The C API has no const form at level 18.
  void* found = nullptr;
  IBNORM_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &found));
  *data = found;
  return nullptr;
}

}  // namespace ibnorm::ort
