//! Reading the attributes of a node from the fields that TensorRT's parser passes to a creator.
#pragma once

#include <NvInferRuntime.h>

namespace ibnorm::tensorrt {

struct Attributes {
  float lambd = 0.0F;
  float epsilon = 0.0F;
  std::int32_t axis = -1;
};

//! Reads lambd, epsilon and axis; axis may be absent and must be -1. Returns false if a field is missing,
//! repeated, unknown or not legal, after one line on stderr that names the field, its value and the legal
//! values.
//!
//! It does not use TensorRT's logger, because the order of ILogger's virtual functions changed in
//! TensorRT 11.
bool read_attributes(const char* op_type, const nvinfer1::PluginFieldCollection* fields,
                     Attributes* attributes) noexcept;

}  // namespace ibnorm::tensorrt
