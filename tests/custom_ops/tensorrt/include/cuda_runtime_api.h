//! Stands in for CUDA's header of this name where the plugin is built without the toolkit: the two types that
//! TensorRT's headers name.
#pragma once

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
