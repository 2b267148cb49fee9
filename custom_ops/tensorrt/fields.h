//! The attributes of one node, read from the fields that TensorRT's parser hands to a creator.
#pragma once

#include <NvInferRuntime.h>

namespace ibnorm::tensorrt {

struct Attributes {
  float lambd = 0.0F;
  float epsilon = 0.0F;
  std::int32_t axis = -1;
};

//! Reads lambd, epsilon and axis (absent: -1, its one legal value). False, with one line on stderr that
//! names the field, its value and what is legal, where a field is missing, repeated, unknown or bad.
//!
//! stderr and not TensorRT's logger: the virtual functions of ILogger changed places in TensorRT 11.
bool read_attributes(const char* op_type, const nvinfer1::PluginFieldCollection* fields,
                     Attributes* attributes) noexcept;

}  // namespace ibnorm::tensorrt
