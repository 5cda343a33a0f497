// AdamW on all tensors in one launch, with moments in f32 or in 8 bits.
//
//   m  = beta1 m + rest1 g             v = beta2 v + rest2 g^2            rest = 1 - beta
//   adamw_step    p = p keep - step m / (sqrt(v) / root2 + epsilon)
//   adamw8_step   p = (p - step m / (sqrt(v) + epsilon)) keep
//
// `keep` is 1 for a tensor that does not decay. The scalars depend on the step's number and come from the launcher.
//
// In 8 bits, a moment is a byte per element and an f32 per block of 256 neighbours: their largest magnitude. The
// byte is an index into a map of 256 ascending values. adamw8_step keeps the moments of some tensors (small ones) in
// f32 nevertheless, and applies its own formula to them.
//
// Shapes    tensors: a table, see `Tensor`; pieces [pieces]; signed_map, unsigned_map [256] f32.
// Writes    p, its bf16 copy if there is one, and the moments are overwritten (=).
// Numerics  f32, every operation rounded by itself, no fused multiply-add: the bits of src/train/adamw.rs and
//           adamw8bit.rs, for all finite values. No order of summation is left open: elements do not meet, but for
//           the largest magnitude of a block, which is exact.
// Grid      a block of 256 threads per piece of 2,048 elements, eight neighbours each, so that a warp has one block
//           of 8-bit moments. adamw8_step: 2 KiB of shared memory for the maps. Any lengths.
// Moves     per element 28 bytes, 30 with a copy; in 8 bits 16 and 18. Some 12 operations, a square root and two or
//           three divisions; in 8 bits two divisions more and two searches of eight comparisons.
// Partners  src/train/adamw.rs, src/train/adamw8bit.rs (reference), src/cuda/ops/adamw.rs (launcher),
//           tests/kernels/adamw.rs
#include "eight.cuh"
#include "pieces.cuh"

struct Tensor {
    float* param;
    const float* grad;
    bf16* copy;                      // null: no copy
    void *first, *second;            // the moments: float, or u8 if there are maxima
    float *first_max, *second_max;   // one per 256 elements; null: moments in f32
    u64 length;
    u64 decays;
};

// A compiler may fuse a product into a sum, and the CPU's code does not: these say that it must not.
DEV float weighted(float a, float x, float b, float y) { return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y)); }

KERNEL(256) adamw_step(const Tensor* __restrict__ tensors, const Piece* __restrict__ pieces, float beta1, float beta2,
                       float rest1, float rest2, float step, float root2, float epsilon, float keep) {
    const Piece piece = pieces[blockIdx.x];
    const Tensor tensor = tensors[piece.tensor];
    const size_t at = eight_of_piece(piece);
    if (at >= tensor.length) return;
    const int count = up_to_eight(tensor.length - at);
    float* first = static_cast<float*>(tensor.first) + at;
    float* second = static_cast<float*>(tensor.second) + at;
    if (!tensor.decays) keep = 1.0f;
    float p[8], g[8], m[8], v[8];
    load8(p, tensor.param + at, count);
    load8(g, tensor.grad + at, count);
    load8(m, first, count);
    load8(v, second, count);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        m[i] = weighted(beta1, m[i], rest1, g[i]);
        v[i] = weighted(beta2, v[i], rest2, __fmul_rn(g[i], g[i]));
        const float scale = __fadd_rn(__fdiv_rn(__fsqrt_rn(v[i]), root2), epsilon);
        p[i] = __fsub_rn(__fmul_rn(p[i], keep), __fmul_rn(step, __fdiv_rn(m[i], scale)));
    }
    store8(first, m, count);
    store8(second, v, count);
    store8(tensor.param + at, p, count);
    if (tensor.copy) store8(tensor.copy + at, p, count);
}
EXPORT_KERNEL(adamw_step)

// The code of x in [-1, 1]: the index of the nearest value of an ascending map that starts at or above `lowest`. A
// search by halves; x half-way between two values gets the one that the search arrives at.
DEV int nearest(const float* map, float lowest, float x) {
    int below = 0, above = 255, at = 127;
    float lower = lowest, upper = 1.0f, value = map[127];
#pragma unroll
    for (int stride = 64; stride > 0; stride /= 2) {
        if (x > value) {
            below = at, lower = value, at += stride;
        } else {
            above = at, upper = value, at -= stride;
        }
        value = map[at];
    }
    if (x > value) return x > __fmul_rn(__fadd_rn(upper, value), 0.5f) ? above : at;
    return x < __fmul_rn(__fadd_rn(lower, value), 0.5f) ? below : at;
}

DEV bool negative(float x) { return __float_as_uint(x) >> 31; }

// A signed value moves by one entry where rounding lost its sign.
DEV int nearest_signed(const float* map, float x) {
    const int code = nearest(map, -1.0f, x);
    if (negative(map[code]) == negative(x)) return code;
    return x > 0.0f ? code + 1 : code - 1;
}

// values = what eight codes mean; the last of a tensor may be fewer.
DEV void decode8(float (&values)[8], const u8* codes, const float* map, float max, int count) {
    u64 bytes = 0;
    if (count == 8) {
        bytes = *reinterpret_cast<const u64*>(codes);
    } else {
        for (int i = 0; i < count; i++) bytes |= (u64)codes[i] << (8 * i);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = __fmul_rn(map[bytes >> (8 * i) & 255], max);
}

// A block of zeros has nothing to divide by: its codes are 0.
template <bool SIGNED> DEV void encode8(u8* codes, const float (&values)[8], const float* map, float max, int count) {
    u64 bytes = 0;
    if (max != 0.0f) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float x = __fdiv_rn(values[i], max);
            bytes |= (u64)(SIGNED ? nearest_signed(map, x) : nearest(map, 0.0f, x)) << (8 * i);
        }
    }
    if (count == 8) {
        *reinterpret_cast<u64*>(codes) = bytes;
    } else {
        for (int i = 0; i < count; i++) codes[i] = (u8)(bytes >> (8 * i));
    }
}

// The largest magnitude of the warp's 256 values; NaN is passed over.
DEV float largest(const float (&values)[8]) {
    float max = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) max = fmaxf(fabsf(values[i]), max);
#pragma unroll
    for (int o = 16; o > 0; o /= 2) max = fmaxf(__shfl_xor_sync(0xffffffffu, max, o), max);
    return max;
}

KERNEL(256) adamw8_step(const Tensor* __restrict__ tensors, const Piece* __restrict__ pieces,
                        const float* __restrict__ signed_map, const float* __restrict__ unsigned_map, float beta1,
                        float beta2, float rest1, float rest2, float step, float epsilon, float keep) {
    float* of_first = smem_ptr<float>(0);
    float* of_second = of_first + 256;
    of_first[threadIdx.x] = signed_map[threadIdx.x];
    of_second[threadIdx.x] = unsigned_map[threadIdx.x];
#ifndef FAULT_ADAMW_NO_BARRIER
    __syncthreads();
#endif
    const Piece piece = pieces[blockIdx.x];
    const Tensor tensor = tensors[piece.tensor];
    const size_t at = eight_of_piece(piece), block = at / 256;
    // Warps without elements leave. In one with few, all lanes stay: they have a part in the largest magnitude.
    if (block * 256 >= tensor.length) return;
    const int count = at < tensor.length ? up_to_eight(tensor.length - at) : 0;
    const bool coded = tensor.first_max != nullptr;
    u8* first_codes = static_cast<u8*>(tensor.first) + at;
    u8* second_codes = static_cast<u8*>(tensor.second) + at;
    float* first = static_cast<float*>(tensor.first) + at;
    float* second = static_cast<float*>(tensor.second) + at;
    if (!tensor.decays) keep = 1.0f;
    float p[8], g[8], m[8], v[8];
    load8(p, tensor.param + at, count);
    load8(g, tensor.grad + at, count);
    if (coded) {
        decode8(m, first_codes, of_first, tensor.first_max[block], count);
        decode8(v, second_codes, of_second, tensor.second_max[block], count);
    } else {
        load8(m, first, count);
        load8(v, second, count);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        m[i] = weighted(beta1, m[i], rest1, g[i]);
        v[i] = __fadd_rn(__fmul_rn(beta2, v[i]), __fmul_rn(__fmul_rn(rest2, g[i]), g[i]));
        const float scale = __fadd_rn(__fsqrt_rn(v[i]), epsilon);
        p[i] = __fmul_rn(__fsub_rn(p[i], __fmul_rn(step, __fdiv_rn(m[i], scale))), keep);
        // Beyond the end, codes would be decoded to whatever they mean.
        if (i >= count) m[i] = v[i] = 0.0f;
    }
    store8(tensor.param + at, p, count);
    if (tensor.copy) store8(tensor.copy + at, p, count);
    if (!coded) {
        store8(first, m, count);
        store8(second, v, count);
        return;
    }
    const float first_max = largest(m), second_max = largest(v);
    encode8<true>(first_codes, m, of_first, first_max, count);
    encode8<false>(second_codes, v, of_second, second_max, count);
    __syncwarp();  // every lane has read the old maxima
    if (threadIdx.x % 32 == 0) {
        tensor.first_max[block] = first_max;
        tensor.second_max[block] = second_max;
    }
}
EXPORT_KERNEL(adamw8_step)
