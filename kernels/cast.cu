// Between bf16 and f32, and a factor on f32.
//
//   cast_to_bf16   y = x rounded to the nearest bf16, ties to even
//   cast_to_f32    y = x, exactly
//   cast_scale     x *= factor
//
// Shapes    all [n].
// Writes    y is overwritten (=); x of cast_scale is multiplied in place.
// Numerics  beyond the largest bf16 rounds to infinity; NaN stays NaN; subnormal numbers stay.
// Grid      a thread per eight elements, 256 a block. Any n.
// Moves     6 bytes per element between the types, 8 for cast_scale.
// Partners  src/cuda/ops/cast.rs (launcher), tests/kernels/cast.rs, where the half crate is the reference
#include "eight.cuh"

KERNEL(256) cast_to_bf16(bf16* __restrict__ y, const float* __restrict__ x, int n) {
    const size_t at = eight_of_thread();
    if (at >= (size_t)n) return;
    const int count = up_to_eight(n - at);
    float v[8];
    load8(v, x + at, count);
    store8(y + at, v, count);
}
EXPORT_KERNEL(cast_to_bf16)

KERNEL(256) cast_to_f32(float* __restrict__ y, const bf16* __restrict__ x, int n) {
    const size_t at = eight_of_thread();
    if (at >= (size_t)n) return;
    const int count = up_to_eight(n - at);
    float v[8];
    load8(v, x + at, count);
    store8(y + at, v, count);
}
EXPORT_KERNEL(cast_to_f32)

KERNEL(256) cast_scale(float* x, int n, float factor) {
    const size_t at = eight_of_thread();
    if (at >= (size_t)n) return;
    const int count = up_to_eight(n - at);
    float v[8];
    load8(v, x + at, count);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= factor;
    store8(x + at, v, count);
}
EXPORT_KERNEL(cast_scale)
