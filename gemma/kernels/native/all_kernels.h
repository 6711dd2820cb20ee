// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set: included once by each isa_*.cpp, which names the namespace and the vector width.
#include "simd.h"

#include "unpack.h"
#include "matmul_int.h"
#include "matmul_float.h"
#include "elementwise.h"
#include "attention.h"
#include "logits.h"
#include "lowrank.h"

namespace gk::GK_NS {

static const Kernels table = {
    GK_NAME,       kRowGroup, quantize,     matmul,      matmul_scratch, rows,        matmul_grad, rms_norm,
    add_rms_norm,  add,       rope,         gelu_mul,    softcap,        scale,       store_cache, bf16_to_f32,
    f32_to_bf16,   attend_scratch, attend,  argmax,      top_k,          sum_exp,
    attend_blocks, attend_merge, low_rank,
};

}  // namespace gk::GK_NS
