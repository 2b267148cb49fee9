//! The custom-op library for ONNX Runtime: six op types and three data types.
//!
//! An op checks its inputs, describes them as an ibnorm::Problem, calls the kernels and translates their
//! status. The library only uses the C API at level 18, so one binary works with ONNX Runtime 1.18 and later,
//! whatever header it was built with. Nothing here throws.
#include <onnxruntime_c_api.h>

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <mutex>
#include <new>

#include "ibnorm/kernels.h"
#include "ibnorm/problem.h"
#include "ibnorm/spec.h"

namespace {

using ibnorm::Compression;
using ibnorm::DType;
using ibnorm::Problem;
using ibnorm::Status;
using ibnorm::cpu::InstructionSet;

constexpr std::uint32_t kApiLevel = 18;
constexpr std::size_t kMaxRank = 32;

//! Below this number of elements, waking a second thread costs more than it saves.
constexpr std::int64_t kSerialElements = 16384;
//! Elements that a thread takes at a time: enough to hide the cost, few enough to balance the threads.
constexpr std::int64_t kChunkElements = 131072;

//! The entry of a session's configuration that chooses the CPU kernels, for tests and reports of faults.
constexpr const char* kInstructionSetKey = "ibnorm.instruction_set";

enum class Provider { kCpu, kCuda };

constexpr Provider kProviders[] = {
    Provider::kCpu,
#ifdef IBNORM_CUDA
    Provider::kCuda,
#endif
};

struct TypePair {
  DType data;
  DType affine;
};
// A half X goes with scale and bias of its own type or of float. All combinations are here, because ONNX
// Runtime cannot load a model if the library lacks a kernel for its types.
constexpr TypePair kTypes[] = {
    {DType::kFloat32, DType::kFloat32},  {DType::kFloat16, DType::kFloat16},
    {DType::kFloat16, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat32},
};

constexpr const char* kNames[2][3] = {{"IBNormS", "IBNormL", "IBNormT"},
                                      {"SkipIBNormS", "SkipIBNormL", "SkipIBNormT"}};
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

struct Op : OrtCustomOp {
  const OrtApi* api;
  bool skip;
  Provider provider;
  Compression compression;
  TypePair types;
  InstructionSet instructions;

  const char* type_name() const { return kNames[skip ? 1 : 0][static_cast<int>(compression)]; }
  std::size_t scale_index() const { return skip ? 2 : 1; }
};

const Op& as_op(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

//! One node of a model.
struct Node {
  const Op* op;
  float lambd;
  float epsilon;
  // Lengths of scale and bias if they are constants of the model, so that they are checked once; -1
  // otherwise.
  std::int64_t constant_scale;
  std::int64_t constant_bias;
  char name[160];
};

//! Returns from the function with the status of a call that fails.
#define IBNORM_TRY(call)                           \
  do {                                             \
    if (OrtStatus* status = (call)) return status; \
  } while (false)

__attribute__((format(printf, 4, 5)))
OrtStatus* fail(const OrtApi& api, const char* node, const char* op_type, const char* format, ...) {
  char what[320];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  char text[640];
  std::snprintf(text, sizeof text, "%s node '%s': %s", op_type, node, what);
  return api.CreateStatus(ORT_INVALID_ARGUMENT, text);
}

//! Writes dims as "[2, 3]".
void print_shape(const std::int64_t* dims, std::size_t rank, char* text, std::size_t size) {
  std::size_t at = static_cast<std::size_t>(std::snprintf(text, size, "["));
  for (std::size_t i = 0; i < rank && at + 24 < size; ++i)
    at += static_cast<std::size_t>(
        std::snprintf(text + at, size - at, "%s%" PRId64, i == 0 ? "" : ", ", dims[i]));
  if (at + 2 < size) std::snprintf(text + at, size - at, "]");
}

struct Shape {
  std::int64_t dims[kMaxRank];
  std::size_t rank;
};

OrtStatus* read_shape(const OrtApi& api, const OrtValue* value, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  IBNORM_TRY(api.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api.GetDimensionsCount(info, &shape->rank);
  // A higher rank is always an error; the message shows the first dimensions.
  if (status == nullptr)
    status = api.GetDimensions(info, shape->dims, shape->rank < kMaxRank ? shape->rank : kMaxRank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

OrtStatus* read_data(const OrtApi& api, const OrtValue* value, void** data) {
  // The C API has no const form at level 18.
  return api.GetTensorMutableData(const_cast<OrtValue*>(value), data);
}

bool equal(const Shape& a, const Shape& b) {
  if (a.rank != b.rank) return false;
  for (std::size_t i = 0; i < a.rank; ++i)
    if (a.dims[i] != b.dims[i]) return false;
  return true;
}

OrtStatus* wrong_length(const OrtApi& api, const Node& node, const char* which, const Shape& shape,
                        std::int64_t cols) {
  char text[200];
  print_shape(shape.dims, shape.rank <= kMaxRank ? shape.rank : kMaxRank, text, sizeof text);
  return fail(api, node.name, node.op->type_name(),
              "%s has shape %s; it must be [%" PRId64 "], the length of the last axis of X", which, text,
              cols);
}

// -- creation ----------------------------------------------------------------------------------

OrtStatus* missing(const OrtApi& api, const Node& node, OrtStatus* cause, const char* attribute,
                   const char* type) {
  api.ReleaseStatus(cause);
  return fail(api, node.name, node.op->type_name(),
              "attribute '%s' is missing or not of type %s; every node must spell out lambd (float), epsilon "
              "(float) and "
              "axis (int)",
              attribute, type);
}

std::int64_t constant_length(const OrtApi& api, const OrtKernelInfo* info, std::size_t index) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Shape shape;
  OrtStatus* status = api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value);
  if (status == nullptr && is_constant != 0 && value != nullptr) {
    status = read_shape(api, value, &shape);
    if (status == nullptr && shape.rank == 1) return shape.dims[0];
  }
  if (status != nullptr) api.ReleaseStatus(status);
  return -1;  // not a constant vector: checked when the node runs
}

OrtStatus* configure(const Op& op, const OrtApi& api, const OrtKernelInfo* info, Node* node) {
  node->op = &op;
  std::size_t size = sizeof node->name;
  if (OrtStatus* status = api.KernelInfo_GetNodeName(info, node->name, &size)) {
    api.ReleaseStatus(status);  // the name is longer than the buffer; the node works without it
    std::snprintf(node->name, sizeof node->name, "(name too long)");
  }
  const char* type = op.type_name();

  if (OrtStatus* s = api.KernelInfoGetAttribute_float(info, "lambd", &node->lambd))
    return missing(api, *node, s, "lambd", "float");
  if (OrtStatus* s = api.KernelInfoGetAttribute_float(info, "epsilon", &node->epsilon))
    return missing(api, *node, s, "epsilon", "float");
  std::int64_t axis = 0;
  if (OrtStatus* s = api.KernelInfoGetAttribute_int64(info, "axis", &axis))
    return missing(api, *node, s, "axis", "int");

  constexpr float kSmallest = 1.17549435e-38F;
  constexpr float kLargest = 3.402823466e+38F;
  if (!(node->lambd >= kSmallest && node->lambd <= kLargest))
    return fail(api, node->name, type, "lambd is %g; it must be finite and at least %g", node->lambd,
                kSmallest);
  if (!(node->epsilon >= 0.0F && node->epsilon <= kLargest))
    return fail(api, node->name, type, "epsilon is %g; it must be finite and not negative", node->epsilon);
  if (axis != -1)
    return fail(api, node->name, type, "axis is %" PRId64 "; version 1 of the operator accepts only -1",
                axis);

  node->constant_scale = constant_length(api, info, op.scale_index());
  node->constant_bias = constant_length(api, info, op.scale_index() + 1);
  return nullptr;
}

OrtStatus* create(const OrtCustomOp* custom, const OrtApi*, const OrtKernelInfo* info,
                  void** kernel) noexcept {
  const Op& op = as_op(custom);
  const OrtApi& api = *op.api;
  Node* node = new (std::nothrow) Node{};
  if (node == nullptr) return api.CreateStatus(ORT_FAIL, "IBNorm: out of memory");
  if (OrtStatus* status = configure(op, api, info, node)) {
    delete node;
    return status;
  }
  *kernel = node;
  return nullptr;
}

void destroy(void* kernel) noexcept { delete static_cast<Node*>(kernel); }

// -- running -----------------------------------------------------------------------------------

struct Split {
  InstructionSet instructions;
  const Problem* problem;
  std::int64_t chunks;
};

void run_chunk(void* data, std::size_t index) noexcept {
  const Split& split = *static_cast<const Split*>(data);
  const std::int64_t rows = split.problem->rows;
  const auto chunk = static_cast<std::int64_t>(index);
  // `compute` has checked the problem, so the kernels accept it.
  ibnorm::cpu::run(split.instructions, *split.problem, rows * chunk / split.chunks,
                   rows * (chunk + 1) / split.chunks);
}

OrtStatus* run_cpu(const OrtApi& api, const Node& node, OrtKernelContext* context, const Problem& problem) {
  const std::int64_t elements = problem.rows * problem.cols;
  if (elements <= kSerialElements || problem.rows == 1) {
    const Status status = ibnorm::cpu::run(node.op->instructions, problem, 0, problem.rows);
    if (status == Status::kOk) return nullptr;
    return fail(api, node.name, node.op->type_name(), "the CPU kernel refused the problem (status %d)",
                static_cast<int>(status));
  }
  Split split{node.op->instructions, &problem, (elements + kChunkElements - 1) / kChunkElements};
  if (split.chunks < 4) split.chunks = 4;
  if (split.chunks > problem.rows) split.chunks = problem.rows;
  const auto count = static_cast<std::size_t>(split.chunks);
  return api.KernelContext_ParallelFor(context, run_chunk, count, count, &split);
}

#ifdef IBNORM_CUDA
OrtStatus* run_cuda(const OrtApi& api, const Node& node, OrtKernelContext* context, const Problem& problem) {
  void* stream = nullptr;
  IBNORM_TRY(api.KernelContext_GetGPUComputeStream(context, &stream));
  const Status status = ibnorm::cuda::run(problem, stream);
  if (status == Status::kOk) return nullptr;
  return fail(api, node.name, node.op->type_name(), "the CUDA kernel did not start (status %d): %s",
              static_cast<int>(status),
              status == Status::kUnsupported ? "this library holds no kernel for the device"
                                             : "the device refused the launch");
}
#endif

OrtStatus* check_length(const OrtApi& api, const Node& node, const OrtValue* value, const char* which,
                        std::int64_t constant, std::int64_t cols) {
  if (constant == cols) return nullptr;
  Shape shape;
  IBNORM_TRY(read_shape(api, value, &shape));
  if (shape.rank == 1 && shape.dims[0] == cols) return nullptr;
  return wrong_length(api, node, which, shape, cols);
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) noexcept {
  const Node& node = *static_cast<const Node*>(kernel);
  const Op& op = *node.op;
  const OrtApi& api = *op.api;

  const OrtValue* x = nullptr;
  const OrtValue* scale = nullptr;
  const OrtValue* bias = nullptr;
  IBNORM_TRY(api.KernelContext_GetInput(context, 0, &x));
  IBNORM_TRY(api.KernelContext_GetInput(context, op.scale_index(), &scale));
  IBNORM_TRY(api.KernelContext_GetInput(context, op.scale_index() + 1, &bias));
  if (x == nullptr || scale == nullptr || bias == nullptr)
    return fail(api, node.name, op.type_name(), "an input is not connected; X, %sscale and bias must all be",
                op.skip ? "skip, " : "");

  Shape shape;
  IBNORM_TRY(read_shape(api, x, &shape));
  if (shape.rank == 0 || shape.rank > kMaxRank)
    return fail(api, node.name, op.type_name(), "X has rank %zu; it must be 1 to %zu", shape.rank, kMaxRank);
  Problem problem;
  problem.cols = shape.dims[shape.rank - 1];
  problem.rows = 1;
  for (std::size_t i = 0; i + 1 < shape.rank; ++i) problem.rows *= shape.dims[i];
  IBNORM_TRY(check_length(api, node, scale, "scale", node.constant_scale, problem.cols));
  IBNORM_TRY(check_length(api, node, bias, "bias", node.constant_bias, problem.cols));

  void* data = nullptr;
  if (op.skip) {
    const OrtValue* skip = nullptr;
    IBNORM_TRY(api.KernelContext_GetInput(context, 1, &skip));
    if (skip == nullptr) return fail(api, node.name, op.type_name(), "skip is not connected; it must be");
    Shape skip_shape;
    IBNORM_TRY(read_shape(api, skip, &skip_shape));
    if (!equal(shape, skip_shape)) {
      char found[200];
      char wanted[200];
      print_shape(skip_shape.dims, skip_shape.rank <= kMaxRank ? skip_shape.rank : kMaxRank, found,
                  sizeof found);
      print_shape(shape.dims, shape.rank, wanted, sizeof wanted);
      return fail(api, node.name, op.type_name(), "skip has shape %.100s; it must be that of X, %.100s",
                  found, wanted);
    }
    IBNORM_TRY(read_data(api, skip, &data));
    problem.skip = data;
  }

  OrtValue* y = nullptr;
  IBNORM_TRY(api.KernelContext_GetOutput(context, 0, shape.dims, shape.rank, &y));
  if (op.skip) {
    std::size_t outputs = 0;
    IBNORM_TRY(api.KernelContext_GetOutputCount(context, &outputs));
    OrtValue* sum = nullptr;
    if (outputs > 1) IBNORM_TRY(api.KernelContext_GetOutput(context, 1, shape.dims, shape.rank, &sum));
    if (sum != nullptr) IBNORM_TRY(api.GetTensorMutableData(sum, &problem.sum));
  }
  if (y == nullptr) return nullptr;
  if (problem.rows == 0 || problem.cols == 0) return nullptr;

  IBNORM_TRY(read_data(api, x, &data));
  problem.x = data;
  IBNORM_TRY(read_data(api, scale, &data));
  problem.scale = data;
  IBNORM_TRY(read_data(api, bias, &data));
  problem.bias = data;
  IBNORM_TRY(api.GetTensorMutableData(y, &problem.y));
  problem.type = op.types.data;
  problem.affine_type = op.types.affine;
  problem.compression = op.compression;
  problem.lambd = node.lambd;
  problem.epsilon = node.epsilon;
#ifdef IBNORM_CUDA
  if (op.provider == Provider::kCuda) return run_cuda(api, node, context, problem);
#endif
  return run_cpu(api, node, context, problem);
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
  InstructionSet instructions;
  OrtCustomOpDomain* domain;
  Op ops[kOpCount];
};

OrtStatus* build(const OrtApi& api, InstructionSet instructions, Library* library) {
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
          describe(op);
          IBNORM_TRY(api.CustomOpDomain_Add(library->domain, &op));
        }
  return nullptr;
}

//! The instruction set that the session's configuration names; the widest if it names none.
OrtStatus* read_instruction_set(const OrtApi& api, const OrtSessionOptions* options, InstructionSet* set) {
  *set = ibnorm::cpu::widest();
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
  for (const InstructionSet known : ibnorm::cpu::kInstructionSets) {
    if (!ibnorm::cpu::has(known)) continue;
    const char* name = ibnorm::cpu::name(known);
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
  const OrtApi* api = base->GetApi(kApiLevel);
  if (api == nullptr) {
    // Without the API no status can be made; the runtime has logged the reason.
    std::fprintf(stderr, "ibnorm: ONNX Runtime %s is too old; 1.18 is the oldest\n",
                 base->GetVersionString());
    return nullptr;
  }
  InstructionSet instructions;
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
    if (OrtStatus* status = build(*api, instructions, library)) {
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
                  std::size(kProviders) > 1 ? R"(,"cuda")" : "", ibnorm::cpu::name(ibnorm::cpu::widest()));
    return true;
  }();
  (void)written;
  return text;
}
