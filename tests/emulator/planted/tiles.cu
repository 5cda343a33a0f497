// A product of matrices as the large kernels do it: asynchronous copies into two buffers, ldmatrix, mma.
//
//   c [M, N] f32 = a [M, K] bf16 times b [K, N] bf16, all row-major; M, N multiples of 16, K of 16.
//
// Grid (M / 16, N / 16), one warp; 2048 bytes of shared memory: two tiles of a, two of b.
#include "dev.cuh"

// Byte offset of the 16 bytes `half` of row `row` in a 16 x 16 tile.
DEV u32 chunk(u32 row, u32 half) {
    return row * 32 + half * 16;
}

KERNEL(32) tile_product(float* c, const bf16* a, const bf16* b, int n, int k) {
    const u32 lane = lane_index(), row = lane / 2, half = lane % 2;
    const bf16* const from_a = a + (static_cast<size_t>(blockIdx.x) * 16 + row) * k + half * 8;
    const bf16* const from_b = b + static_cast<size_t>(row) * n + blockIdx.y * 16 + half * 8;
    const sptr tiles_a = smem_base(), tiles_b = tiles_a + 1024;
    float d[2][4] = {};

    cp_async16(tiles_a + chunk(row, half), from_a, true);
    cp_async16(tiles_b + chunk(row, half), from_b, true);
    cp_async_commit();
    for (int step = 0; step < k / 16; step++) {
        const u32 now = step % 2 * 512, next = 512 - now;
        if (step + 1 < k / 16) {
            cp_async16(tiles_a + next + chunk(row, half), from_a + (step + 1) * 16, true);
            cp_async16(tiles_b + next + chunk(row, half), from_b + static_cast<size_t>(step + 1) * 16 * n, true);
        }
        cp_async_commit();
#ifdef FAULT_EARLY
        cp_async_wait<2>();
#else
        cp_async_wait<1>();
#endif
#ifndef FAULT_UNSEEN
        __syncwarp();
#endif
        u32 fa[4], fb[4];
        ldmatrix_x4(fa, tiles_a + now + chunk(lane % 16, lane / 16));
        ldmatrix_x4_trans(fb, tiles_b + now + chunk(lane % 16, lane / 16));
        mma_bf16_16816(d[0], fa, fb[0], fb[1]);
        mma_bf16_16816(d[1], fa, fb[2], fb[3]);
#ifndef FAULT_OVERWRITE
        __syncwarp();
#endif
    }
    const size_t out = (static_cast<size_t>(blockIdx.x) * 16 + lane / 4) * n + blockIdx.y * 16 + lane % 4 * 2;
    for (int tile = 0; tile < 2; tile++)
        for (int i = 0; i < 4; i++) c[out + static_cast<size_t>(i / 2) * 8 * n + tile * 8 + i % 2] = d[tile][i];
}
EXPORT_KERNEL(tile_product)

// The same without shared memory or matrix instructions: one thread per element.
KERNEL(256) plain_product(float* c, const bf16* a, const bf16* b, int m, int n, int k) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= m * n) return;
    float sum = 0.0f;
    for (int j = 0; j < k; j++) sum += bf2f(a[i / n * k + j]) * bf2f(b[j * n + i % n]);
    c[i] = sum;
}
EXPORT_KERNEL(plain_product)
