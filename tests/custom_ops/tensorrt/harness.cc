//! Plays TensorRT towards a plugin library: every call of the IPluginV3 interfaces, in the order that
//! TensorRT makes them, with mocks of what it hands over. No TensorRT library, and no GPU where the kernels
//! are emulated.
#include <NvInfer.h>
#include <NvInferImpl.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

struct MockDimension : apiv::VDimensionExpr {
  bool isConstant() const noexcept override { return false; }
  std::int64_t getConstantValue() const noexcept override { return 0; }
  bool isSizeTensor() const noexcept override { return false; }
};
struct Dimension : IDimensionExpr {
  MockDimension mock;
  Dimension() { mImpl = &mock; }
};
struct MockBuilder : apiv::VExprBuilder {
  const IDimensionExpr* constant(std::int64_t) noexcept override { return nullptr; }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                  const IDimensionExpr&) noexcept override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) noexcept override {
    return nullptr;
  }
};
struct ExprBuilder : IExprBuilder {
  MockBuilder mock;
  ExprBuilder() { mImpl = &mock; }
};

//! What one plugin of a library looks like in the build phase and in an execution context.
struct Session {
  IPluginCreatorV3One* creator = nullptr;
  std::unique_ptr<IPluginV3> build;    // from the network's fields
  std::unique_ptr<IPluginV3> runtime;  // from what `build` serialised
  std::unique_ptr<IPluginV3> context;  // `runtime` attached
  std::string failure;
};

template <typename T>
T& capability(IPluginV3& plugin, PluginCapabilityType type) {
  return *static_cast<T*>(plugin.getCapabilityInterface(type));
}
IPluginV3OneBuild& build_of(IPluginV3& plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime& runtime_of(IPluginV3& plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

bool is_interface(const IVersionedInterface& interface, const char* kind) {
  const InterfaceInfo info = interface.getInterfaceInfo();
  return std::strcmp(info.kind, kind) == 0 && info.major == 1;
}

std::size_t bytes_of(const PluginField& field) {
  const bool wide = field.type == PluginFieldType::kFLOAT64 || field.type == PluginFieldType::kINT64;
  return static_cast<std::size_t>(field.length) * (field.type == PluginFieldType::kCHAR ? 1 : wide ? 8 : 4);
}

//! The fields as the engine holds them: copied, byte by byte, at odd addresses.
struct Serialised {
  std::vector<std::string> bytes;
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};

  explicit Serialised(const PluginFieldCollection& from) {
    for (std::int32_t i = 0; i < from.nbFields; ++i) {
      const PluginField& field = from.fields[i];
      bytes.push_back("-" + std::string(static_cast<const char*>(field.data), bytes_of(field)));
    }
    for (std::int32_t i = 0; i < from.nbFields; ++i)
      fields.emplace_back(from.fields[i].name, bytes[static_cast<std::size_t>(i)].data() + 1,
                          from.fields[i].type, from.fields[i].length);
    collection = {static_cast<std::int32_t>(fields.size()), fields.data()};
  }
};

#define EXPECT(condition)                                         \
  do {                                                            \
    if (!(condition)) return session.failure = #condition, false; \
  } while (false)

bool open(Session& session, void* library, const char* name, const PluginFieldCollection& fields) {
  const auto set_logger = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  const auto creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library, "getCreators"));
  EXPECT(set_logger != nullptr && creators != nullptr);
  set_logger(nullptr);
  std::int32_t count = 0;
  IPluginCreatorInterface* const* all = creators(count);
  for (std::int32_t i = 0; i < count; ++i) {
    EXPECT(is_interface(*all[i], "PLUGIN CREATOR_V3ONE"));
    auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::strcmp(creator->getPluginName(), name) == 0) session.creator = creator;
  }
  EXPECT(session.creator != nullptr);
  EXPECT(std::strcmp(session.creator->getPluginNamespace(), "") == 0);

  session.build.reset(session.creator->createPlugin("layer", &fields, TensorRTPhase::kBUILD));
  EXPECT(session.build != nullptr);
  EXPECT(is_interface(*session.build, "PLUGIN"));
  EXPECT(is_interface(capability<IPluginV3OneCore>(*session.build, PluginCapabilityType::kCORE),
                      "PLUGIN_V3ONE_CORE"));
  EXPECT(is_interface(build_of(*session.build), "PLUGIN_V3ONE_BUILD"));
  EXPECT(is_interface(runtime_of(*session.build), "PLUGIN_V3ONE_RUNTIME"));
  const auto& core = capability<IPluginV3OneCore>(*session.build, PluginCapabilityType::kCORE);
  EXPECT(std::strcmp(core.getPluginName(), name) == 0);
  EXPECT(std::strcmp(core.getPluginVersion(), session.creator->getPluginVersion()) == 0);
  EXPECT(std::strcmp(core.getPluginNamespace(), "") == 0);

  // The builder clones the plugin, drops the original, serialises, and the runtime makes it again.
  std::unique_ptr<IPluginV3> clone(session.build->clone());
  EXPECT(clone != nullptr && clone.get() != session.build.get());
  session.build = std::move(clone);
  const Serialised stored(*runtime_of(*session.build).getFieldsToSerialize());
  session.runtime.reset(session.creator->createPlugin("layer", &stored.collection, TensorRTPhase::kRUNTIME));
  EXPECT(session.runtime != nullptr);
  session.context.reset(runtime_of(*session.runtime).attachToContext(nullptr));
  EXPECT(session.context != nullptr && session.context.get() != session.runtime.get());
  return true;
}

PluginTensorDesc tensor(int rank, const std::int64_t*& dims, int type) {
  PluginTensorDesc made{};
  made.dims.nbDims = rank;
  for (int i = 0; i < rank; ++i) made.dims.d[i] = *dims++;
  made.type = static_cast<DataType>(type);
  made.format = TensorFormat::kLINEAR;
  made.scale = 1.0F;
  return made;
}

//! Fields as flat arrays: names, nvinfer1::PluginFieldType codes, addresses and lengths.
std::vector<PluginField> fields_of(int count, const char* const* names, const int* types,
                                   const void* const* data, const int* lengths) {
  std::vector<PluginField> made;
  for (int i = 0; i < count; ++i)
    made.emplace_back(names[i], data[i], static_cast<PluginFieldType>(types[i]), lengths[i]);
  return made;
}

}  // namespace

extern "C" {

int harness_tensorrt_major() { return NV_TENSORRT_MAJOR; }

//! Names of the creators and, after each, of its fields: "IBNormS lambd:4 ...", with PluginFieldType codes.
int harness_describe(const char* path, char* text, std::size_t size) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return -1;
  const auto creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library, "getCreators"));
  std::int32_t count = 0;
  IPluginCreatorInterface* const* all = creators(count);
  std::string made;
  for (std::int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
    made += creator->getPluginName();
    const PluginFieldCollection& fields = *creator->getFieldNames();
    for (std::int32_t f = 0; f < fields.nbFields; ++f)
      made += std::string(" ") + fields.fields[f].name + ":" +
              std::to_string(static_cast<int>(fields.fields[f].type));
    made += "\n";
  }
  std::strncpy(text, made.c_str(), size - 1);
  return count;
}

//! A plugin, created, cloned, serialised, created again and attached; null with `text` where something is
//! wrong.
Session* harness_open(const char* path, const char* name, int count, const char* const* names,
                      const int* types, const void* const* data, const int* lengths, char* text,
                      std::size_t size) {
  auto session = std::make_unique<Session>();
  std::vector<PluginField> fields = fields_of(count, names, types, data, lengths);
  const PluginFieldCollection collection{count, fields.data()};
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) session->failure = dlerror();
  if (library != nullptr && open(*session, library, name, collection)) return session.release();
  std::strncpy(text, session->failure.c_str(), size - 1);
  return nullptr;
}

void harness_close(Session* session) { delete session; }

//! Serialised fields of the attached plugin, which came through the bytes of the one before.
int harness_fields(Session* session, float* lambd, float* epsilon, std::int32_t* axis) {
  const PluginFieldCollection& fields = *runtime_of(*session->context).getFieldsToSerialize();
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (std::strcmp(field.name, "lambd") == 0) std::memcpy(lambd, field.data, sizeof *lambd);
    if (std::strcmp(field.name, "epsilon") == 0) std::memcpy(epsilon, field.data, sizeof *epsilon);
    if (std::strcmp(field.name, "axis") == 0) std::memcpy(axis, field.data, sizeof *axis);
  }
  return fields.nbFields;
}

const char* harness_timing_id(Session* session) { return build_of(*session->build).getTimingCacheID(); }

//! Workspace in bytes that the plugin asks for, and how many tactics it has.
std::size_t harness_workspace(Session* session, int inputs, int outputs) {
  std::vector<DynamicPluginTensorDesc> tensors(static_cast<std::size_t>(inputs + outputs));
  return build_of(*session->build)
             .getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, outputs) +
         static_cast<std::size_t>(build_of(*session->build).getNbTactics());
}

//! Whether the plugin takes tensors of these types and formats, asked position by position as TensorRT does.
int harness_supports(Session* session, int inputs, int outputs, const int* types, const int* formats) {
  std::vector<DynamicPluginTensorDesc> tensors(static_cast<std::size_t>(inputs + outputs));
  for (int i = 0; i < inputs + outputs; ++i) {
    PluginTensorDesc& desc = tensors[static_cast<std::size_t>(i)].desc;
    desc.type = static_cast<DataType>(types[i]);
    desc.format = static_cast<TensorFormat>(formats[i]);
    if (!build_of(*session->build).supportsFormatCombination(i, tensors.data(), inputs, outputs)) return 0;
  }
  return build_of(*session->build)
             .configurePlugin(tensors.data(), inputs, tensors.data() + inputs, outputs) == 0;
}

//! Output types for the first input's `type`, then 1 when every output has the very dimensions of X; -1 when
//! refused.
int harness_infer(Session* session, int inputs, int outputs, int rank, int type, int* types) {
  IPluginV3OneBuild& build = build_of(*session->build);
  std::vector<DataType> in(static_cast<std::size_t>(inputs), DataType::kFLOAT);
  std::vector<DataType> out(static_cast<std::size_t>(outputs), DataType::kINT8);
  in[0] = static_cast<DataType>(type);
  if (build.getOutputDataTypes(out.data(), outputs, in.data(), inputs) != 0) return -1;
  for (int i = 0; i < outputs; ++i) types[i] = static_cast<int>(out[static_cast<std::size_t>(i)]);
  std::vector<Dimension> dimensions(static_cast<std::size_t>(rank));
  std::vector<DimsExprs> in_shapes(static_cast<std::size_t>(inputs));
  std::vector<DimsExprs> out_shapes(static_cast<std::size_t>(outputs));
  in_shapes[0].nbDims = rank;
  for (int i = 0; i < rank; ++i) in_shapes[0].d[i] = &dimensions[static_cast<std::size_t>(i)];
  ExprBuilder builder;
  if (build.getOutputShapes(in_shapes.data(), inputs, nullptr, 0, out_shapes.data(), outputs, builder) != 0)
    return -1;
  for (const DimsExprs& shape : out_shapes) {
    if (shape.nbDims != rank) return 0;
    for (int i = 0; i < rank; ++i)
      if (shape.d[i] != in_shapes[0].d[i]) return 0;
  }
  return build.getNbOutputs() == outputs ? 1 : 0;
}

//! onShapeChange and, where that is 0, enqueue. Shapes lie flat, `ranks[i]` numbers each; types are
//! nvinfer1::DataType. Returns 1000 + the code of onShapeChange where that fails, else the code of enqueue.
int harness_run(Session* session, int inputs, int outputs, const int* ranks, const std::int64_t* dims,
                const int* types, void** pointers, void* stream) {
  std::vector<PluginTensorDesc> tensors;
  for (int i = 0; i < inputs + outputs; ++i) tensors.push_back(tensor(ranks[i], dims, types[i]));
  IPluginV3OneRuntime& runtime = runtime_of(*session->context);
  const int changed = runtime.onShapeChange(tensors.data(), inputs, tensors.data() + inputs, outputs);
  if (changed != 0) return 1000 + changed;
  if (runtime.setTactic(0) != 0) return 2000;
  return runtime.enqueue(tensors.data(), tensors.data() + inputs, pointers, pointers + inputs, nullptr,
                         static_cast<cudaStream_t>(stream));
}
}
