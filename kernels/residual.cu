// The residual stream: adding to it, and taking some of its rows out and putting their gradient back.
//
//   residual_add            x += y
//   residual_gather_rows    y[i] = x[rows[i]]
//   residual_scatter_rows   dx[rows[i]] = dy[i]
//
// Shapes    add: both [n] bf16. gather: y [K, W], x [N, W] bf16, rows [K] u32, each below N. scatter: dx [N, W],
//           dy [K, W] bf16, rows [K] u32, distinct and each below N.
// Writes    x is added to (+=); y, and the rows of dx that are named, are overwritten (=). A row of y whose index
//           is not below N becomes NaN, such a row of dy goes nowhere: nothing outside the buffers is touched.
// Numerics  add: f32, one rounding. The others move bits.
// Grid      a thread per up to eight elements (of a row), 256 a block. Any sizes.
// Moves     add 6 bytes per element; gather and scatter 4 per element of y or dy.
// Partners  src/cuda/ops/residual.rs (launcher), tests/kernels/residual.rs, where the formulas are the reference
#include "eight.cuh"

KERNEL(256) residual_add(bf16* __restrict__ x, const bf16* __restrict__ y, int n) {
    const size_t at = eight_of_thread();
    if (at >= (size_t)n) return;
    const int count = up_to_eight(n - at);
    float a[8], b[8];
    load8(a, x + at, count);
    load8(b, y + at, count);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] += b[i];
    store8(x + at, a, count);
}
EXPORT_KERNEL(residual_add)

KERNEL(256) residual_gather_rows(bf16* __restrict__ y, const bf16* __restrict__ x, const u32* __restrict__ rows,
                                 int taken, int there, int width) {
    const int groups = (width + 7) / 8;
    // A unit is (row, group of columns); the launcher sees to it that there are fewer than 2^31.
    const u32 unit = blockIdx.x * 256 + threadIdx.x;
    const u32 i = unit / (u32)groups;
    if (i >= (u32)taken) return;
    const int first = (int)(unit - i * groups) * 8, count = up_to_eight(width - first);
    bf16* to = y + (size_t)i * width + first;
    const u32 row = rows[i];
    if (row < (u32)there)
        copy8(to, x + (size_t)row * width + first, count);
    else
        spoil8(to, count);
}
EXPORT_KERNEL(residual_gather_rows)

KERNEL(256) residual_scatter_rows(bf16* __restrict__ dx, const bf16* __restrict__ dy, const u32* __restrict__ rows,
                                  int taken, int there, int width) {
    const int groups = (width + 7) / 8;
    const u32 unit = blockIdx.x * 256 + threadIdx.x;
    const u32 i = unit / (u32)groups;
    if (i >= (u32)taken) return;
    const int first = (int)(unit - i * groups) * 8, count = up_to_eight(width - first);
    const u32 row = rows[i];
    if (row < (u32)there) copy8(dx + (size_t)row * width + first, dy + (size_t)i * width + first, count);
}
EXPORT_KERNEL(residual_scatter_rows)
