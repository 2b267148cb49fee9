#include "fields.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace ibnorm::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

__attribute__((format(printf, 2, 3))) bool refuse(const char* op_type, const char* format, ...) {
  char what[240];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "ibnorm: %s plugin: %s\n", op_type, what);
  return false;
}

template <typename T>
T read(const PluginField& field) {
  T value;
  std::memcpy(&value, field.data, sizeof value);  // the data of a field may not be aligned
  return value;
}

bool read_float(const char* op_type, const PluginField& field, float* value) {
  if (field.type == PluginFieldType::kFLOAT32) {
    *value = read<float>(field);
  } else if (field.type == PluginFieldType::kFLOAT64) {
    *value = static_cast<float>(read<double>(field));
  } else {
    return refuse(op_type, "field '%s' has type %d; it must be kFLOAT32 (%d) or kFLOAT64 (%d)", field.name,
                  static_cast<int>(field.type), static_cast<int>(PluginFieldType::kFLOAT32),
                  static_cast<int>(PluginFieldType::kFLOAT64));
  }
  return true;
}

bool read_axis(const char* op_type, const PluginField& field, std::int32_t* axis) {
  std::int64_t value = 0;
  if (field.type == PluginFieldType::kINT32) {
    value = read<std::int32_t>(field);
  } else if (field.type == PluginFieldType::kINT64) {
    value = read<std::int64_t>(field);
  } else {
    return refuse(op_type, "field 'axis' has type %d; it must be kINT32 (%d) or kINT64 (%d)",
                  static_cast<int>(field.type), static_cast<int>(PluginFieldType::kINT32),
                  static_cast<int>(PluginFieldType::kINT64));
  }
  if (value != -1)
    return refuse(op_type, "axis is %" PRId64 "; version 1 of the operator accepts only -1", value);
  *axis = -1;
  return true;
}

//! Strings from ONNX end with NUL; others may not.
bool is_empty_text(const PluginField& field) {
  return field.type == PluginFieldType::kCHAR &&
         (field.length == 0 || (field.data != nullptr && *static_cast<const char*>(field.data) == '\0'));
}

enum Seen : unsigned { kLambd = 1, kEpsilon = 2, kAxis = 4, kNamespace = 8 };

}  // namespace

bool read_attributes(const char* op_type, const nvinfer1::PluginFieldCollection* fields,
                     Attributes* attributes) noexcept {
  unsigned seen = 0;
  const std::int32_t count = fields == nullptr ? 0 : fields->nbFields;
  for (std::int32_t i = 0; i < count; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.name == nullptr) return refuse(op_type, "field %" PRId32 " has no name", i);
    const auto is = [&](const char* name) { return std::strcmp(field.name, name) == 0; };
    const unsigned which = is("lambd")              ? kLambd
                           : is("epsilon")          ? kEpsilon
                           : is("axis")             ? kAxis
                           : is("plugin_namespace") ? kNamespace
                                                    : 0U;
    if (which == 0)
      return refuse(op_type, "there is no field '%.60s'; there are lambd, epsilon and axis", field.name);
    if ((seen & which) != 0) return refuse(op_type, "field '%s' is there twice", field.name);
    seen |= which;
    if (which == kNamespace) {
      if (!is_empty_text(field))
        return refuse(op_type, "field 'plugin_namespace' must be the empty string (kCHAR)");
      continue;
    }
    if (field.data == nullptr || field.length != 1)
      return refuse(op_type, "field '%s' has length %" PRId32 "; it must be one number", field.name,
                    field.length);
    const bool good =
        which == kAxis
            ? read_axis(op_type, field, &attributes->axis)
            : read_float(op_type, field, which == kLambd ? &attributes->lambd : &attributes->epsilon);
    if (!good) return false;
  }
  if ((seen & kLambd) == 0 || (seen & kEpsilon) == 0)
    return refuse(op_type, "field '%s' is missing; every node must spell out lambd, epsilon and axis",
                  (seen & kLambd) == 0 ? "lambd" : "epsilon");

  constexpr float kSmallest = 1.17549435e-38F;
  constexpr float kLargest = 3.402823466e+38F;
  if (!(attributes->lambd >= kSmallest && attributes->lambd <= kLargest))
    return refuse(op_type, "lambd is %g; it must be finite and at least %g", attributes->lambd, kSmallest);
  if (!(attributes->epsilon >= 0.0F && attributes->epsilon <= kLargest))
    return refuse(op_type, "epsilon is %g; it must be finite and not negative", attributes->epsilon);
  return true;
}

}  // namespace ibnorm::tensorrt
