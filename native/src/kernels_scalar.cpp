// The kernels compiled for scalar; CMakeLists.txt gives this file its flags.
#include "simd_scalar.h"
#include "kernels_impl.h"

const Kernels *scalar_kernels() { return &TABLE; }
