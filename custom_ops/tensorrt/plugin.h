//! One IBNorm or SkipIBNorm layer of a TensorRT network.
#pragma once

#include <NvInferRuntime.h>

#include "fields.h"
#include "ibnorm/spec.h"

namespace ibnorm::tensorrt {

inline constexpr const char* kPluginVersion = "1";
inline constexpr int kOpTypeCount = 6;

//! The differences between the six op types.
struct OpType {
  const char* name;
  Compression compression;
  bool skip;

  //! Inputs are X, [skip,] scale, bias; outputs Y[, sum].
  std::int32_t scale_index() const { return skip ? 2 : 1; }
  std::int32_t inputs() const { return scale_index() + 2; }
  std::int32_t outputs() const { return skip ? 2 : 1; }
};

inline constexpr OpType kOpTypes[kOpTypeCount] = {
    {"IBNormS", Compression::kLinear, false},         {"IBNormL", Compression::kLogarithmic, false},
    {"IBNormT", Compression::kTanh, false},           {"SkipIBNormS", Compression::kLinear, true},
    {"SkipIBNormL", Compression::kLogarithmic, true}, {"SkipIBNormT", Compression::kTanh, true},
};

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  //! `op` must live as long as the process.
  Plugin(const OpType& op, const Attributes& attributes) noexcept;
  Plugin(const Plugin&) = delete;  // the serialised fields point into the object
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

  // -- while an engine is built
  std::int32_t getNbOutputs() const noexcept override { return op_.outputs(); }
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t output_count) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t input_count, std::int32_t output_count) noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t output_count,
                                  const nvinfer1::DataType* inputs,
                                  std::int32_t input_count) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                               nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  const char* getTimingCacheID() noexcept override { return op_.name; }

  // -- while it runs
  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                             const nvinfer1::PluginTensorDesc* outputs,
                             std::int32_t output_count) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                       const void* const* input_data, void* const* output_data, void* workspace,
                       cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  bool has_counts(std::int32_t inputs, std::int32_t outputs) const noexcept;

  const OpType& op_;
  const Attributes attributes_;
  nvinfer1::PluginField fields_[3];
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace ibnorm::tensorrt
