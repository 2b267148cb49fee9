//! The operator's identity, a copy of ibnorm_export/op/spec.py. A test compares `kSchema` with SCHEMA there,
//! so that both change together.
#pragma once

namespace ibnorm {

inline constexpr const char* kDomain = "ai.ibnorm";
inline constexpr int kVersion = 1;

//! g in c = g((x - mean) / lambd).
enum class Compression : int {
  kLinear = 0,       //!< IBNormS: t
  kLogarithmic = 1,  //!< IBNormL: sign(t) * ln(1 + |t|)
  kTanh = 2,         //!< IBNormT: tanh(t)
};

inline constexpr const char* kSchema =
    R"({"domain":"ai.ibnorm","version":1,)"
    R"("ops":["IBNormS","IBNormL","IBNormT","SkipIBNormS","SkipIBNormL","SkipIBNormT"],)"
    R"("types":["float","float16","bfloat16"],)"
    R"("attributes":{"lambd":"float","epsilon":"float","axis":"int","plugin_namespace":"string"}})";

}  // namespace ibnorm
