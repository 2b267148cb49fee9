#include "plugin.h"

#include <cstdio>
#include <new>

#include "ibnorm/kernels.h"
#include "ibnorm/problem.h"

namespace ibnorm::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = 1;

bool is_supported(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

DType dtype_of(DataType type) {
  return type == DataType::kHALF   ? DType::kFloat16
         : type == DataType::kBF16 ? DType::kBFloat16
                                   : DType::kFloat32;
}

std::int64_t last(const nvinfer1::Dims& dims) { return dims.d[dims.nbDims - 1]; }

bool equal(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
  if (a.nbDims != b.nbDims) return false;
  for (std::int32_t i = 0; i < a.nbDims; ++i)
    if (a.d[i] != b.d[i]) return false;
  return true;
}

std::int32_t refuse(const OpType& op, const char* what) {
  std::fprintf(stderr, "ibnorm: %s plugin: %s\n", op.name, what);
  return kFailure;
}

}  // namespace

Plugin::Plugin(const OpType& op, const Attributes& attributes) noexcept
    : op_(op),
      attributes_(attributes),
      fields_{{"lambd", &attributes_.lambd, PluginFieldType::kFLOAT32, 1},
              {"epsilon", &attributes_.epsilon, PluginFieldType::kFLOAT32, 1},
              {"axis", &attributes_.axis, PluginFieldType::kINT32, 1}},
      collection_{3, fields_} {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept { return new (std::nothrow) Plugin(op_, attributes_); }

//! The plugin has no state of a context, so each context gets a copy.
nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

bool Plugin::has_counts(std::int32_t inputs, std::int32_t outputs) const noexcept {
  return inputs == op_.inputs() && outputs == op_.outputs();
}

std::int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc*, std::int32_t input_count,
                                     const DynamicPluginTensorDesc*, std::int32_t output_count) noexcept {
  if (has_counts(input_count, output_count)) return kSuccess;
  return refuse(op_, "scale and bias (and skip) must all be connected, and every output");
}

//! X has one of three types, scale and bias have the type of X or float, and the others have the type of X.
//! Rows are contiguous. TensorRT asks for one position after the other, when all earlier ones are decided.
bool Plugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                       std::int32_t input_count, std::int32_t output_count) noexcept {
  if (!has_counts(input_count, output_count) || position < 0 || position >= input_count + output_count)
    return false;
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const DataType type = tensors[0].desc.type;
  const std::int32_t scale = op_.scale_index();
  if (position == 0) return is_supported(type);
  if (position == scale) return tensor.type == type || tensor.type == DataType::kFLOAT;
  if (position == scale + 1) return tensor.type == tensors[scale].desc.type;
  return tensor.type == type;
}

std::int32_t Plugin::getOutputDataTypes(DataType* outputs, std::int32_t output_count, const DataType* inputs,
                                        std::int32_t input_count) const noexcept {
  if (!has_counts(input_count, output_count)) return kFailure;
  for (std::int32_t i = 0; i < output_count; ++i) outputs[i] = inputs[0];
  return kSuccess;
}

std::int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                                     const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* outputs,
                                     std::int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  if (!has_counts(input_count, output_count) || inputs[0].nbDims < 1) return kFailure;
  for (std::int32_t i = 0; i < output_count; ++i) outputs[i] = inputs[0];
  return kSuccess;
}

std::int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, std::int32_t input_count,
                                   const PluginTensorDesc*, std::int32_t output_count) noexcept {
  if (!has_counts(input_count, output_count)) return refuse(op_, "an input or an output is not connected");
  const nvinfer1::Dims& shape = inputs[0].dims;
  if (shape.nbDims < 1) return refuse(op_, "X is a scalar; it needs at least one axis");
  if (op_.skip && !equal(inputs[1].dims, shape)) return refuse(op_, "skip must have the shape of X");
  for (std::int32_t i = op_.scale_index(); i < input_count; ++i)
    if (inputs[i].dims.nbDims != 1 || inputs[i].dims.d[0] != last(shape))
      return refuse(op_, "scale and bias must each be a vector as long as the last axis of X");
  return kSuccess;
}

std::int32_t Plugin::enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*,
                             const void* const* input_data, void* const* output_data, void*,
                             cudaStream_t stream) noexcept {
  const nvinfer1::Dims& shape = inputs[0].dims;
  const std::int32_t scale = op_.scale_index();
  Problem problem;
  problem.cols = last(shape);
  problem.rows = 1;
  for (std::int32_t i = 0; i + 1 < shape.nbDims; ++i) problem.rows *= shape.d[i];
  problem.x = input_data[0];
  problem.skip = op_.skip ? input_data[1] : nullptr;
  problem.scale = input_data[scale];
  problem.bias = input_data[scale + 1];
  problem.y = output_data[0];
  problem.sum = op_.skip ? output_data[1] : nullptr;
  problem.type = dtype_of(inputs[0].type);
  problem.affine_type = dtype_of(inputs[scale].type);
  problem.compression = op_.compression;
  problem.lambd = attributes_.lambd;
  problem.epsilon = attributes_.epsilon;
  switch (cuda::run(problem, stream)) {
    case Status::kOk:
      return kSuccess;
    case Status::kUnsupported:
      return refuse(op_, "this library holds no kernel for the device");
    case Status::kLaunchFailed:
      return refuse(op_, "the device refused the launch");
    case Status::kInvalidArgument:
      break;
  }
  return refuse(op_, "the kernel refused the shapes or types");
}

}  // namespace ibnorm::tensorrt
