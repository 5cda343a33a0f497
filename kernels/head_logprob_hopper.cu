// The large products of head_logprob.cu by warpgroups and tensor copies (sm_90a alone).
//
//   forward    logit = low B^T + h W^T; of each row and span of 1024 entries (max, sum, weighted), the target's logit
//              and the most likely entries
//   slopes     logit once more; slope = dlogprob ([v = target] - e^(logit - lse)), bf16
//   through    part = or += slope W
//
// Law       that of head_logprob.cu, and its buffers: `head_low`, `head_finish`, `head_fold`, `head_outer` and `up`
//           come from there. low has its scale in it; low B^T is summed first, then h W^T in the same accumulators.
// Order     a logit, or an element of a part, is one chain of m64n256k16 steps over the summed index, ascending. The
//           four threads that hold a row sum over a span, tile after tile, and are joined in one order: a row's bits
//           do not depend on R or on the other rows. Last bits may differ from those of head_logprob.cu.
// Why       two kernels for dh and not one: dh of 64 rows is 64 x H sums, which no warpgroup's registers hold. A kernel
//           that made slopes and multiplied them at once would have to add to memory after every tile, or to make each
//           logit again for every 256 columns of dh. Slopes of a span pass through the L2 cache instead, as there.
// Shapes    as there, with H and r multiples of 8 (or no LoRA); any R and V. The launcher takes the other kernels else.
// Block     128 rows x 256 entries (columns of dh) by two consumer warpgroups and a producer, through a ring of four
//           stages (ring.cuh); three beside lists. A block of forward and slopes makes four such tiles in turn: while a
//           tile's logits become sums or slopes, the next one's operands are on their way. blockIdx.x counts tiles of
//           rows, so that blocks that run together read the same rows of W.
// Partners  ring.cuh, head.cuh, src/cuda/ops/head_logprob.rs (launcher), tests/kernels/head_logprob.rs
// Faults    those of ring.cuh and head.cuh; FAULT_NO_MASK, FAULT_NO_TOP_BARRIER
#include "head.cuh"
#include "ring.cuh"
#include "stores.cuh"

constexpr int COLS = 256;
typedef Ring<COLS, 4> Stages;

static_assert(ROWS == HEAD_ROWS && FORWARD_SPAN % COLS == 0 && BACKWARD_SPAN % DEPTH == 0, "no tile crosses a span");

// The logits of a block's rows and one span of entries, tile by tile.
struct Span {
    int row0, entry0, tiles, low_steps, steps;
};

// `entries` is how many there are in all.
DEV Span span_of_block(int entries, int hidden, int rank) {
    Span s;
    s.row0 = blockIdx.x * ROWS, s.entry0 = blockIdx.y * FORWARD_SPAN;
    s.tiles = (min(FORWARD_SPAN, entries - s.entry0) + COLS - 1) / COLS;
    s.low_steps = steps_of(rank), s.steps = s.low_steps + steps_of(hidden);
    return s;
}

// The producer warpgroup's part.
template <class R> DEV void produce(const Span& s, const Operands& low, const Operands& all) {
    registers_give<PRODUCER_REGISTERS>();
    if (threadIdx.x != CONSUMERS) return;
    for (int tile = 0; tile < s.tiles; tile++)
        R::template fill<K_MAJOR>(tile * s.steps, low, s.low_steps, all, s.steps, s.row0, s.entry0 + tile * COLS, 0);
}

// Enters this warpgroup's rows of a tile of logits, whose first column is entry `column0`; `own_row` as in
// `empty_lists`.
DEV void list_tile(const Lists& x, const float (&d)[COLS / 2], int own_row, int column0, int vocabulary) {
    for (int strip = 0; strip < COLS / STRIP; strip++) {
        // All threads write down what they hold of the strip, then the lists' owners look it through. The number of the
        // strip is compared, not used: registers have no addresses.
#pragma unroll
        for (int s = 0; s < COLS / STRIP; s++)
            if (s == strip) {
#pragma unroll
                for (int i = 0; i < STRIP / 2; i++)
                    x.strip[(first_row() + i % 4 / 2 * 8) * STRIP_STRIDE + first_column() + i / 4 * 8 + i % 2] =
                        d[s * (STRIP / 2) + i];
            }
        // Rows of the other warpgroup are its own affair. Number 0 is __syncthreads.
        bar_sync(1 + threadIdx.x / 128, 128);
        const int first = column0 + strip * STRIP;
        if (own_row >= 0)
            for (int j = 0; j < STRIP && first + j < vocabulary; j++)
                enter(x, own_row, x.strip[own_row * STRIP_STRIDE + j], (u32)(first + j));
        // The strip has been read before the next one is written over it.
#ifndef FAULT_NO_TOP_BARRIER
        bar_sync(1 + threadIdx.x / 128, 128);
#endif
    }
}

template <bool TOP>
DEV void forward(float* part, float* target_logit, float* top_value, u32* top_id, const Operands& all,
                 const Operands& low, const u32* targets, int rows, int vocabulary, int hidden, int rank,
                 int top_count) {
    typedef Ring<COLS, TOP ? 3 : 4> R;
    const Span s = span_of_block(vocabulary, hidden, rank);
    R::make_barriers();
    if (threadIdx.x >= CONSUMERS) return produce<R>(s, low, all);
    registers_take<CONSUMER_REGISTERS>();

    // Half of a warpgroup's threads own a row's list each.
    const int in_group = threadIdx.x % 128, own_row = in_group < 64 ? (int)threadIdx.x / 128 * 64 + in_group : -1;
    Lists lists;
    if constexpr (TOP) lists = empty_lists(R::BYTES, own_row, top_count);

    Sum seen[2];
    u32 target[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = s.row0 + first_row() + 8 * half;
        seen[half] = nothing();
        target[half] = row < rows ? targets[row] : NO_ID;
    }
    float d[COLS / 2];
    for (int tile = 0; tile < s.tiles; tile++) {
        R::template multiply<K_MAJOR>(d, tile * s.steps, 0, 1.0f, s.steps);
        const int column0 = s.entry0 + tile * COLS, left = column0 + first_column();
#ifndef FAULT_NO_MASK
        const bool edge = column0 + COLS > vocabulary;
#else
        const bool edge = false;
#endif
        if (edge) {
#pragma unroll
            for (int i = 0; i < COLS / 2; i++)
                if (left + i / 4 * 8 + i % 2 >= vocabulary) d[i] = -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = s.row0 + first_row() + 8 * half;
            float own[COLS / 4];
#pragma unroll
            for (int i = 0; i < COLS / 4; i++) own[i] = d[i / 2 * 4 + half * 2 + i % 2];
            // One thread has it; rows that do not exist look for NO_ID, which may not be an entry.
            if (row < rows && target[half] - (u32)column0 < (u32)COLS && target[half] < (u32)vocabulary) {
#pragma unroll
                for (int i = 0; i < COLS / 4; i++)
                    if ((u32)(left + i / 2 * 8 + i % 2) == target[half]) target_logit[row] = own[i];
            }
            see(seen[half], own);
        }
        if constexpr (TOP) list_tile(lists, d, own_row, column0, vocabulary);
    }

    // The four threads of a row are neighbours in a warp.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        merge_with_lane(seen[half], 1);
        merge_with_lane(seen[half], 2);
        const int row = s.row0 + first_row() + 8 * half;
        if (row >= rows || threadIdx.x % 4) continue;
        float* const to = part + ((size_t)row * gridDim.y + blockIdx.y) * 3;
        to[0] = seen[half].max, to[1] = seen[half].sum, to[2] = seen[half].weighted;
    }
    if constexpr (TOP) {
        if (own_row < 0 || s.row0 + own_row >= rows) return;
        const size_t slot = ((size_t)(s.row0 + own_row) * gridDim.y + blockIdx.y) * top_count;
        for (int i = 0; i < top_count; i++) {
            top_value[slot + i] = lists.value[i * HEAD_ROWS + own_row];
            top_id[slot + i] = lists.id[i * HEAD_ROWS + own_row];
        }
    }
}

// Grid: tiles of rows x spans of 1024 entries.
HOPPER_KERNEL(384) head_forward_hopper(float* part, float* target_logit, TENSOR_MAP h, TENSOR_MAP w, TENSOR_MAP low,
                                TENSOR_MAP b, const u32* targets, int rows, int vocabulary, int hidden, int rank) {
    forward<false>(part, target_logit, nullptr, nullptr, Operands{&h, &w}, Operands{&low, &b}, targets, rows,
                   vocabulary, hidden, rank, 0);
}
EXPORT_KERNEL(head_forward_hopper)

// The same with lists; needs 16.5 KiB and 1 KiB per place of a list more of shared memory than three stages.
HOPPER_KERNEL(384) head_forward_top_hopper(float* part, float* target_logit, float* top_value, u32* top_id, TENSOR_MAP h,
                                    TENSOR_MAP w, TENSOR_MAP low, TENSOR_MAP b, const u32* targets, int rows,
                                    int vocabulary, int hidden, int rank, int top_count) {
    forward<true>(part, target_logit, top_value, top_id, Operands{&h, &w}, Operands{&low, &b}, targets, rows,
                  vocabulary, hidden, rank, top_count);
}
EXPORT_KERNEL(head_forward_top_hopper)

// slope [R,stride], as `head_slopes`: for `entries` entries, the first of which is number `first` of the vocabulary and
// row 0 of w and b; zeros from there up to `stride`, a multiple of 8. Grid: tiles of rows x 1024 entries.
HOPPER_KERNEL(384) head_slopes_hopper(bf16* slope, TENSOR_MAP h, TENSOR_MAP w, TENSOR_MAP low, TENSOR_MAP b,
                               const u32* targets, const float* dlogprob, const float* lse, int rows, int entries,
                               int first, int hidden, int rank, int stride) {
    const Span s = span_of_block(entries, hidden, rank);
    Stages::make_barriers();
    if (threadIdx.x >= CONSUMERS) return produce<Stages>(s, Operands{&low, &b}, Operands{&h, &w});
    registers_take<CONSUMER_REGISTERS>();

    float factor[2], total[2];
    u32 target[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = s.row0 + first_row() + 8 * half;
        const bool exists = row < rows;
        factor[half] = exists ? dlogprob[row] : 0.0f, total[half] = exists ? lse[row] : 0.0f;
        target[half] = exists ? targets[row] - (u32)first : NO_ID;
    }
    float d[COLS / 2];
    for (int tile = 0; tile < s.tiles; tile++) {
        Stages::multiply<K_MAJOR>(d, tile * s.steps, 0, 1.0f, s.steps);
        const int left = s.entry0 + tile * COLS + first_column();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = s.row0 + first_row() + 8 * half;
            if (row >= rows) continue;
#pragma unroll
            for (int j = 0; j < COLS / 8; j++) {
                const int column = left + 8 * j;
                if (column >= stride) continue;
                float g[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float hit = (u32)(column + k) == target[half] ? 1.0f : 0.0f;
                    const float p = power(d[4 * j + 2 * half + k] - total[half]);
                    g[k] = column + k < entries ? factor[half] * (hit - p) : 0.0f;
                }
                *reinterpret_cast<u32*>(slope + (size_t)row * stride + column) = pack_bf16(g[0], g[1]);
            }
        }
    }
}
EXPORT_KERNEL(head_slopes_hopper)

// part [z][R,N], as `head_through`: = or += (`add`, with one z only) the product of a [R,K] and m [K,N], over the z-th
// 8192 of K. Grid: tiles of rows x tiles of N x spans of K.
HOPPER_KERNEL(384) head_through_hopper(float* part, TENSOR_MAP a, TENSOR_MAP m, int rows, int inner, int columns, int add) {
    const int row0 = blockIdx.x * ROWS, col0 = blockIdx.y * COLS, inner0 = blockIdx.z * BACKWARD_SPAN;
    const int steps = steps_of(min(BACKWARD_SPAN, inner - inner0));
    const Operands all = {&a, &m};
    Stages::make_barriers();
    if (threadIdx.x >= CONSUMERS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMERS) Stages::fill<MN_MAJOR>(0, all, 0, all, steps, row0, col0, inner0);
        return;
    }
    registers_take<CONSUMER_REGISTERS>();
    float d[COLS / 2];
    Stages::multiply<MN_MAJOR>(d, 0, 0, 1.0f, steps);
    float* const to = part + (size_t)blockIdx.z * rows * columns;
    const int row = row0 + first_row(), left = col0 + first_column();
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) {
        store_f32(to, rows, columns, row, left + 8 * j, d[4 * j], d[4 * j + 1], add);
        store_f32(to, rows, columns, row + 8, left + 8 * j, d[4 * j + 2], d[4 * j + 3], add);
    }
}
EXPORT_KERNEL(head_through_hopper)
