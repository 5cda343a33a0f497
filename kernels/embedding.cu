// Embedding: rows of a table, and their gradient.
//
//   y[t] = W[ids[t]]
//   dW[id] += sum over the t with ids[t] == id of dy[t], t ascending
//
// Shapes    y, dy [T, H] bf16; W [V, H] bf16, dW [V, H] f32; ids [T] u32, each below V.
// Writes    y is overwritten (=); the rows of dW that occur are added to (+=), no other is touched.
//           A row of y whose id is not below V becomes NaN: nothing beyond the table is read.
// Numerics  y has the bits of W. dW is one chain of f32 additions in the order of the tokens, so its bits are
//           those of the CPU's, and need no atomics: the host sorts the occurrences by id.
// Grid      forward: a thread per up to eight elements of a row of y, 256 a block. Backward: a block per distinct
//           id and 1024 columns, a thread per eight columns. Any sizes.
// Moves     forward 4 bytes per element of y. Backward 2 per element of dy, 8 per element of the rows touched.
// Partners  src/tensor/ops/embedding.rs (reference), src/cuda/ops/embedding.rs (launcher, the sorting),
//           tests/kernels/embedding.rs
#include "eight.cuh"

KERNEL(256) embedding_forward(bf16* __restrict__ y, const bf16* __restrict__ table, const u32* __restrict__ ids,
                              int tokens, int width, int vocabulary) {
    const int groups = (width + 7) / 8;
    // A unit is (token, group of columns); the launcher sees to it that there are fewer than 2^31.
    const u32 unit = blockIdx.x * 256 + threadIdx.x;
    const u32 token = unit / (u32)groups;
    if (token >= (u32)tokens) return;
    const int first = (int)(unit - token * groups) * 8, count = up_to_eight(width - first);
    bf16* to = y + (size_t)token * width + first;
    const u32 id = ids[token];
    if (id < (u32)vocabulary)
        copy8(to, table + (size_t)id * width + first, count);
    else
        spoil8(to, count);
}
EXPORT_KERNEL(embedding_forward)

// `order` names the tokens, those of distinct[0] first; those of distinct[i] are order[starts[i]..starts[i + 1]].
KERNEL(128) embedding_backward(float* __restrict__ dw, const bf16* __restrict__ dy, const u32* __restrict__ distinct,
                               const u32* __restrict__ starts, const u32* __restrict__ order, int width) {
    const size_t first = ((size_t)blockIdx.y * 128 + threadIdx.x) * 8;
    if (first >= (size_t)width) return;
    const int count = up_to_eight(width - first);
    float* to = dw + (size_t)distinct[blockIdx.x] * width + first;
    float sum[8], term[8];
    load8(sum, to, count);
    const u32 end = starts[blockIdx.x + 1];
    for (u32 k = starts[blockIdx.x]; k < end; k++) {
        load8(term, dy + (size_t)order[k] * width + first, count);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += term[i];
    }
    store8(to, sum, count);
}
EXPORT_KERNEL(embedding_backward)
