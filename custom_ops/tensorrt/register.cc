//! libibnorm_trt_register.so: when it is loaded, it registers the plugins of libibnorm_trt.so in the same
//! folder.
//!
//! It is for programs that only open a library: `trtexec --staticPlugins` and ONNX Runtime's
//! trt_extra_plugin_lib_paths. It is a separate library because it must call the registry, whose layout
//! changed in TensorRT 11.
#include <dlfcn.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

using GetCreators = void* const* (*)(std::int32_t&);

//! Index of IPluginRegistry::registerCreator(IPluginCreatorInterface&, const char*) in the registry's table
//! of virtual functions, from the headers of 10.0 to 11.1; 11.4 is tested. -1 where it is unknown.
int register_slot(int major) { return major == 10 ? 12 : major == 11 ? 8 : -1; }

//! Searches every loaded library, because TensorRT may have been opened privately.
int find_runtime(dl_phdr_info* info, std::size_t, void* found) {
  const char* slash = info->dlpi_name == nullptr ? nullptr : std::strrchr(info->dlpi_name, '/');
  const char* name = slash == nullptr ? info->dlpi_name : slash + 1;
  if (name == nullptr) return 0;
  if (std::strncmp(name, "libnvinfer.so", 13) != 0 && std::strncmp(name, "libnvinfer_lean.so", 18) != 0)
    return 0;
  *static_cast<void**>(found) = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
  return *static_cast<void**>(found) == nullptr ? 0 : 1;
}

//! Number of creators that were registered; -1 after an error, which is one line on stderr.
int register_all() {
  void* runtime = nullptr;
  dl_iterate_phdr(find_runtime, &runtime);
  if (runtime == nullptr) {
    std::fprintf(
        stderr, "ibnorm: no TensorRT library is loaded, so no plugin is registered; load libnvinfer first\n");
    return -1;
  }
  const auto version = reinterpret_cast<std::int32_t (*)()>(dlsym(runtime, "getInferLibVersion"));
  const auto registry = reinterpret_cast<void* (*)()>(dlsym(runtime, "getPluginRegistry"));
  const std::int32_t number = version == nullptr ? 0 : version();
  const int major = number >= 100000 ? number / 10000 : number / 1000;  // 101401 is 10.14.1, 8601 is 8.6.1
  if (registry == nullptr || register_slot(major) < 0) {
    std::fprintf(stderr, "ibnorm: TensorRT major version %d is not known; 10 and 11 are\n", major);
    return -1;
  }
  Dl_info self;
  static const char here = 0;
  char path[4096];
  if (dladdr(&here, &self) == 0) return -1;
  const char* slash = std::strrchr(self.dli_fname, '/');
  const int folder = slash == nullptr ? 0 : static_cast<int>(slash - self.dli_fname) + 1;
  std::snprintf(path, sizeof path, "%.*s%s", folder, self.dli_fname, "libibnorm_trt.so");
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  const auto creators =
      library == nullptr ? nullptr : reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  if (creators == nullptr) {
    std::fprintf(stderr, "ibnorm: %s is not an IBNorm plugin library: %s\n", path, dlerror());
    return -1;
  }
  void* const target = registry();
  using Register = bool (*)(void*, void*, const char*);
  const Register add = (*static_cast<Register**>(target))[register_slot(major)];
  std::int32_t count = 0;
  void* const* const all = creators(count);
  int done = 0;
  for (std::int32_t i = 0; i < count; ++i) done += add(target, all[i], "") ? 1 : 0;
  return done;
}

int registered = -1;
__attribute__((constructor)) void on_load() { registered = register_all(); }

}  // namespace

//! Number of creators that were registered when the library was loaded, or -1.
extern "C" __attribute__((visibility("default"))) int ibnorm_registered() { return registered; }
