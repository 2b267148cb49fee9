//! The kernels for bfloat16 data.
#include "launch.cuh"

namespace ibnorm::cuda {

template Status run_type<DType::kBFloat16>(const Problem&, cudaStream_t);

}  // namespace ibnorm::cuda
