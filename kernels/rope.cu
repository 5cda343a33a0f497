// Rotary position embedding, "rotate half": in place, forward and backward.
//
//   (x[i], x[i + D/2])  =  (x[i] cos - x[i + D/2] sin,  x[i + D/2] cos + x[i] sin)     i < D/2
//
// with cosine and sine of position * theta^(-2i/D). The gradient turns back: the same with -sin.
//
// Shapes    x [T, heads, D] bf16, D even; cosines and sines [P, D/2] f32; positions [T] u32, each below P.
// Writes    x is overwritten (=). A token whose position is not below P becomes NaN: nothing beyond the
//           table is read.
// Numerics  f32, one rounding at the store.
// Grid      a thread per up to eight pairs of one head, 256 a block. Any T, heads and even D.
// Moves     4 bytes of x per element; the table's rows of neighbouring tokens come out of the cache.
// Partners  src/tensor/ops/rope.rs (reference), src/cuda/ops/rope.rs (launcher, table), tests/kernels/rope.rs
#include "eight.cuh"

KERNEL(256) rope_rotate(bf16* x, const float* cosines, const float* sines, const u32* positions, int tokens, int heads,
                        int head_dim, int table_positions, float sign) {
    const int half = head_dim / 2, groups = (half + 7) / 8;
    // A unit is (token, head, group of pairs); the launcher sees to it that there are fewer than 2^31.
    const u32 unit = blockIdx.x * 256 + threadIdx.x;
    const u32 row = unit / (u32)groups;
    const u32 token = row / (u32)heads;
    if (token >= (u32)tokens) return;
    const int first = (int)(unit - row * groups) * 8, count = up_to_eight(half - first);
    bf16* low = x + (size_t)row * head_dim + first;
    bf16* high = low + half;

    const u32 position = positions[token];
    if (position >= (u32)table_positions) {
        spoil8(low, count);
        spoil8(high, count);
        return;
    }
    const size_t angle = (size_t)position * half + first;
    float a[8], b[8], c[8], s[8], turned[8];
    load8(a, low, count);
    load8(b, high, count);
    load8(c, cosines + angle, count);
    load8(s, sines + angle, count);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        s[i] *= sign;
        turned[i] = fmaf(a[i], c[i], -(b[i] * s[i]));
        b[i] = fmaf(b[i], c[i], a[i] * s[i]);
    }
    store8(low, turned, count);
    store8(high, b, count);
}
EXPORT_KERNEL(rope_rotate)
