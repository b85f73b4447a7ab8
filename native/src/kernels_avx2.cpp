// The kernels compiled for avx2; CMakeLists.txt gives this file its flags.
#include "simd_avx2.h"
#include "kernels_impl.h"

const Kernels *avx2_kernels() { return &TABLE; }
