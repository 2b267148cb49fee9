//! The entry points of libibnorm_trt.so: IPluginV3 creators for the six op types.
//!
//! One binary works with TensorRT 10.0 to 11.x and TensorRT-RTX. It does not link libnvinfer, and does not
//! call virtual functions of ILogger, ILoggerFinder or IPluginRegistry, whose order changed in 11.0. The
//! plugin and creator interfaces and all structs have the same layout in all these versions.
#include <new>

#include "ibnorm/spec.h"
#include "plugin.h"

namespace ibnorm::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const OpType& op) noexcept : op_(op) {}

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Attributes attributes;
    if (!read_attributes(op_.name, fields, &attributes)) return nullptr;
    return new (std::nothrow) Plugin(op_, attributes);
  }

  //! The fields that the parser passes; it reads `plugin_namespace` itself.
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
    static const PluginField fields[] = {{"lambd", nullptr, PluginFieldType::kFLOAT32, 1},
                                         {"epsilon", nullptr, PluginFieldType::kFLOAT32, 1},
                                         {"axis", nullptr, PluginFieldType::kINT32, 1}};
    static const nvinfer1::PluginFieldCollection collection{3, fields};
    return &collection;
  }
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

 private:
  const OpType& op_;
};

}  // namespace
}  // namespace ibnorm::tensorrt

#define IBNORM_EXPORT extern "C" __attribute__((visibility("default")))

//! IPluginRegistry::loadLibrary calls this.
IBNORM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  using ibnorm::tensorrt::Creator;
  using ibnorm::tensorrt::kOpTypes;
  static Creator creators[] = {Creator(kOpTypes[0]), Creator(kOpTypes[1]), Creator(kOpTypes[2]),
                               Creator(kOpTypes[3]), Creator(kOpTypes[4]), Creator(kOpTypes[5])};
  static nvinfer1::IPluginCreatorInterface* const pointers[] = {&creators[0], &creators[1], &creators[2],
                                                                &creators[3], &creators[4], &creators[5]};
  count = ibnorm::tensorrt::kOpTypeCount;
  return pointers;
}

//! A loadable library must have this; the logger is not used (see fields.h).
IBNORM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

//! JSON, equal to ibnorm_export.op.spec.SCHEMA.
IBNORM_EXPORT const char* ibnorm_schema() noexcept { return ibnorm::kSchema; }
