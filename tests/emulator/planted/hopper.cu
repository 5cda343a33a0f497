// A product as the kernels for sm_90a do it, small: a producer warp and one consumer warpgroup, two stages.
//
//   c [m, n] f32 = a [m, k] bf16 times b, all row-major; b is [n, k] in `box_product` and [k, n] in
//   `box_product_rows`. In `box_product_registers` A passes through registers.
//
// Grid (ceil(m / 64), ceil(n / 128)), 160 threads; 2 * (8192 + 16384) + 32 bytes of shared memory. Boxes: a 64 x 64;
// b 128 rows of 64, or 64 rows of 64, two to a stage.
#include "hopper.cuh"

enum { STAGES = 2, A_BYTES = 64 * 128, B_BYTES = 128 * 128, STAGE_BYTES = A_BYTES + B_BYTES };

template <Major B, bool THROUGH_REGISTERS>
DEV void box_product_body(float* c, const TensorMap* a_map, const TensorMap* b_map, int m, int n, int k) {
    const sptr full = smem_base() + STAGES * STAGE_BYTES, empty = full + STAGES * 8;
    const int row0 = blockIdx.x * 64, col0 = blockIdx.y * 128, steps = (k + 63) / 64;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, 1);
        }
#ifndef FAULT_NO_INIT_FENCE
        mbarrier_init_fence();
#endif
    }
#ifndef FAULT_NO_INIT_BARRIER
    __syncthreads();
#endif

    if (threadIdx.x >= 128) {
        if (lane_index() != 0) return;
        for (int step = 0; step < steps; step++) {
            const int s = step % STAGES;
            const sptr stage = smem_base() + s * STAGE_BYTES;
#ifndef FAULT_STAGE_NOT_EMPTY
            mbarrier_wait(empty + 8 * s, step / STAGES % 2 ^ 1);
#endif
#ifdef FAULT_BYTES
            mbarrier_expect(full + 8 * s, STAGE_BYTES + 16);
#else
            mbarrier_expect(full + 8 * s, STAGE_BYTES);
#endif
            tensor_load_2d(stage, a_map, full + 8 * s, step * 64, row0);
            if (B == K_MAJOR) {
                tensor_load_2d(stage + A_BYTES, b_map, full + 8 * s, step * 64, col0);
            } else {
                tensor_load_2d(stage + A_BYTES, b_map, full + 8 * s, col0, step * 64);
                tensor_load_2d(stage + A_BYTES + B_BYTES / 2, b_map, full + 8 * s, col0 + 64, step * 64);
            }
        }
        return;
    }

    float d[64];
    u32 left[4][4];
    for (int step = 0; step < steps; step++) {
        const int s = step % STAGES;
        const sptr a = smem_base() + s * STAGE_BYTES, b = a + A_BYTES;
#ifndef FAULT_STAGE_NOT_FULL
        mbarrier_wait(full + 8 * s, step / STAGES % 2);
#endif
        if (THROUGH_REGISTERS) {
            for (int i = 0; i < 4; i++) {
                const u32 row = threadIdx.x / 32 * 16 + lane_index() % 16, chunk = 2 * i + lane_index() / 16;
                ldmatrix_x4(left[i], a + row * 128 + ((chunk ^ row % 8) << 4));
            }
        }
        wgmma_operand(d);
#ifndef FAULT_NO_BATCH
        wgmma_fence();
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u64 right = B == K_MAJOR ? k_major(b + 32 * i) : mn_major(b + 2048 * i, B_BYTES / 2);
            if (THROUGH_REGISTERS) wgmma_registers<B>(d, left[i], right, step + i > 0);
            else wgmma<K_MAJOR, B>(d, k_major(a + 32 * i), right, step + i > 0);
        }
        wgmma_commit();
#ifdef FAULT_REGISTERS
        left[3][1] = 0;
#endif
#ifdef FAULT_ACCUMULATORS
        d[5] = 0.0f;
#endif
#ifdef FAULT_RELEASED_EARLY
        if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
        wgmma_wait<0>();
#elif defined(FAULT_RESULT_EARLY)
        if (step + 1 < steps) wgmma_wait<0>();
        if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
#else
        wgmma_wait<0>();
        // All warps have read what went through registers before one thread gives the stage back.
        if (THROUGH_REGISTERS) bar_sync(1, 128);
        if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * s);
#endif
        wgmma_operand(d);
    }
    const int row = row0 + threadIdx.x / 32 * 16 + lane_index() / 4, col = col0 + lane_index() % 4 * 2;
    for (int i = 0; i < 64; i++) {
        const int r = row + i % 4 / 2 * 8, j = col + i / 4 * 8 + i % 2;
        if (r < m && j < n) c[(size_t)r * n + j] = d[i];
    }
#ifdef FAULT_RESULT_EARLY
    wgmma_wait<0>();
#endif
}

KERNEL(160) box_product(float* c, TENSOR_MAP a, TENSOR_MAP b, int m, int n, int k) {
    box_product_body<K_MAJOR, false>(c, &a, &b, m, n, k);
}
EXPORT_KERNEL(box_product)

KERNEL(160) box_product_rows(float* c, TENSOR_MAP a, TENSOR_MAP b, int m, int n, int k) {
    box_product_body<MN_MAJOR, false>(c, &a, &b, m, n, k);
}
EXPORT_KERNEL(box_product_rows)

KERNEL(160) box_product_registers(float* c, TENSOR_MAP a, TENSOR_MAP b, int m, int n, int k) {
    box_product_body<K_MAJOR, true>(c, &a, &b, m, n, k);
}
EXPORT_KERNEL(box_product_registers)

// c [64, 64 * planes] f32 = a^T b, with a [64 k, 64 m] and b [64 k, planes, 64] bf16: A is M-major, and all of b is
// one box of three extents. A is stored by the threads themselves. One block of 128 threads; 8192 * (1 + planes) + 8
// bytes of shared memory.
template <int N> DEV void planes_body(float* c, const bf16* a, const TensorMap* b_map) {
    constexpr int PLANES = N / 64;
    const sptr full = smem_base() + 8192 * (1 + PLANES);
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init_fence();
        mbarrier_expect(full, 8192 * PLANES);
        for (int p = 0; p < PLANES; p++) tensor_load_3d(smem_base() + 8192 * (1 + p), b_map, full, 0, p, 0);
    }
    for (int i = threadIdx.x; i < 512; i += 128) {
        const int row = i / 8, chunk = i % 8;
        st_128(smem_ptr<u8>(row * 128 + ((chunk ^ row % 8) << 4)), ld_128(a + row * 64 + chunk * 8));
    }
#ifndef FAULT_NO_PROXY_FENCE
    fence_proxy_async();
#endif
    __syncthreads();
    mbarrier_wait(full, 0);
    float d[N / 2];
    wgmma_operand(d);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++)
        wgmma<MN_MAJOR, MN_MAJOR>(d, mn_major(smem_base() + 2048 * i, 0),
                                  mn_major(smem_base() + 8192 + 2048 * i, 8192), i > 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_operand(d);
    const int row = threadIdx.x / 32 * 16 + lane_index() / 4, col = lane_index() % 4 * 2;
    for (int i = 0; i < N / 2; i++) c[(row + i % 4 / 2 * 8) * N + col + i / 4 * 8 + i % 2] = d[i];
}

KERNEL(128) planes_1(float* c, const bf16* a, TENSOR_MAP b) { planes_body<64>(c, a, &b); }
EXPORT_KERNEL(planes_1)

KERNEL(128) planes_4(float* c, const bf16* a, TENSOR_MAP b) { planes_body<256>(c, a, &b); }
EXPORT_KERNEL(planes_4)
