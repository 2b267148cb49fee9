// Classifies one image with an exported model in ONNX Runtime's C++ API.
//   classify MODEL.onnx PIXELS [LIBRARY]
// PIXELS holds the values of one input as raw 32-bit floats. LIBRARY is libibnorm_ort.so, with the fused
// kernels; without it each norm runs as the function that is in the file.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <functional>
#include <iostream>
#include <numeric>
#include <vector>

int main(int argc, char** argv) try {
  if (argc < 3) return std::cerr << "usage: classify MODEL.onnx PIXELS [LIBRARY]\n", 2;
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");  // one for the whole process
  Ort::SessionOptions options;
  if (argc > 3) options.RegisterCustomOpsLibrary(argv[3]);  // once for these options, before the session
  Ort::Session session(env, argv[1], options);              // Run may be called from many threads

  Ort::AllocatorWithDefaultOptions allocator;
  auto input_name = session.GetInputNameAllocated(0, allocator);
  auto output_name = session.GetOutputNameAllocated(0, allocator);
  auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  for (auto& size : shape) size = std::max<int64_t>(size, 1);  // a dynamic axis is -1: one image
  std::vector<float> pixels(std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>()));
  std::ifstream file(argv[2], std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(pixels.data()), pixels.size() * sizeof(float)))
    return std::cerr << argv[2] << " has fewer than " << pixels.size() << " floats\n", 2;

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto image =
      Ort::Value::CreateTensor<float>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* const inputs[] = {input_name.get()};
  const char* const outputs[] = {output_name.get()};
  auto results = session.Run(Ort::RunOptions{nullptr}, inputs, &image, 1, outputs, 1);

  const float* logits = results[0].GetTensorData<float>();
  size_t count = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
  std::cout.precision(9);
  for (size_t i = 0; i < count; ++i) std::cout << logits[i] << '\n';
  std::cout << "class " << std::max_element(logits, logits + count) - logits << '\n';
  return 0;
} catch (const Ort::Exception& error) {
  std::cerr << error.what() << '\n';  // no such file, another opset, an illegal shape, ...
  return 1;
}
