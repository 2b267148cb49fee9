//! The custom-op library for ONNX Runtime: six op types and three data types.
//!
//! An op checks its inputs, describes them as an ibnorm::Problem, calls the kernels and translates their
//! status (node.cc). The library only needs the C API at level 18, so one binary works with ONNX Runtime 1.18
//! and later, whatever header it was built with. Nothing here throws.
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>

#include "ibnorm/kernels.h"
#include "ibnorm/spec.h"
#include "op.h"

namespace ibnorm::ort {
namespace {

constexpr std::uint32_t kApiLevel = 18;

//! The level that has what `read_shape_in_place` calls.
constexpr std::uint32_t kInPlaceLevel = 24;

//! The entry of a session's configuration that chooses the CPU kernels, for tests and reports of faults.
constexpr const char* kInstructionSetKey = "ibnorm.instruction_set";

constexpr Provider kProviders[] = {
    Provider::kCpu,
#ifdef IBNORM_CUDA
    Provider::kCuda,
#endif
};

// A half X goes with scale and bias of its own type or of float. All combinations are here, because ONNX
// Runtime cannot load a model if the library lacks a kernel for its types.
constexpr TypePair kTypes[] = {
    {DType::kFloat32, DType::kFloat32},  {DType::kFloat16, DType::kFloat16},
    {DType::kFloat16, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat32},
};

constexpr Compression kCompressions[] = {Compression::kLinear, Compression::kLogarithmic, Compression::kTanh};

constexpr std::size_t kOpCount = std::size(kProviders) * std::size(kTypes) * 6;

ONNXTensorElementDataType element_type(DType type) {
  switch (type) {
    case DType::kFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

// -- description -------------------------------------------------------------------------------

OrtStatus* infer_shape(const OrtCustomOp* custom, OrtShapeInferContext* context) noexcept {
  const OrtApi& api = *as_op(custom).api;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  IBNORM_TRY(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  // A shape without axes means that the shape is unknown; passed on, it would make the output a scalar.
  std::size_t axes = 0;
  IBNORM_TRY(api.GetDimensionsCount(info, &axes));
  if (axes == 0) return nullptr;
  // Only output 0: ONNX Runtime before 1.21 ends the process if the shape of an unconnected output is set.
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
}

//! Y may share the buffer of X.
std::size_t plain_in_place(int** input, int** output) noexcept {
  static int zero[] = {0};
  *input = zero;
  *output = zero;
  return 1;
}

//! Y may share the buffer of X, and sum that of skip.
std::size_t skip_in_place(int** input, int** output) noexcept {
  static int both[] = {0, 1};
  *input = both;
  *output = both;
  return 2;
}

void describe(Op& op) {
  op.version = kApiLevel;
  op.GetName = [](const OrtCustomOp* o) noexcept { return as_op(o).type_name(); };
  op.GetExecutionProviderType = [](const OrtCustomOp* o) noexcept {
    return as_op(o).provider == Provider::kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const OrtCustomOp* o) noexcept -> std::size_t {
    return as_op(o).scale_index() + 2;
  };
  op.GetInputType = [](const OrtCustomOp* o, std::size_t index) noexcept {
    return element_type(index < as_op(o).scale_index() ? as_op(o).types.data : as_op(o).types.affine);
  };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) noexcept -> std::size_t { return as_op(o).skip ? 2 : 1; };
  op.GetOutputType = [](const OrtCustomOp* o, std::size_t) noexcept {
    return element_type(as_op(o).types.data);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) noexcept { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t index) noexcept {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) noexcept { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) noexcept { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) noexcept { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) noexcept { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) noexcept { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) noexcept { return ibnorm::kVersion; };
  op.GetEndVersion = [](const OrtCustomOp*) noexcept { return ibnorm::kVersion; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy;
  op.InferOutputShapeFn = infer_shape;
  op.GetMayInplace = op.skip ? skip_in_place : plain_in_place;
  op.ReleaseMayInplace = [](int*, int*) noexcept {};
}

//! Everything that sessions keep pointers to. There is one for each ONNX Runtime in the process and each
//! instruction set, and it lives as long as the process.
struct Library {
  Library* next;
  const OrtApi* api;
  cpu::InstructionSet instructions;
  OrtCustomOpDomain* domain;
  Op ops[kOpCount];
};

//! The level of the C API to ask for. Asking an ONNX Runtime for a level that it does not have would make it
//! print an error. Its version is for example "1.24.1".
std::uint32_t api_level(const char* version) {
  const bool known = std::strncmp(version, "1.", 2) == 0;
  const bool newer = known && std::strtoul(version + 2, nullptr, 10) >= kInPlaceLevel;
  return newer && ORT_API_VERSION >= kInPlaceLevel ? kInPlaceLevel : kApiLevel;
}

ReadShape shape_reader([[maybe_unused]] std::uint32_t level) {
#if ORT_API_VERSION >= 24
  if (level >= kInPlaceLevel) return read_shape_in_place;
#endif
  return read_shape;
}

OrtStatus* build(const OrtApi& api, ReadShape reader, cpu::InstructionSet instructions, Library* library) {
  library->api = &api;
  library->instructions = instructions;
  IBNORM_TRY(api.CreateCustomOpDomain(ibnorm::kDomain, &library->domain));
  std::size_t next = 0;
  for (const Provider provider : kProviders)
    for (const bool skip : {false, true})
      for (const Compression compression : kCompressions)
        for (const TypePair& types : kTypes) {
          Op& op = library->ops[next++];
          op.api = &api;
          op.skip = skip;
          op.provider = provider;
          op.compression = compression;
          op.types = types;
          op.instructions = instructions;
          op.read_shape = reader;
          describe(op);
          IBNORM_TRY(api.CustomOpDomain_Add(library->domain, &op));
        }
  return nullptr;
}

//! The instruction set that the session's configuration names; the widest if it names none.
OrtStatus* read_instruction_set(const OrtApi& api, const OrtSessionOptions* options,
                                cpu::InstructionSet* set) {
  *set = cpu::widest();
  int given = 0;
  IBNORM_TRY(api.HasSessionConfigEntry(options, kInstructionSetKey, &given));
  if (given == 0) return nullptr;
  char wanted[16] = {};
  std::size_t size = sizeof wanted;
  if (OrtStatus* status = api.GetSessionConfigEntry(options, kInstructionSetKey, wanted, &size)) {
    api.ReleaseStatus(status);  // longer than any name
    wanted[0] = '\0';
  }
  char legal[64] = {};
  for (const cpu::InstructionSet known : cpu::kInstructionSets) {
    if (!cpu::has(known)) continue;
    const char* name = cpu::name(known);
    if (std::strcmp(wanted, name) == 0) {
      *set = known;
      return nullptr;
    }
    const std::size_t used = std::strlen(legal);
    std::snprintf(legal + used, sizeof legal - used, "%s%s", used == 0 ? "" : ", ", name);
  }
  char text[200];
  std::snprintf(text, sizeof text, "%s is '%s'; this machine has %s", kInstructionSetKey, wanted, legal);
  return api.CreateStatus(ORT_INVALID_ARGUMENT, text);
}

}  // namespace

#define IBNORM_EXPORT extern "C" __attribute__((visibility("default")))

IBNORM_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                        const OrtApiBase* base) noexcept {
  const std::uint32_t level = api_level(base->GetVersionString());
  const OrtApi* api = base->GetApi(level);
  if (api == nullptr) {
    // Without the API no status can be made; the runtime has logged the reason.
    std::fprintf(stderr, "ibnorm: ONNX Runtime %s is too old; 1.18 is the oldest\n",
                 base->GetVersionString());
    return nullptr;
  }
  cpu::InstructionSet instructions;
  IBNORM_TRY(read_instruction_set(*api, options, &instructions));
  static std::mutex guard;
  static Library* libraries = nullptr;
  const std::lock_guard<std::mutex> lock(guard);
  Library* library = libraries;
  while (library != nullptr && (library->api != api || library->instructions != instructions))
    library = library->next;
  if (library == nullptr) {
    library = new (std::nothrow) Library{};
    if (library == nullptr) return api->CreateStatus(ORT_FAIL, "IBNorm: out of memory");
    if (OrtStatus* status = build(*api, shape_reader(level), instructions, library)) {
      if (library->domain != nullptr) api->ReleaseCustomOpDomain(library->domain);
      delete library;
      return status;
    }
    library->next = libraries;
    libraries = library;
  }
  return api->AddCustomOpDomain(options, library->domain);
}

//! JSON, equal to ibnorm_export.op.spec.SCHEMA.
IBNORM_EXPORT const char* ibnorm_schema() noexcept { return ibnorm::kSchema; }

//! JSON: the execution providers of this binary, and the CPU kernels that this machine runs.
IBNORM_EXPORT const char* ibnorm_build() noexcept {
  static char text[128] = {};
  static const bool written = [] {
    std::snprintf(text, sizeof text, R"({"providers":["cpu"%s],"instruction_set":"%s"})",
                  std::size(kProviders) > 1 ? R"(,"cuda")" : "", cpu::name(cpu::widest()));
    return true;
  }();
  (void)written;
  return text;
}

}  // namespace ibnorm::ort
