//! The kernels for float16 data.
#include "launch.cuh"

namespace ibnorm::cuda {

template Status run_type<DType::kFloat16>(const Problem&, cudaStream_t);

}  // namespace ibnorm::cuda
