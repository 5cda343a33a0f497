// The large products of lora_matmul.cu by warpgroups and tensor copies (sm_90a alone).
//
//   forward    y = or += x W^T + scale low B^T + bias
//
// Law       that of lora_matmul.cu: low B^T is summed, multiplied once by scale in f32, then x W^T is summed on top of
//           it in the same accumulators, then bias, then what was in y; one rounding at the store.
// Order     an element is one chain of m64n256k16 steps over the summed index, ascending, whatever m and the neighbours
//           are. What wgmma adds up within 16 is not what mma.sync does, bit for bit: rows that are too few for this
//           kernel may differ in last bits from the same rows in a large batch.
// Shapes    as there, where rows of x, W (k) and of low, B (rank) begin at multiples of 16 bytes: k and rank are
//           multiples of 8. What a step of 64 holds beyond k or rank is zero. The launcher takes the other kernels where
//           this does not hold.
// Block     128 x 256 results by two consumer warpgroups of 64 rows each; the first warp of a third fills a ring of four
//           stages, 64 summed indices each. A consumer keeps one batch of products under way while the next is asked for.
// Partners  hopper.cuh, src/cuda/ops/lora_matmul.rs (launcher), tests/kernels/lora_matmul.rs (reference)
// Faults    FAULT_FULL, FAULT_EMPTY, FAULT_RELEASE, FAULT_SCALE
#include "hopper.cuh"
#include "stores.cuh"

enum {
    ROWS = 128,
    COLS = 256,
    DEPTH = 64,
    STAGES = 4,
    P_BYTES = ROWS * DEPTH * 2,
    Q_BYTES = COLS * DEPTH * 2,
    STAGE_BYTES = P_BYTES + Q_BYTES,
    FULL = STAGES * STAGE_BYTES,
    EMPTY = FULL + 8 * STAGES
};

DEV sptr stage_of(int step) { return smem_base() + step % STAGES * STAGE_BYTES; }
DEV sptr full_of(int step) { return smem_base() + FULL + step % STAGES * 8; }
DEV sptr empty_of(int step) { return smem_base() + EMPTY + step % STAGES * 8; }
// Each stage is used once per phase.
DEV u32 phase_of(int step) { return step / STAGES % 2; }

DEV void make_barriers() {
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full_of(s), 1);
            mbarrier_init(empty_of(s), 2);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
}

// Fills the stages: first with the columns of (p0, q0), `low_steps` of them, then with those of (p, q).
DEV void fill(const TensorMap* p0, const TensorMap* q0, int low_steps, const TensorMap* p, const TensorMap* q, int steps,
              int row0, int col0) {
    for (int step = 0; step < steps; step++) {
        const sptr stage = stage_of(step), full = full_of(step);
#ifndef FAULT_EMPTY
        mbarrier_wait(empty_of(step), phase_of(step) ^ 1);
#endif
        mbarrier_expect(full, STAGE_BYTES);
        if (step < low_steps) {
            tensor_load_2d(stage, p0, full, step * DEPTH, row0);
            tensor_load_2d(stage + P_BYTES, q0, full, step * DEPTH, col0);
        } else {
            tensor_load_2d(stage, p, full, (step - low_steps) * DEPTH, row0);
            tensor_load_2d(stage + P_BYTES, q, full, (step - low_steps) * DEPTH, col0);
        }
    }
}

DEV void release(int step) {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(empty_of(step));
}

// The chain of this warpgroup's 64 rows.
DEV void multiply(float (&d)[COLS / 2], int low_steps, float scale, int steps) {
    const u32 half = threadIdx.x / 128 * (P_BYTES / 2);
    for (int step = 0; step < steps; step++) {
        const sptr p = stage_of(step) + half, q = stage_of(step) + P_BYTES;
#ifndef FAULT_FULL
        mbarrier_wait(full_of(step), phase_of(step));
#endif
        if (step == low_steps && low_steps > 0) {
#ifndef FAULT_SCALE
            wgmma_wait<0>();
#endif
            wgmma_operand(d);
#pragma unroll
            for (int i = 0; i < COLS / 2; i++) d[i] *= scale;
        }
        wgmma_operand(d);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) wgmma(d, k_major(p + 32 * i), k_major(q + 32 * i), step + i > 0);
        wgmma_commit();
#ifdef FAULT_RELEASE
        release(step);
        wgmma_wait<1>();
#else
        // The batch before this one is done, and its stage free.
        wgmma_wait<1>();
        if (step > 0) release(step - 1);
#endif
    }
    wgmma_wait<0>();
    wgmma_operand(d);
}

// y. Grid: ceil(m/128) * ceil(n/256), in bands; 384 threads.
HOPPER_KERNEL(384) lora_matmul_forward_hopper(bf16* y, TENSOR_MAP x, TENSOR_MAP w, const float* bias, TENSOR_MAP low,
                                       TENSOR_MAP b, int m, int n, int k, int rank, float scale, int add) {
    const Spot spot = spot_of(blockIdx.x, (m + ROWS - 1) / ROWS, (n + COLS - 1) / COLS);
    const int row0 = spot.row * ROWS, col0 = spot.col * COLS;
    const int low_steps = (rank + DEPTH - 1) / DEPTH, steps = low_steps + (k + DEPTH - 1) / DEPTH;
    make_barriers();
    if (threadIdx.x >= 256) {
        registers_give<40>();
        if (threadIdx.x == 256) fill(&low, &b, low_steps, &x, &w, steps, row0, col0);
        return;
    }
    registers_take<232>();
    float d[COLS / 2];
    multiply(d, low_steps, scale, steps);
    const int row = row0 + threadIdx.x / 32 * 16 + lane_index() / 4, left = col0 + lane_index() % 4 * 2;
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) {
        const int col = left + 8 * j;
        const float first = bias && col < n ? bias[col] : 0.0f, second = bias && col + 1 < n ? bias[col + 1] : 0.0f;
        store_bf16(y, m, n, row, col, d[4 * j] + first, d[4 * j + 1] + second, add);
        store_bf16(y, m, n, row + 8, col, d[4 * j + 2] + first, d[4 * j + 3] + second, add);
    }
}
EXPORT_KERNEL(lora_matmul_forward_hopper)
