// The language-model head: linear + LoRA + log-softmax + gather, forward and backward.
//
//   logit[r,v] = h[r] . W[v] + low[r] . B[v]          low = s * h A^T
//   lse[r] = ln sum_v e^logit[r,v]        logprob[r] = logit[r, target[r]] - lse[r]
//   entropy[r] = lse[r] - sum_v p[r,v] logit[r,v]     p = softmax(logit)
//   slope[r,v] = dlogprob[r] * ([v = target[r]] - p[r,v])       up = s * slope B
//   dh = slope W + up A     da += up^T h     db += slope^T low     dw += slope^T h
//
// Shapes    h, dh [R,H], W [V,H], A [r,H], B [V,r] bf16 row-major; targets [R] u32; dlogprob, logprob, lse,
//           entropy [R], da [r,H], db [V,r], dw [V,H] f32. low and up [R,L] are bf16 scratch, L = r rounded up
//           to a multiple of 8. Any R, V, H, r >= 1; where H or r is no multiple of 8, rows do not start at a
//           multiple of 16 bytes and are copied element by element.
// Writes    dh is overwritten (=); da, db and dw are added to (+=); everything else is overwritten.
// Logits    exist in registers only. The slopes of one tile of at most 2048 rows times spans of 8192 entries go
//           through scratch memory as bf16: at most 32 MiB whatever R and V, small enough for a large L2 cache.
//           Three products read them, so that nothing is computed twice.
// Numerics  f32 sums of bf16 products. Rounded to bf16: low, slope, up, dh, once each. The sum over the vocabulary
//           is made in pieces whose borders depend on nothing but the entry: in the forward pass spans of 1024
//           entries, in the backward pass spans of 8192. Pieces are combined in a fixed order, without atomics:
//           same bits for every schedule, and a row's results do not depend on R or on the other rows.
// Grid      256 threads make a 128 x 128 tile of a product, each of 8 warps 64 x 32 of it, with 32 of the inner
//           dimension at a time through three stages of shared memory (48 KiB). blockIdx.x counts tiles of rows,
//           so that blocks that run together read the same rows of W.
// Partners  head.cuh, head_logprob_hopper.cu, src/tensor/ops/head_logprob.rs (reference),
//           src/cuda/ops/head_logprob.rs (launcher, which order the kernels run in), tests/kernels/head_logprob.rs
#include "head.cuh"

// A test compiles with one of the FAULT_ macros of this file or head.cuh defined and demands that the emulator, or
// the comparison with the reference, notices.

constexpr int THREADS = 256;
constexpr int TILE = HEAD_ROWS;                 // rows and columns of a block's product
constexpr int STEP = 32;                        // of the inner dimension, per stage
constexpr int STAGES = 3;
constexpr u32 OPERAND = TILE * STEP * 2;        // bytes of one operand's part of a stage
constexpr u32 PIPELINE = STAGES * 2 * OPERAND;  // bytes of all stages

DEV int tiles_of(int count, int tile) { return (count + tile - 1) / tile; }

// ---- Operands -------------------------------------------------------------------------------------------------

// A row-major matrix of which a tile may hang over the edge: what does not exist is zero.
struct Matrix {
    const bf16* data;
    int rows, columns, stride;
};

// Where 16-byte piece `piece` of a row lies. A tile is TALL, 128 rows of 32 elements, when the inner dimension is
// the matrix's columns; else it has 32 rows of 128. Pieces are permuted within 128 bytes or more, so that the
// same piece of 8 rows in turn, which ldmatrix reads at once, lies in 8 different groups of banks.
template <bool TALL> DEV u32 place(int row, int piece) {
    return TALL ? (u32)(row * 4 + (piece ^ ((row >> 1) & 3))) * 16 : (u32)(row * 16 + (piece ^ (row & 7))) * 16;
}

// Starts to copy the tile whose first element is (row0, column0) to shared memory at `at`.
template <bool TALL> DEV void start_copy(u32 at, const Matrix& m, int row0, int column0) {
    constexpr int PIECES = TALL ? STEP / 8 : TILE / 8;
    const bool whole = m.stride % 8 == 0 && m.columns % 8 == 0;
#pragma unroll
    for (int i = 0; i < TILE * STEP / 8 / THREADS; i++) {
        const int index = i * THREADS + threadIdx.x;
        const int row = row0 + index / PIECES, column = column0 + index % PIECES * 8;
        const u32 to = at + place<TALL>(index / PIECES, index % PIECES);
#ifndef FAULT_NO_ROW_BOUND
        const bool row_exists = row < m.rows;
#else
        const bool row_exists = true;
#endif
        if (whole) {
            const bool exists = row_exists && column < m.columns;
            cp_async16(smem_base() + to, m.data + (exists ? (size_t)row * m.stride + column : 0), exists);
            continue;
        }
        u32 pair[4];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            u32 half[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int c = column + 2 * p + e;
                half[e] = row_exists && c < m.columns ? m.data[(size_t)row * m.stride + c].x : 0u;
            }
            pair[p] = half[0] | half[1] << 16;
        }
        uint4 packed;
        packed.x = pair[0], packed.y = pair[1], packed.z = pair[2], packed.w = pair[3];
        st_128(smem_ptr<uint4>(to), packed);
    }
}

// ---- Products -------------------------------------------------------------------------------------------------

// A thread's 64 elements of its block's tile: c[i][j][e] is row `row + 16 i + 8 (e / 2)` and
// column `column + 8 j + e % 2`.
typedef float Accumulator[4][4][4];

struct Place {
    int warp_row, warp_column, lane, row, column;
};

DEV Place place_of_thread() {
    Place at;
    const int warp = threadIdx.x / 32;
    at.lane = threadIdx.x % 32;
    at.warp_row = warp / 4 * 64;
    at.warp_column = warp % 4 * 32;
    at.row = at.warp_row + at.lane / 4;
    at.column = at.warp_column + at.lane % 4 * 2;
    return at;
}

// c += one stage. The left operand at `a` is [rows, inner] if LEFT_TALL, else [inner, rows]; the right operand
// at `b` is [columns, inner] if RIGHT_TALL, else [inner, columns].
template <bool LEFT_TALL, bool RIGHT_TALL> DEV void multiply(Accumulator& c, u32 a, u32 b, const Place& at) {
    const sptr left = smem_base() + a, right = smem_base() + b;
    const int low = at.lane & 7, middle = (at.lane >> 3) & 1, high = at.lane >> 4;
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
        u32 x[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = at.warp_row + 16 * i;
            if (LEFT_TALL)
                ldmatrix_x4(x[i], left + place<true>(row + low + 8 * middle, 2 * k + high));
            else
                ldmatrix_x4_trans(x[i], left + place<false>(16 * k + low + 8 * high, row / 8 + middle));
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 y[4];
            const int column = at.warp_column + 16 * j;
            if (RIGHT_TALL)
                ldmatrix_x4(y, right + place<true>(column + low + 8 * high, 2 * k + middle));
            else
                ldmatrix_x4_trans(y, right + place<false>(16 * k + low + 8 * middle, column / 8 + high));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_bf16_16816(c[i][2 * j], x[i], y[0], y[1]);
                mma_bf16_16816(c[i][2 * j + 1], x[i], y[2], y[3]);
            }
        }
    }
}

// Makes `tiles` products of `steps` stages each, one after the other. start(tile, step, at) starts the copies of a
// stage to `at` (left operand) and `at + OPERAND`; done(tile, c) gets a finished product. All are one pipeline:
// the copies for a tile's first stages are under way while the tile before is finished.
template <bool LEFT_TALL, bool RIGHT_TALL, class Start, class Done>
DEV void products(int tiles, int steps, const Place& at, const Start& start, const Done& done) {
    const int stages = tiles * steps;
    int next_tile = 0, next_step = 0;
    u32 write = 0, read = 0;
    auto start_next = [&]() {
        if (next_tile < tiles) {
            start(next_tile, next_step, write);
            if (++next_step == steps) next_step = 0, next_tile++;
            write = write + 2 * OPERAND == PIPELINE ? 0 : write + 2 * OPERAND;
        }
        // Also without copies, so that the count of groups under way stays the same up to the end.
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) start_next();

    Accumulator c = {};
    int tile = 0, step = 0;
    for (int stage = 0; stage < stages; stage++) {
#ifndef FAULT_LAX_WAIT
        cp_async_wait<STAGES - 2>();
#else
        cp_async_wait<STAGES - 1>();
#endif
        // This stage's copies of all threads have arrived, and all threads are done with the stage before, whose
        // place the next copies take.
#ifndef FAULT_NO_BARRIER
        __syncthreads();
#endif
        start_next();
        multiply<LEFT_TALL, RIGHT_TALL>(c, read, read + OPERAND, at);
        read = read + 2 * OPERAND == PIPELINE ? 0 : read + 2 * OPERAND;
        if (++step == steps) {
            done(tile, c);
            step = 0, tile++;
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) c[i][j][e] = 0.0f;
        }
    }
}

// Logits of one tile of rows and `tiles` tiles of entries from `entry0` on. LoRA is a longer inner dimension:
// [h, low] [W, B]^T.
template <class Done>
DEV void logits(const Matrix& h, const Matrix& w, const Matrix& low, const Matrix& b, int row0, int entry0, int tiles,
                const Place& at, const Done& done) {
    const int own = tiles_of(h.columns, STEP), steps = own + tiles_of(b.columns, STEP);
    products<true, true>(tiles, steps, at, [&](int tile, int step, u32 to) {
        const int entry = entry0 + tile * TILE;
        if (step < own) {
            start_copy<true>(to, h, row0, step * STEP);
            start_copy<true>(to + OPERAND, w, entry, step * STEP);
        } else {
            start_copy<true>(to, low, row0, (step - own) * STEP);
            start_copy<true>(to + OPERAND, b, entry, (step - own) * STEP);
        }
    }, done);
}

// ---- Lists of the most likely entries --------------------------------------------------------------------------

// Enters a tile of logits, whose first column is entry `column0`.
DEV void list_tile(const Lists& x, const Accumulator& c, const Place& at, int column0, int vocabulary) {
    const int own_row = threadIdx.x;
    for (int first = 0; first < TILE; first += STRIP) {
        // The warps whose columns the strip is write it down, then the lists' owners look it through.
        if (at.warp_column == first) {
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    x.strip[(at.row + 8 * i) * STRIP_STRIDE + at.lane % 4 * 2 + j / 2 * 8 + j % 2] =
                        c[i / 2][j / 2][i % 2 * 2 + j % 2];
        }
        __syncthreads();
        if (own_row < TILE)
            for (int j = 0; j < STRIP && column0 + first + j < vocabulary; j++)
                enter(x, own_row, x.strip[own_row * STRIP_STRIDE + j], (u32)(column0 + first + j));
#ifndef FAULT_NO_TOP_BARRIER
        __syncthreads();
#endif
    }
}

// ---- Kernels ----------------------------------------------------------------------------------------------------

// low [R,L] = s * h A^T, zeros in the columns from r on. Grid: tiles of rows x tiles of r.
KERNEL(256) head_low(bf16* low, const bf16* h, const bf16* a, int rows, int hidden, int rank, int low_stride,
                     float scale) {
    const Place at = place_of_thread();
    const int row0 = blockIdx.x * TILE, column0 = blockIdx.y * TILE;
    const Matrix left = {h, rows, hidden, hidden}, right = {a, rank, hidden, hidden};
    products<true, true>(1, tiles_of(hidden, STEP), at, [&](int, int step, u32 to) {
        start_copy<true>(to, left, row0, step * STEP);
        start_copy<true>(to + OPERAND, right, column0, step * STEP);
    }, [&](int, const Accumulator& c) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int row = row0 + at.row + 16 * i + 4 * e;
                if (row >= rows) continue;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int column = column0 + at.column + 8 * j;
                    // Rows of A beyond r were read as zeros; L is even.
                    if (column < low_stride)
                        *reinterpret_cast<u32*>(low + (size_t)row * low_stride + column) =
                            pack_bf16(scale * c[i][j][e], scale * c[i][j][e + 1]);
                }
            }
    });
}
EXPORT_KERNEL(head_low)

// For a tile of rows and a span of entries: part[row,span] = (max, sum, weighted); target_logit[row] where the
// target is in the span; with TOP also the span's `count` most likely entries, top_*[row,span,*], in order.
template <bool TOP>
DEV void forward(float* part, float* target_logit, float* top_value, u32* top_id, const bf16* h, const bf16* w,
                 const bf16* low, const bf16* b, const u32* targets, int rows, int vocabulary, int hidden, int rank,
                 int low_stride, int top_count) {
    const Place at = place_of_thread();
    const int row0 = blockIdx.x * TILE, span = blockIdx.y, spans = gridDim.y, entry0 = span * FORWARD_SPAN;
    const int tiles = tiles_of(min(FORWARD_SPAN, vocabulary - entry0), TILE);

    Lists lists;
    if constexpr (TOP) lists = empty_lists(PIPELINE, threadIdx.x < TILE ? (int)threadIdx.x : -1, top_count);

    // Every thread sums over the columns it holds, for each of its eight rows; threads meet only at the end.
    Sum seen[8];
#pragma unroll
    for (int i = 0; i < 8; i++) seen[i] = nothing();

    const Matrix states = {h, rows, hidden, hidden}, weights = {w, vocabulary, hidden, hidden};
    const Matrix lows = {low, rows, low_stride, low_stride}, ups = {b, vocabulary, rank, rank};
    logits(states, weights, lows, ups, row0, entry0, tiles, at, [&](int tile, Accumulator& c) {
        const int column0 = entry0 + tile * TILE;
#ifndef FAULT_NO_MASK
        const bool edge = column0 + TILE > vocabulary;
#else
        const bool edge = false;
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = row0 + at.row + 8 * i, e = i % 2 * 2;
            const u32 target = row < rows ? targets[row] : NO_ID;
            float own[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int column = column0 + at.column + j / 2 * 8 + j % 2;
                float& logit = c[i / 2][j / 2][e + j % 2];
                if (edge && column >= vocabulary) logit = -INFINITY;
                if ((u32)column == target && column < vocabulary) target_logit[row] = logit;
                own[j] = logit;
            }
            see(seen[i], own);
        }
        if constexpr (TOP) list_tile(lists, c, at, column0, vocabulary);
    });

    // The four lanes of a row, then the four warps. The pipeline's memory is free once all threads are here.
#ifndef FAULT_NO_REUSE_BARRIER
    __syncthreads();
#endif
    float* sums = smem_ptr<float>(0);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        merge_with_lane(seen[i], 1);
        merge_with_lane(seen[i], 2);
        if (at.lane % 4 == 0) {
            float* to = sums + ((at.row + 8 * i) * 4 + at.warp_column / 32) * 3;
            to[0] = seen[i].max, to[1] = seen[i].sum, to[2] = seen[i].weighted;
        }
    }
    __syncthreads();
    const int own_row = threadIdx.x;
    if (own_row < TILE && row0 + own_row < rows) {
        Sum total = nothing();
        for (int i = 0; i < 4; i++) {
            const float* from = sums + (own_row * 4 + i) * 3;
            Sum one;
            one.max = from[0], one.sum = from[1], one.weighted = from[2];
            merge(total, one);
        }
        const size_t slot = (size_t)(row0 + own_row) * spans + span;
        part[slot * 3] = total.max, part[slot * 3 + 1] = total.sum, part[slot * 3 + 2] = total.weighted;
        if constexpr (TOP)
            for (int i = 0; i < top_count; i++) {
                top_value[slot * top_count + i] = lists.value[i * TILE + own_row];
                top_id[slot * top_count + i] = lists.id[i * TILE + own_row];
            }
    }
}

// Grid: tiles of rows x spans of 1024 entries.
KERNEL(256) head_forward(float* part, float* target_logit, const bf16* h, const bf16* w, const bf16* low,
                         const bf16* b, const u32* targets, int rows, int vocabulary, int hidden, int rank,
                         int low_stride) {
    forward<false>(part, target_logit, nullptr, nullptr, h, w, low, b, targets, rows, vocabulary, hidden, rank,
                   low_stride, 0);
}
EXPORT_KERNEL(head_forward)

// The same with lists; needs 16.5 KiB and 1 KiB per place of a list more of shared memory.
KERNEL(256) head_forward_top(float* part, float* target_logit, float* top_value, u32* top_id, const bf16* h,
                             const bf16* w, const bf16* low, const bf16* b, const u32* targets, int rows,
                             int vocabulary, int hidden, int rank, int low_stride, int top_count) {
    forward<true>(part, target_logit, top_value, top_id, h, w, low, b, targets, rows, vocabulary, hidden, rank,
                  low_stride, top_count);
}
EXPORT_KERNEL(head_forward_top)

// logprob, lse, entropy (may be null) [R] and top_* [R,top_count] = from the parts. A target outside the
// vocabulary has logprob NaN. Grid: one warp per row, 8 a block.
KERNEL(256) head_finish(float* logprob, float* lse, float* entropy, u32* top_id, float* top_logprob,
                        const float* part, const float* target_logit, const float* part_value, const u32* part_id,
                        const u32* targets, int rows, int vocabulary, int spans, int top_count) {
    const int lane = threadIdx.x % 32;
    const u32 row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= (u32)rows) return;  // the whole warp
    const size_t first = (size_t)row * spans;

    Sum total = nothing();
    for (int span = lane; span < spans; span += 32) {
        const float* from = part + (first + span) * 3;
        Sum one;
        one.max = from[0], one.sum = from[1], one.weighted = from[2];
        merge(total, one);
    }
    for (int other = 16; other > 0; other /= 2) merge_with_lane(total, other);

    const float log_sum = logf(total.sum);
    if (lane == 0) {
        lse[row] = total.max + log_sum;
        // Not by way of lse: the difference to the maximum has fewer digits before the point.
        logprob[row] = targets[row] < (u32)vocabulary ? target_logit[row] - total.max - log_sum
                                                      : __uint_as_float(0x7fc00000u);
        if (entropy) entropy[row] = log_sum - total.weighted / total.sum;
    }

    // The next in order is the first of all that stand behind the last one found. Every list is in order, so its
    // first such place decides for it.
    float last = INFINITY;
    u32 last_id = 0;
    for (int i = 0; i < top_count; i++) {
        float best = -INFINITY;
        u32 best_id = NO_ID;
        for (int span = lane; span < spans; span += 32) {
            for (int j = 0; j < top_count; j++) {
                const size_t slot = (first + span) * top_count + j;
                const float value = part_value[slot];
                const u32 id = part_id[slot];
                if (i > 0 && !before(last, last_id, value, id)) continue;
                if (before(value, id, best, best_id)) best = value, best_id = id;
                break;
            }
        }
        for (int other = 16; other > 0; other /= 2) {
            const float value = __shfl_xor_sync(FULL_WARP, best, other);
            const u32 id = __shfl_xor_sync(FULL_WARP, best_id, other);
            if (before(value, id, best, best_id)) best = value, best_id = id;
        }
        last = __shfl_sync(FULL_WARP, best, 0), last_id = __shfl_sync(FULL_WARP, best_id, 0);
        if (lane == 0) {
            top_id[(size_t)row * top_count + i] = last_id;
            top_logprob[(size_t)row * top_count + i] = last - total.max - log_sum;
        }
    }
}
EXPORT_KERNEL(head_finish)

// slope [R,stride] = for `entries` entries, of which the first is number `first` of the vocabulary and row 0 of W
// and B here; zeros from there up to `stride`, a multiple of 8. Grid: tiles of rows x tiles of entries.
KERNEL(256) head_slopes(bf16* slope, const bf16* h, const bf16* w, const bf16* low, const bf16* b, const u32* targets,
                        const float* dlogprob, const float* lse, int rows, int entries, int first, int hidden,
                        int rank, int low_stride, int stride) {
    const Place at = place_of_thread();
    const int row0 = blockIdx.x * TILE, column0 = blockIdx.y * TILE;
    const Matrix states = {h, rows, hidden, hidden}, weights = {w, entries, hidden, hidden};
    const Matrix lows = {low, rows, low_stride, low_stride}, ups = {b, entries, rank, rank};
    logits(states, weights, lows, ups, row0, column0, 1, at, [&](int, const Accumulator& c) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int row = row0 + at.row + 8 * i, e = i % 2 * 2;
            if (row >= rows) continue;
            const float factor = dlogprob[row], total = lse[row];
            const u32 target = targets[row] - (u32)first;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = column0 + at.column + 8 * j;
                if (column >= stride) continue;
                float g[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float hit = (u32)(column + k) == target ? 1.0f : 0.0f;
                    g[k] = column + k < entries ? factor * (hit - power(c[i / 2][j][e + k] - total)) : 0.0f;
                }
                *reinterpret_cast<u32*>(slope + (size_t)row * stride + column) = pack_bf16(g[0], g[1]);
            }
        }
    });
}
EXPORT_KERNEL(head_slopes)

// part [z][R,N] = or += (`add`, with one z only) the product of a [R,K], of row length `stride`, and m [K,N], over
// the z-th 8192 of K. Grid: tiles of rows x tiles of N x spans of K.
KERNEL(256) head_through(float* part, const bf16* a, const bf16* m, int rows, int inner, int columns, int stride,
                         int add) {
    const Place at = place_of_thread();
    const int row0 = blockIdx.x * TILE, column0 = blockIdx.y * TILE, inner0 = blockIdx.z * BACKWARD_SPAN;
    const int steps = tiles_of(min(BACKWARD_SPAN, inner - inner0), STEP);
    part += (size_t)blockIdx.z * rows * columns;
    const Matrix left = {a, rows, stride, stride}, right = {m, inner, columns, columns};
    products<true, false>(1, steps, at, [&](int, int step, u32 to) {
        start_copy<true>(to, left, row0, inner0 + step * STEP);
        start_copy<false>(to + OPERAND, right, inner0 + step * STEP, column0);
    }, [&](int, const Accumulator& c) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = row0 + at.row + 16 * i + e / 2 * 8, column = column0 + at.column + 8 * j + e % 2;
                    if (row >= rows || column >= columns) continue;
                    float& to = part[(size_t)row * columns + column];
                    to = add ? to + c[i][j][e] : c[i][j][e];
                }
    });
}
EXPORT_KERNEL(head_through)

// x [R,N] = sum (not if `fresh`) + part[0] + part[1] + ..., in this order. If `out` is given, out [R,stride] =
// scale * x, zeros in the columns from N on; else sum = x. Grid: a thread per element of [R,stride], 256 a block.
KERNEL(256) head_fold(float* sum, bf16* out, const float* part, int parts, int fresh, int rows, int columns,
                      int stride, float scale) {
    const size_t index = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (index >= (size_t)rows * stride) return;
    const size_t row = index / stride, column = index - row * stride, at = row * columns + column;
    float x = 0.0f;
    if (column < (size_t)columns) {
        // Not 0 + part[0]: that would turn -0 into 0, and a sum of one part at a time keeps it.
        x = fresh ? part[at] : sum[at];
        for (int i = fresh; i < parts; i++) x += part[(size_t)i * rows * columns + at];
        if (!out) sum[at] = x;
    }
    if (out) out[index] = f2bf(scale * x);
}
EXPORT_KERNEL(head_fold)

// c [M,N] += a^T b for a [K,M], of row length `stride`, and b [K,N], of row length `b_stride`, both zero in the
// columns that exist beyond M and N. Grid: tiles of M x tiles of N.
KERNEL(256) head_outer(float* c, const bf16* a, const bf16* b, int m, int n, int inner, int stride, int b_stride) {
    const Place at = place_of_thread();
    const int row0 = blockIdx.x * TILE, column0 = blockIdx.y * TILE;
    const Matrix left = {a, inner, stride, stride}, right = {b, inner, b_stride, b_stride};
    products<false, false>(1, tiles_of(inner, STEP), at, [&](int, int step, u32 to) {
        start_copy<false>(to, left, step * STEP, row0);
        start_copy<false>(to + OPERAND, right, step * STEP, column0);
    }, [&](int, const Accumulator& x) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = row0 + at.row + 16 * i + e / 2 * 8, column = column0 + at.column + 8 * j + e % 2;
                    if (row < m && column < n) c[(size_t)row * n + column] += x[i][j][e];
                }
    });
}
EXPORT_KERNEL(head_outer)
