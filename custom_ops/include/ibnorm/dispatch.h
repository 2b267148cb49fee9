//! Turning run-time values into template arguments, with one switch for each enumeration.
#pragma once

#include <type_traits>
#include <utility>

#include "ibnorm/problem.h"

namespace ibnorm {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

//! Calls visit(Constant<type>). For an unknown type it calls otherwise("type", its number), so that an error
//! message can name the value.
template <typename Visit, typename Otherwise>
auto dispatch_type(DType type, Visit&& visit, Otherwise&& otherwise) {
  switch (type) {
    case DType::kFloat32:
      return visit(Constant<DType::kFloat32>{});
    case DType::kFloat16:
      return visit(Constant<DType::kFloat16>{});
    case DType::kBFloat16:
      return visit(Constant<DType::kBFloat16>{});
  }
  return otherwise("type", static_cast<int>(type));
}

//! Calls visit(Constant<compression>), or otherwise("compression", its number).
template <typename Visit, typename Otherwise>
auto dispatch_compression(Compression compression, Visit&& visit, Otherwise&& otherwise) {
  switch (compression) {
    case Compression::kLinear:
      return visit(Constant<Compression::kLinear>{});
    case Compression::kLogarithmic:
      return visit(Constant<Compression::kLogarithmic>{});
    case Compression::kTanh:
      return visit(Constant<Compression::kTanh>{});
  }
  return otherwise("compression", static_cast<int>(compression));
}

//! Calls visit(std::true_type) or visit(std::false_type).
template <typename Visit>
auto dispatch_flag(bool flag, Visit&& visit) {
  return flag ? visit(std::true_type{}) : visit(std::false_type{});
}

}  // namespace ibnorm
