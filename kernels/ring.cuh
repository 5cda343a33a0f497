// A block's product by two warpgroups (sm_90a alone): 128 rows of P times COLS columns of Q, whose operands a third
// warpgroup's first thread brings by tensor copies through a ring of stages, 64 of the summed index each.
//
//   all        Ring::make_barriers()
//   producer   threads from CONSUMERS on: registers_give<PRODUCER_REGISTERS>(); the first one: Ring::fill(...); return
//   consumers  registers_take<CONSUMER_REGISTERS>(); Ring::multiply(d, ...)
//
// Both count steps from `start` on: a block makes several products in turn by continuing the count, and the copies of
// the next product's first stages are under way while this one's results are looked at.
//
// Maps      of P [rows, K]: boxes of 128 x 64. Of Q: K_MAJOR is [columns, K], boxes of COLS x 64; MN_MAJOR is
//           [K, columns], boxes of 64 x 64. Both end where K does: beyond it copies bring zeros.
// Order     an element is one chain of m64nCOLSk16 steps over the summed index, ascending.
// Faults    FAULT_FULL, FAULT_EMPTY, FAULT_RELEASE, FAULT_SCALE
#pragma once
#include "hopper.cuh"

constexpr int ROWS = 128;       // of P, 64 to a warpgroup
constexpr int DEPTH = 64;       // of the summed index, per stage
constexpr int CONSUMERS = 256;  // threads
// Of 384 threads launched with 168 registers each.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;

DEV int steps_of(int count) { return (count + DEPTH - 1) / DEPTH; }

// Row and column, within the block, of a consumer's d[0]; `wgmma` says where the others are.
DEV int first_row() { return threadIdx.x / 32 * 16 + lane_index() / 4; }
DEV int first_column() { return lane_index() % 4 * 2; }

struct Operands {
    const TensorMap *p, *q;
};

template <int COLS, int STAGES> struct Ring {
    static constexpr u32 P_BYTES = ROWS * DEPTH * 2, Q_BYTES = COLS * DEPTH * 2, STAGE_BYTES = P_BYTES + Q_BYTES;
    static constexpr u32 PANEL_BYTES = 64 * DEPTH * 2;  // of 64 columns of Q, MN_MAJOR
    static constexpr u32 FULL = STAGES * STAGE_BYTES, EMPTY = FULL + 8 * STAGES, BYTES = EMPTY + 8 * STAGES;

    static DEV sptr stage_of(int step) { return smem_base() + step % STAGES * STAGE_BYTES; }
    static DEV sptr full_of(int step) { return smem_base() + FULL + step % STAGES * 8; }
    static DEV sptr empty_of(int step) { return smem_base() + EMPTY + step % STAGES * 8; }
    // Each stage is used once per phase.
    static DEV u32 phase_of(int step) { return step / STAGES % 2; }

    static DEV void make_barriers() {
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; s++) {
                mbarrier_init(full_of(s), 1);
                mbarrier_init(empty_of(s), CONSUMERS / 128);
            }
            // The copies, which count on them, are not threads: __syncthreads alone does not tell them.
            mbarrier_init_fence();
        }
        __syncthreads();
    }

    // Fills the stages of `steps` steps for the rows from row0 and the columns from col0 on: the first `low_steps` with
    // `low`, from its summed index 0 on, the others with `rest`, from `inner0` on.
    template <Major Q>
    static DEV void fill(int start, const Operands& low, int low_steps, const Operands& rest, int steps, int row0,
                         int col0, int inner0) {
        for (int step = 0; step < steps; step++) {
            const sptr stage = stage_of(start + step), full = full_of(start + step);
            // Both warpgroups are done with the products that read this stage. Parity 1 of a fresh barrier is complete:
            // the first round does not wait.
#ifndef FAULT_EMPTY
            mbarrier_wait(empty_of(start + step), phase_of(start + step) ^ 1);
#endif
            mbarrier_expect(full, STAGE_BYTES);
            const bool early = step < low_steps;
            const TensorMap *const p = early ? low.p : rest.p, *const q = early ? low.q : rest.q;
            const int inner = early ? step * DEPTH : inner0 + (step - low_steps) * DEPTH;
            tensor_load_2d(stage, p, full, inner, row0);
            if (Q == K_MAJOR) {
                tensor_load_2d(stage + P_BYTES, q, full, inner, col0);
            } else {
#pragma unroll
                for (int panel = 0; panel < COLS / 64; panel++)
                    tensor_load_2d(stage + P_BYTES + panel * PANEL_BYTES, q, full, col0 + 64 * panel, inner);
            }
        }
    }

    // One thread tells for its warpgroup: wgmma_wait is over for all of it at once.
    static DEV void release(int step) {
        if (threadIdx.x % 128 == 0) mbarrier_arrive(empty_of(step));
    }

    // d = the product of this warpgroup's 64 rows; what the first `scaled` steps give is multiplied by `scale` once.
    template <Major Q> static DEV void multiply(float (&d)[COLS / 2], int start, int scaled, float scale, int steps) {
        const u32 half = threadIdx.x / 128 * (P_BYTES / 2);
        for (int step = 0; step < steps; step++) {
            const sptr p = stage_of(start + step) + half, q = stage_of(start + step) + P_BYTES;
            // The bytes of this stage have come; what the copies wrote is visible to whoever has waited.
#ifndef FAULT_FULL
            mbarrier_wait(full_of(start + step), phase_of(start + step));
#endif
            if (step == scaled && scaled > 0) {
                // The batch before is still adding to d.
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
            for (int i = 0; i < DEPTH / 16; i++)
                wgmma<K_MAJOR, Q>(d, k_major(p + 32 * i),
                                  Q == K_MAJOR ? k_major(q + 32 * i) : mn_major(q + 2048 * i, PANEL_BYTES),
                                  step + i > 0);
            wgmma_commit();
#ifdef FAULT_RELEASE
            release(start + step);
            wgmma_wait<1>();
#else
            // The batch before this one is done, and its stage free.
            wgmma_wait<1>();
            if (step > 0) release(start + step - 1);
#endif
        }
        // The last batch: after it d is the threads' own, and its stage the producer's, who may be at the next product.
        wgmma_wait<0>();
        wgmma_operand(d);
#ifndef FAULT_RELEASE
        release(start + steps - 1);
#endif
    }
};
