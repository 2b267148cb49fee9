#include <cfloat>
#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <new>

#include "ibnorm/problem.h"
#include "op.h"
#include "tensors.h"

namespace ibnorm::ort {
namespace {

//! Below this number of elements, waking a second thread costs more than it saves.
constexpr std::int64_t kSerialElements = 16384;
//! Elements that a thread takes at a time: enough to hide the cost, few enough to balance the threads.
constexpr std::int64_t kChunkElements = 131072;

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

__attribute__((format(printf, 2, 3))) OrtStatus* fail(const Node& node, const char* format, ...) {
  char what[320];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  char text[640];
  std::snprintf(text, sizeof text, "%s node '%s': %s", node.op->type_name(), node.name, what);
  return node.op->api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

// -- creation ----------------------------------------------------------------------------------

OrtStatus* missing(const Node& node, OrtStatus* cause, const char* attribute, const char* type) {
  node.op->api->ReleaseStatus(cause);
  return fail(node,
              "attribute '%s' is missing or not of type %s; every node must spell out lambd (float), epsilon "
              "(float) and "
              "axis (int)",
              attribute, type);
}

std::int64_t constant_length(const Op& op, const OrtKernelInfo* info, std::size_t index) {
  const OrtApi& api = *op.api;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  Shape shape;
  OrtStatus* status = api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value);
  if (status == nullptr && is_constant != 0 && value != nullptr) {
    status = op.read_shape(api, value, &shape);
    if (status == nullptr && shape.rank == 1) return shape.dims[0];
  }
  if (status != nullptr) api.ReleaseStatus(status);
  return -1;  // not a constant vector: checked when the node runs
}

OrtStatus* configure(const OrtKernelInfo* info, Node* node) {
  const OrtApi& api = *node->op->api;
  std::size_t size = sizeof node->name;
  if (OrtStatus* status = api.KernelInfo_GetNodeName(info, node->name, &size)) {
    api.ReleaseStatus(status);  // the name is longer than the buffer; the node works without it
    std::snprintf(node->name, sizeof node->name, "(name too long)");
  }

  if (OrtStatus* s = api.KernelInfoGetAttribute_float(info, "lambd", &node->lambd))
    return missing(*node, s, "lambd", "float");
  if (OrtStatus* s = api.KernelInfoGetAttribute_float(info, "epsilon", &node->epsilon))
    return missing(*node, s, "epsilon", "float");
  std::int64_t axis = 0;
  if (OrtStatus* s = api.KernelInfoGetAttribute_int64(info, "axis", &axis))
    return missing(*node, s, "axis", "int");

  if (!(node->lambd >= FLT_MIN && node->lambd <= FLT_MAX))
    return fail(*node, "lambd is %g; it must be finite and at least %g", node->lambd, FLT_MIN);
  if (!(node->epsilon >= 0.0F && node->epsilon <= FLT_MAX))
    return fail(*node, "epsilon is %g; it must be finite and not negative", node->epsilon);
  if (axis != -1) return fail(*node, "axis is %" PRId64 "; version 1 of the operator accepts only -1", axis);

  node->constant_scale = constant_length(*node->op, info, node->op->scale_index());
  node->constant_bias = constant_length(*node->op, info, node->op->scale_index() + 1);
  return nullptr;
}

// -- running -----------------------------------------------------------------------------------

struct Split {
  cpu::InstructionSet instructions;
  const Problem* problem;
  std::int64_t chunks;
};

void run_chunk(void* data, std::size_t index) noexcept {
  const Split& split = *static_cast<const Split*>(data);
  const std::int64_t rows = split.problem->rows;
  const auto chunk = static_cast<std::int64_t>(index);
  // `compute` has checked the problem, so the kernels accept it.
  cpu::run(split.instructions, *split.problem, rows * chunk / split.chunks,
           rows * (chunk + 1) / split.chunks);
}

OrtStatus* run_cpu(const Node& node, OrtKernelContext* context, const Problem& problem) {
  const std::int64_t elements = problem.rows * problem.cols;
  if (elements <= kSerialElements || problem.rows == 1) {
    const Status status = cpu::run(node.op->instructions, problem, 0, problem.rows);
    if (status == Status::kOk) return nullptr;
    return fail(node, "the CPU kernel refused the problem (status %d)", static_cast<int>(status));
  }
  Split split{node.op->instructions, &problem, (elements + kChunkElements - 1) / kChunkElements};
  if (split.chunks < 4) split.chunks = 4;
  if (split.chunks > problem.rows) split.chunks = problem.rows;
  const auto count = static_cast<std::size_t>(split.chunks);
  return node.op->api->KernelContext_ParallelFor(context, run_chunk, count, count, &split);
}

#ifdef IBNORM_CUDA
OrtStatus* run_cuda(const Node& node, OrtKernelContext* context, const Problem& problem) {
  void* stream = nullptr;
  IBNORM_TRY(node.op->api->KernelContext_GetGPUComputeStream(context, &stream));
  const Status status = cuda::run(problem, stream);
  if (status == Status::kOk) return nullptr;
  return fail(node, "the CUDA kernel did not start (status %d): %s", static_cast<int>(status),
              status == Status::kUnsupported ? "this library holds no kernel for the device"
                                             : "the device refused the launch");
}
#endif

//! The inputs of a node; `skip` is null where the op has none.
struct Inputs {
  const OrtValue* x;
  const OrtValue* skip;
  const OrtValue* scale;
  const OrtValue* bias;
};

OrtStatus* read_inputs(const Node& node, OrtKernelContext* context, Inputs* inputs) {
  const OrtApi& api = *node.op->api;
  *inputs = {};
  IBNORM_TRY(api.KernelContext_GetInput(context, 0, &inputs->x));
  IBNORM_TRY(api.KernelContext_GetInput(context, node.op->scale_index(), &inputs->scale));
  IBNORM_TRY(api.KernelContext_GetInput(context, node.op->scale_index() + 1, &inputs->bias));
  if (inputs->x == nullptr || inputs->scale == nullptr || inputs->bias == nullptr)
    return fail(node, "an input is not connected; X, %sscale and bias must all be",
                node.op->skip ? "skip, " : "");
  if (!node.op->skip) return nullptr;
  IBNORM_TRY(api.KernelContext_GetInput(context, 1, &inputs->skip));
  if (inputs->skip == nullptr) return fail(node, "skip is not connected; it must be");
  return nullptr;
}

OrtStatus* check_length(const Node& node, const OrtValue* value, const char* which, std::int64_t constant,
                        std::int64_t cols) {
  if (constant == cols) return nullptr;
  Shape shape;
  IBNORM_TRY(node.op->read_shape(*node.op->api, value, &shape));
  if (shape.rank == 1 && shape.dims[0] == cols) return nullptr;
  char text[200];
  shape.print(text, sizeof text);
  return fail(node, "%s has shape %s; it must be [%" PRId64 "], the length of the last axis of X", which,
              text, cols);
}

//! Checks the shapes of the inputs, and sets the problem's rows and columns.
OrtStatus* read_shapes(const Node& node, const Inputs& inputs, Shape* shape, Problem* problem) {
  const OrtApi& api = *node.op->api;
  IBNORM_TRY(node.op->read_shape(api, inputs.x, shape));
  if (shape->rank == 0 || shape->rank > kMaxRank)
    return fail(node, "X has rank %zu; it must be 1 to %zu", shape->rank, kMaxRank);
  problem->cols = shape->dims[shape->rank - 1];
  problem->rows = 1;
  for (std::size_t i = 0; i + 1 < shape->rank; ++i) problem->rows *= shape->dims[i];
  IBNORM_TRY(check_length(node, inputs.scale, "scale", node.constant_scale, problem->cols));
  IBNORM_TRY(check_length(node, inputs.bias, "bias", node.constant_bias, problem->cols));
  if (inputs.skip == nullptr) return nullptr;
  Shape skip_shape;
  IBNORM_TRY(node.op->read_shape(api, inputs.skip, &skip_shape));
  if (skip_shape == *shape) return nullptr;
  char found[200];
  char wanted[200];
  skip_shape.print(found, sizeof found);
  shape->print(wanted, sizeof wanted);
  return fail(node, "skip has shape %.100s; it must be that of X, %.100s", found, wanted);
}

//! Sets the problem's outputs; `problem->y` stays null where nothing needs y.
OrtStatus* make_outputs(const Node& node, OrtKernelContext* context, const Shape& shape, Problem* problem) {
  const OrtApi& api = *node.op->api;
  OrtValue* y = nullptr;
  IBNORM_TRY(api.KernelContext_GetOutput(context, 0, shape.dims, shape.rank, &y));
  if (node.op->skip) {
    std::size_t outputs = 0;
    IBNORM_TRY(api.KernelContext_GetOutputCount(context, &outputs));
    OrtValue* sum = nullptr;
    if (outputs > 1) IBNORM_TRY(api.KernelContext_GetOutput(context, 1, shape.dims, shape.rank, &sum));
    if (sum != nullptr) IBNORM_TRY(api.GetTensorMutableData(sum, &problem->sum));
  }
  if (y != nullptr) IBNORM_TRY(api.GetTensorMutableData(y, &problem->y));
  return nullptr;
}

OrtStatus* read_arrays(const Node& node, const Inputs& inputs, Problem* problem) {
  const OrtApi& api = *node.op->api;
  IBNORM_TRY(read_data(api, inputs.x, &problem->x));
  if (inputs.skip != nullptr) IBNORM_TRY(read_data(api, inputs.skip, &problem->skip));
  IBNORM_TRY(read_data(api, inputs.scale, &problem->scale));
  return read_data(api, inputs.bias, &problem->bias);
}

}  // namespace

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) noexcept {
  Node* node = new (std::nothrow) Node{};
  if (node == nullptr) return as_op(op).api->CreateStatus(ORT_FAIL, "IBNorm: out of memory");
  node->op = &as_op(op);
  if (OrtStatus* status = configure(info, node)) {
    delete node;
    return status;
  }
  *kernel = node;
  return nullptr;
}

void destroy(void* kernel) noexcept { delete static_cast<Node*>(kernel); }

OrtStatus* compute(void* kernel, OrtKernelContext* context) noexcept {
  const Node& node = *static_cast<const Node*>(kernel);
  Inputs inputs;
  IBNORM_TRY(read_inputs(node, context, &inputs));
  Problem problem;
  Shape shape;
  IBNORM_TRY(read_shapes(node, inputs, &shape, &problem));
  IBNORM_TRY(make_outputs(node, context, shape, &problem));
  if (problem.y == nullptr || problem.rows == 0 || problem.cols == 0) return nullptr;

  IBNORM_TRY(read_arrays(node, inputs, &problem));
  problem.type = node.op->types.data;
  problem.affine_type = node.op->types.affine;
  problem.compression = node.op->compression;
  problem.lambd = node.lambd;
  problem.epsilon = node.epsilon;
#ifdef IBNORM_CUDA
  if (node.op->provider == Provider::kCuda) return run_cuda(node, context, problem);
#endif
  return run_cpu(node, context, problem);
}

}  // namespace ibnorm::ort
