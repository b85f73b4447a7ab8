// The table of the functions of kernels.h, over the vectors F, I and N of one simd_*.h. Included once in each kernels_<set>.cpp. The functions:
// vectors_impl.h of single vectors, rows_impl.h of rows of matrices for one token, batch_impl.h for several, tiles_impl.h for a prompt's.
//
// Everything is static to its translation unit, and no C++ library template is used: code for one instruction set must
// never be merged with that of another by the linker.
#include "tiles_impl.h"

namespace {

#define EACH_GRID(kernel) {kernel<0>, kernel<1>, kernel<2>, kernel<3>, kernel<4>, kernel<5>, kernel<6>, kernel<7>, kernel<8>, kernel<9>, kernel<10>, kernel<11>}
static_assert(NUM_GRIDS == 12, "EACH_GRID names them");

const Kernels TABLE = {
    DEJAVU_ISA_NAME, fetch,       dots<float>, dots<bf16>,    dots<half>, dots<int8_t>,          dots_i8_i16,       EACH_GRID(dots_grid),
    products<float>, products<bf16>, products<half>, products<int8_t>, products_i8_i16, EACH_GRID(products_grid), EACH_GRID(prompts_grid),
    axpys<float>,    axpys<bf16>, axpys<half>, axpys<int8_t>, EACH_GRID(axpys_grid), EACH_GRID(panels), panels<INT8_ROWS>, panels<INT4_ROWS>,
    sums<float>, sums<bf16>, sums<half>, sums<int8_t>, EACH_GRID(sums_panels), sums_panels<INT8_ROWS>, sums_rows_i4, add,
    softmax,         layer_norm,  rms_norm,    quantize,      group,      narrow,                activate,          cap,
    finite,          sum};

}  // namespace
