// The large products of lora_matmul.cu by warpgroups and tensor copies (sm_90a alone).
//
//   forward    y = or += x W^T + scale low B^T + bias
//   backward   dx = or += dy W + dlow A
//
// Law       that of lora_matmul.cu: low B^T is summed, multiplied once by scale in f32, then x W^T is summed on top of
//           it in the same accumulators, then bias, then what was in y; one rounding at the store. dlow, which has its
//           scale already, times A is summed, then dy W on top of it, then what was in dx.
// Order     an element is one chain of m64n256k16 steps over the summed index, ascending, whatever m and the neighbours
//           are. What wgmma adds up within 16 is not what mma.sync does, bit for bit: rows that are too few for the
//           forward kernel may differ in last bits from the same rows in a large batch. dx is made here for any m.
// Shapes    as there, where rows of the operands begin at multiples of 16 bytes: k and rank are multiples of 8, and n
//           for dx. What a step of 64 holds beyond the summed index is zero. The launcher takes the other kernels where
//           this does not hold.
// Block     128 x 256 results by two consumer warpgroups of 64 rows each and a producer, through a ring of four stages
//           of 64 summed indices each (ring.cuh). A consumer keeps one batch of products under way while the next is
//           asked for. W and A of dx are [summed, columns]: four panels of 64 columns a stage, read MN-major.
// Partners  ring.cuh, src/cuda/ops/lora_matmul.rs (launcher), tests/kernels/lora_matmul.rs (reference)
// Faults    planted in ring.cuh
#include "ring.cuh"
#include "stores.cuh"

constexpr int COLS = 256;
typedef Ring<COLS, 4> Stages;

// y. Grid: ceil(m/128) * ceil(n/256), in bands; 384 threads.
HOPPER_KERNEL(384) lora_matmul_forward_hopper(bf16* y, TENSOR_MAP x, TENSOR_MAP w, const float* bias, TENSOR_MAP low,
                                       TENSOR_MAP b, int m, int n, int k, int rank, float scale, int add) {
    const Spot spot = spot_of(blockIdx.x, (m + ROWS - 1) / ROWS, (n + COLS - 1) / COLS);
    const int row0 = spot.row * ROWS, col0 = spot.col * COLS;
    const int low_steps = steps_of(rank), steps = low_steps + steps_of(k);
    Stages::make_barriers();
    if (threadIdx.x >= CONSUMERS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS)
            Stages::fill<K_MAJOR>(0, Operands{&low, &b}, low_steps, Operands{&x, &w}, steps, row0, col0, 0);
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    float d[COLS / 2];
    Stages::multiply<K_MAJOR>(d, 0, low_steps, scale, steps);
    const int row = row0 + first_row(), left = col0 + first_column();
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) {
        const int col = left + 8 * j;
        const float first = bias && col < n ? bias[col] : 0.0f, second = bias && col + 1 < n ? bias[col + 1] : 0.0f;
        store_bf16(y, m, n, row, col, d[4 * j] + first, d[4 * j + 1] + second, add);
        store_bf16(y, m, n, row + 8, col, d[4 * j + 2] + first, d[4 * j + 3] + second, add);
    }
}
EXPORT_KERNEL(lora_matmul_forward_hopper)

// dx. Grid: ceil(m/128) * ceil(k/256), in bands; 384 threads.
HOPPER_KERNEL(384) lora_matmul_dx_hopper(bf16* dx, TENSOR_MAP dy, TENSOR_MAP w, TENSOR_MAP dlow, TENSOR_MAP a, int m, int n,
                                  int k, int rank, int add) {
    const Spot spot = spot_of(blockIdx.x, (m + ROWS - 1) / ROWS, (k + COLS - 1) / COLS);
    const int row0 = spot.row * ROWS, col0 = spot.col * COLS;
    const int low_steps = steps_of(rank), steps = low_steps + steps_of(n);
    Stages::make_barriers();
    if (threadIdx.x >= CONSUMERS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS)
            Stages::fill<MN_MAJOR>(0, Operands{&dlow, &a}, low_steps, Operands{&dy, &w}, steps, row0, col0, 0);
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    float d[COLS / 2];
    Stages::multiply<MN_MAJOR>(d, 0, 0, 1.0f, steps);
    const int row = row0 + first_row(), left = col0 + first_column();
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) {
        store_bf16(dx, m, k, row, left + 8 * j, d[4 * j], d[4 * j + 1], add);
        store_bf16(dx, m, k, row + 8, left + 8 * j, d[4 * j + 2], d[4 * j + 3], add);
    }
}
EXPORT_KERNEL(lora_matmul_dx_hopper)
