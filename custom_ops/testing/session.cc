//! The whole library for ONNX Runtime under a sanitizer: eight threads register it and run one kernel at the
//! same time, as callers of one session do. ONNX Runtime itself is built without sanitizers, so they would
//! report races in its thread pool. A stand-in provides the part of its C API that the library calls, with
//! threads that the sanitizer knows.
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

extern "C" OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                     const OrtApiBase* base) noexcept;

struct OrtStatus {
  std::string text;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtSessionOptions {
  const OrtCustomOpDomain* domain = nullptr;
  std::string instructions;  // an entry of the configuration; empty: it is not there
};
struct OrtValue {
  std::vector<std::int64_t> shape;
  std::vector<float> data;
};
struct OrtTensorTypeAndShapeInfo {
  std::vector<std::int64_t> shape;
};
struct OrtKernelInfo {
  float lambd = 4.0F;
};
struct OrtKernelContext {
  std::vector<const OrtValue*> inputs;
  std::vector<OrtValue> outputs;
};

namespace {

constexpr int kThreads = 8;
constexpr int kPool = 2;
// ThreadSanitizer reports two accesses that nothing orders, whichever came first, so more runs find nothing
// more.
constexpr int kRuns = 3;

OrtApi make_api() {
  OrtApi api{};  // a function that is missing here is a null pointer, and calling it ends the process
  api.CreateStatus = [](OrtErrorCode, const char* text) noexcept { return new OrtStatus{text}; };
  api.ReleaseStatus = [](OrtStatus* status) noexcept { delete status; };
  api.CreateCustomOpDomain = [](const char*, OrtCustomOpDomain** domain) noexcept -> OrtStatus* {
    *domain = new OrtCustomOpDomain;
    return nullptr;
  };
  api.ReleaseCustomOpDomain = [](OrtCustomOpDomain* domain) noexcept { delete domain; };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain* domain, const OrtCustomOp* op) noexcept -> OrtStatus* {
    domain->ops.push_back(op);
    return nullptr;
  };
  api.AddCustomOpDomain = [](OrtSessionOptions* options, OrtCustomOpDomain* domain) noexcept -> OrtStatus* {
    options->domain = domain;
    return nullptr;
  };
  api.HasSessionConfigEntry = [](const OrtSessionOptions* options, const char*,
                                 int* given) noexcept -> OrtStatus* {
    *given = options->instructions.empty() ? 0 : 1;
    return nullptr;
  };
  api.GetSessionConfigEntry = [](const OrtSessionOptions* options, const char*, char* value,
                                 std::size_t* size) noexcept -> OrtStatus* {
    std::snprintf(value, *size, "%s", options->instructions.c_str());
    return nullptr;
  };
  api.KernelInfo_GetNodeName = [](const OrtKernelInfo*, char* text,
                                  std::size_t* size) noexcept -> OrtStatus* {
    std::snprintf(text, *size, "node");
    return nullptr;
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo* info, const char* name,
                                        float* value) noexcept -> OrtStatus* {
    if (std::strcmp(name, "epsilon") == 0) *value = 1e-5F;
    if (std::strcmp(name, "lambd") == 0) *value = info->lambd;
    return nullptr;
  };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo*, const char*,
                                        std::int64_t* value) noexcept -> OrtStatus* {
    *value = -1;
    return nullptr;
  };
  api.KernelInfoGetConstantInput_tensor = [](const OrtKernelInfo*, std::size_t, int* is_constant,
                                             const OrtValue**) noexcept -> OrtStatus* {
    *is_constant = 0;
    return nullptr;
  };
  api.KernelContext_GetInput = [](const OrtKernelContext* context, std::size_t index,
                                  const OrtValue** value) noexcept -> OrtStatus* {
    *value = context->inputs[index];
    return nullptr;
  };
  api.KernelContext_GetOutputCount = [](const OrtKernelContext* context,
                                        std::size_t* count) noexcept -> OrtStatus* {
    *count = context->outputs.size();
    return nullptr;
  };
  api.KernelContext_GetOutput = [](OrtKernelContext* context, std::size_t index, const std::int64_t* dims,
                                   std::size_t rank, OrtValue** value) noexcept -> OrtStatus* {
    OrtValue& made = context->outputs[index];
    made.shape.assign(dims, dims + rank);
    std::size_t size = 1;
    for (const std::int64_t dim : made.shape) size *= static_cast<std::size_t>(dim);
    made.data.assign(size, 0.0F);
    *value = &made;
    return nullptr;
  };
  api.GetTensorTypeAndShape = [](const OrtValue* value,
                                 OrtTensorTypeAndShapeInfo** info) noexcept -> OrtStatus* {
    *info = new OrtTensorTypeAndShapeInfo{value->shape};
    return nullptr;
  };
#if ORT_API_VERSION >= 24
  api.GetTensorElementTypeAndShapeDataReference = [](const OrtValue* value, ONNXTensorElementDataType* type,
                                                     const std::int64_t** dims,
                                                     std::size_t* rank) noexcept -> OrtStatus* {
    *type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    *dims = value->shape.data();
    *rank = value->shape.size();
    return nullptr;
  };
#endif
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) noexcept { delete info; };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info,
                              std::size_t* rank) noexcept -> OrtStatus* {
    *rank = info->shape.size();
    return nullptr;
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, std::int64_t* dims,
                         std::size_t rank) noexcept -> OrtStatus* {
    for (std::size_t i = 0; i < rank; ++i) dims[i] = info->shape[i];
    return nullptr;
  };
  api.GetTensorMutableData = [](OrtValue* value, void** data) noexcept -> OrtStatus* {
    *data = value->data.data();
    return nullptr;
  };
  api.KernelContext_ParallelFor = [](const OrtKernelContext*, void (*run)(void*, std::size_t),
                                     std::size_t total, std::size_t, void* data) noexcept -> OrtStatus* {
    std::vector<std::thread> pool;
    for (std::size_t t = 0; t < kPool; ++t)
      pool.emplace_back([=] {
        for (std::size_t i = t; i < total; i += kPool) run(data, i);
      });
    for (std::thread& thread : pool) thread.join();
    return nullptr;
  };
  return api;
}

// An older and a newer ONNX Runtime, whose shapes are read in different ways.
const OrtApi kApi = make_api();
const OrtApi kNewerApi = make_api();
const OrtApiBase kBase = {
    [](std::uint32_t level) noexcept -> const OrtApi* { return level > 18 ? nullptr : &kApi; },
    []() noexcept -> const char* { return "1.18.1"; }};
const OrtApiBase kNewerBase = {[](std::uint32_t) noexcept -> const OrtApi* { return &kNewerApi; },
                               []() noexcept -> const char* { return "1.31.0"; }};

OrtValue tensor(std::vector<std::int64_t> shape, float step) {
  std::size_t size = 1;
  for (const std::int64_t dim : shape) size *= static_cast<std::size_t>(dim);
  OrtValue value{std::move(shape), std::vector<float>(size)};
  for (std::size_t i = 0; i < size; ++i) value.data[i] = static_cast<float>(i % 97) * step - 3.0F;
  return value;
}

int failed(OrtStatus* status) {
  if (status == nullptr) return 0;
  std::fprintf(stderr, "session: %s\n", status->text.c_str());
  delete status;
  return 1;
}

//! Runs one kernel of `op` in every thread on the same inputs; all results must be equal to the first, to the
//! bit.
int run_together(const OrtCustomOp& op) {
  const bool skip = op.GetOutputTypeCount(&op) == 2;
  const OrtValue x = tensor({3, 200, 257}, 0.07F), other = tensor({3, 200, 257}, -0.03F);
  const OrtValue scale = tensor({257}, 0.01F), bias = tensor({257}, 0.02F);
  const OrtKernelInfo info;
  void* kernel = nullptr;
  if (failed(op.CreateKernelV2(&op, &kApi, &info, &kernel)) != 0) return 1;
  const auto answer = [&](OrtKernelContext* context) {
    context->inputs = {&x};
    if (skip) context->inputs.push_back(&other);
    context->inputs.insert(context->inputs.end(), {&scale, &bias});
    context->outputs.resize(skip ? 2 : 1);
    return failed(op.KernelComputeV2(kernel, context));
  };
  OrtKernelContext first;
  int failures = answer(&first);
  std::vector<std::thread> callers;
  std::vector<int> wrong(kThreads, 0);
  for (int t = 0; t < kThreads; ++t)
    callers.emplace_back([&, t] {
      for (int run = 0; run < kRuns; ++run) {
        OrtKernelContext mine;
        int& count = wrong[static_cast<std::size_t>(t)];
        count += answer(&mine);
        for (std::size_t o = 0; o < mine.outputs.size(); ++o)
          count += static_cast<int>(mine.outputs[o].data != first.outputs[o].data);
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (const int count : wrong) failures += count;
  op.KernelDestroy(kernel);
  return failures;
}

}  // namespace

int main() {
  std::vector<OrtSessionOptions> options(kThreads);
  std::vector<std::thread> callers;
  std::vector<int> refused(kThreads, 0);
  for (int t = 0; t < kThreads; ++t)
    callers.emplace_back([&, t] {
      const auto i = static_cast<std::size_t>(t);
      if (t % 2 == 1) options[i].instructions = "generic";
      refused[i] = failed(RegisterCustomOps(&options[i], t % 4 < 2 ? &kBase : &kNewerBase));
    });
  for (std::thread& caller : callers) caller.join();
  int failures = 0;
  for (const int count : refused) failures += count;
  int kernels = 0;
  // With the widest instructions, then with those of every machine; in the older and the newer ONNX Runtime.
  for (std::size_t i = 0; i < 4; ++i)
    for (const OrtCustomOp* op : options[i].domain->ops) {
      if (op->GetInputType(op, 0) != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) continue;
      failures += run_together(*op);
      ++kernels;
    }
  std::printf("%d kernels, each run %d times by each of %d callers, %d failures\n", kernels, kRuns, kThreads,
              failures);
  return failures == 0 && kernels == 24 ? EXIT_SUCCESS : EXIT_FAILURE;
}
