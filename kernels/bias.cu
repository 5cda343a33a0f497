// Bias, and its gradient in two steps.
//
//   x[r, c] += b[c]
//   db[c] += sum over r of dy[r, c]
//
// The gradient: rows are cut into slices. `bias_backward_slices` sums each slice, `bias_backward_join` adds the
// slices to db in ascending order.
//
// Shapes    x, dy [R, C] bf16; b, db [C] f32; partial [slices, C] f32, between the two steps.
// Writes    x and db are added to (+=), partial is overwritten (=).
// Numerics  f32; x is rounded once. Which elements are added in which order depends on R only: no atomics, the
//           same bits always, and a column's sum does not depend on the other columns.
// Grid      bias_add: a thread per up to eight elements of a row, 256 a block. bias_backward_slices: a block of
//           8 warps per slice and 256 columns, a lane per eight columns, 8 KiB of shared memory.
//           bias_backward_join: a thread per column. Any sizes.
// Moves     bias_add 4 bytes per element of x; bias_backward 2 per element of dy, and 8 per element of partial.
// Partners  src/tensor/ops/bias.rs (reference), src/cuda/ops/bias.rs (launcher), tests/kernels/bias.rs
#include "eight.cuh"

KERNEL(256) bias_add(bf16* __restrict__ x, const float* __restrict__ b, int rows, int columns) {
    const int groups = (columns + 7) / 8;
    // A unit is (row, group of columns); the launcher sees to it that there are fewer than 2^31.
    const u32 unit = blockIdx.x * 256 + threadIdx.x;
    const u32 row = unit / (u32)groups;
    if (row >= (u32)rows) return;
    const int first = (int)(unit - row * groups) * 8, count = up_to_eight(columns - first);
    bf16* at = x + (size_t)row * columns + first;
    float v[8], add[8];
    load8(v, at, count);
    load8(add, b + first, count);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += add[i];
    store8(at, v, count);
}
EXPORT_KERNEL(bias_add)

// Rows slice * slice_rows .. of 256 columns. Warp w sums rows w, w + 8, w + 16, ...; then the warps' sums are
// added in ascending order.
KERNEL(256) bias_backward_slices(float* __restrict__ partial, const bf16* __restrict__ dy, int rows, int columns,
                                 int slice_rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = blockIdx.x * 256, first = tile + lane * 8;
    float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    if (first < columns) {
        const int count = up_to_eight(columns - first);
        const int start = blockIdx.y * slice_rows, end = min(start + slice_rows, rows);
        float term[8];
        for (int r = start + warp; r < end; r += 8) {
            load8(term, dy + (size_t)r * columns + first, count);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += term[i];
        }
    }
    // All warps come here, also those without columns: the barrier waits for every thread of the block.
    float* of_warps = smem_ptr<float>(0);
    store8(of_warps + warp * 256 + lane * 8, sum, 8);
#ifndef FAULT_BIAS_NO_BARRIER
    __syncthreads();
#endif
    const int column = tile + threadIdx.x;
    if (column >= columns) return;
    float total = 0.0f;
    for (int w = 0; w < 8; w++) total += of_warps[w * 256 + threadIdx.x];
    partial[(size_t)blockIdx.y * columns + column] = total;
}
EXPORT_KERNEL(bias_backward_slices)

KERNEL(256) bias_backward_join(float* __restrict__ db, const float* __restrict__ partial, int slices, int columns) {
    const size_t column = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (column >= (size_t)columns) return;
    float sum = db[column];
    for (int slice = 0; slice < slices; slice++) sum += partial[(size_t)slice * columns + column];
    db[column] = sum;
}
EXPORT_KERNEL(bias_backward_join)
