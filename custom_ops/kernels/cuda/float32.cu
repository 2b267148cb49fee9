//! The kernels for float32 data.
#include "launch.cuh"

namespace ibnorm::cuda {

template Status run_type<DType::kFloat32>(const Problem&, cudaStream_t);

}  // namespace ibnorm::cuda
