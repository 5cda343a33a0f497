// The tile of a matrix product on tensor cores: what every kernel that is a product is made of.
//
//   acc[i, j] = scale * sum_l p0[i, l] q0[j, l]  +  sum_l p[i, l] q[j, l]
//
// Order     each element is ONE chain of mma.m16n8k16 steps in ascending l, from zero: first over the pair (p0, q0),
//           then, after one multiplication by `scale` in f32, over the pair (p, q). What a tile holds beyond the last
//           l is zero and changes nothing, so the chain does not depend on the shape of the tile, on the number of
//           rows, or on the neighbours.
// Operands  bf16, row-major, each in one of two layouts: the summed index l is the contiguous one (INNER: the matrix is
//           [i, l]) or the row (OUTER: the matrix is [l, i]).
// Memory    a ring of STAGES tiles in shared memory, filled by cp.async STAGES - 1 steps ahead, one barrier per step.
//           Sixteen-byte chunks are permuted within their row by the row number, so that neither the copies nor
//           ldmatrix meet a bank twice.
// Any size  what is outside a matrix reads as zero. A matrix whose contiguous extent is not a multiple of 8 has rows
//           that do not start at 16 bytes: its tiles are gathered element by element (right, and slow).
#pragma once
#include "stores.cuh"

// A row-major matrix.
struct Matrix {
    const bf16* data;
    int rows, cols;
};

// Two matrices that are multiplied along their summed index.
struct Pair {
    Matrix p, q;
};

enum Layout { INNER, OUTER };

// One of two, value by value: choosing between references would put both into local memory.
DEV Matrix choose(bool first, const Matrix& a, const Matrix& b) {
    Matrix chosen;
    chosen.data = first ? a.data : b.data;
    chosen.rows = first ? a.rows : b.rows;
    chosen.cols = first ? a.cols : b.cols;
    return chosen;
}

// The tile of a block: M x N results, K summed indices a step, by a grid of WARPS_M x WARPS_N warps.
template <int M_, int N_, int K_, int STAGES_, int WARPS_M_, int WARPS_N_, Layout P_, Layout Q_>
struct Tile {
    static constexpr int M = M_, N = N_, K = K_, STAGES = STAGES_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    static constexpr Layout P = P_, Q = Q_;
    static constexpr int THREADS = WARPS_M * WARPS_N * 32;
    // Results of a warp, and how many mma tiles of 16 x 8 they are.
    static constexpr int WM = M / WARPS_M, WN = N / WARPS_N, MI = WM / 16, NI = WN / 8;
    static constexpr int P_BYTES = M * K * 2, STAGE_BYTES = (M + N) * K * 2;
    static_assert(WM % 16 == 0 && WN % 16 == 0 && K % 16 == 0, "whole fragments only");
};

// Byte offset of a sixteen-byte chunk in a panel of COLS columns. Eight consecutive rows have the same chunk at eight
// different places modulo 128 bytes, which are all the banks there are.
template <int COLS> DEV u32 swizzle(u32 row, u32 chunk) {
    constexpr u32 CHUNKS = COLS / 8;
    constexpr u32 TURN = CHUNKS < 8 ? CHUNKS : 8;  // places to permute
    constexpr u32 SAME = 8 / TURN;                 // rows that share 128 bytes
    return row * (COLS * 2) + ((chunk ^ (row / SAME % TURN)) << 4);
}

// Where ldmatrix looks for it; apart only so that a test can plant a disagreement.
template <int COLS> DEV sptr place(u32 panel, u32 row, u32 chunk) {
#ifdef FAULT_SWIZZLE
    return smem_base() + panel + row * (COLS * 2) + (chunk << 4);
#else
    return smem_base() + panel + swizzle<COLS>(row, chunk);
#endif
}

// Eight elements of a row, of which those from `cols` on are zero.
DEV uint4 gather(const bf16* row, int col, int cols) {
    const u16* bits = reinterpret_cast<const u16*>(row);
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = col + 2 * i;
        word[i] = (c < cols ? (u32)bits[c] : 0u) | (c + 1 < cols ? (u32)bits[c + 1] << 16 : 0u);
    }
    uint4 chunk;
    chunk.x = word[0], chunk.y = word[1], chunk.z = word[2], chunk.w = word[3];
    return chunk;
}

// Copies the panel ROWS x COLS of `from` at (row0, col0) to the offset `panel`, which is there once the copies are
// waited for and a barrier is passed.
template <int ROWS, int COLS, int THREADS>
DEV void fetch(u32 panel, const Matrix& from, int row0, int col0) {
    constexpr u32 CHUNKS = COLS / 8;          // of a row
    constexpr u32 STRIDE = THREADS / CHUNKS;  // rows copied at once
    static_assert(THREADS % CHUNKS == 0 && ROWS % STRIDE == 0, "every thread copies as many chunks, all in one column");
    if (from.cols % 8 == 0) {
        const u32 chunk = threadIdx.x % CHUNKS, c = col0 + chunk * 8, cols = from.cols;
        const bool within = c < cols;
#pragma unroll
        for (u32 i = 0; i < ROWS / STRIDE; i++) {
            const u32 row = threadIdx.x / CHUNKS + i * STRIDE, r = row0 + row;
#ifdef FAULT_BOUND
            const bool inside = within;
#else
            const bool inside = within && r < (u32)from.rows;
#endif
            // An address inside even where nothing is read.
            const size_t at = inside ? (size_t)r * cols + c : 0;
            cp_async16(smem_base() + panel + swizzle<COLS>(row, chunk), from.data + at, inside);
        }
    } else {
        // The barrier that makes the copies of others visible makes these stores visible too.
#pragma unroll 1
        for (int task = threadIdx.x; task < int(ROWS * CHUNKS); task += THREADS) {
            const int row = task / CHUNKS, chunk = task % CHUNKS, r = row0 + row;
            const bool inside = r < from.rows;
            const bf16* start = from.data + (inside ? (size_t)r * from.cols : 0);
            st_128(smem_ptr<u8>(panel + swizzle<COLS>(row, chunk)),
                   gather(start, col0 + chunk * 8, inside ? from.cols : 0));
        }
    }
}

// 16 x 16 elements of the first operand of mma, at (outer, inner) = (result row, summed index) of its panel. COLS is
// the panel's width. The panel of an OUTER operand is stored the other way round, and ldmatrix transposes it.
template <Layout L, int COLS> DEV void load_p(u32 (&fragment)[4], u32 panel, int outer, int inner) {
    const u32 lane = lane_index();
    if constexpr (L == INNER) {
        ldmatrix_x4(fragment, place<COLS>(panel, outer + lane % 16, inner / 8 + lane / 16));
    } else {
        ldmatrix_x4_trans(fragment, place<COLS>(panel, inner + lane % 8 + lane / 16 * 8, outer / 8 + lane / 8 % 2));
    }
}

// 16 x 16 elements of the second operand: two mma tiles of 8 result columns, two words each.
template <Layout L, int COLS> DEV void load_q(u32 (&fragment)[4], u32 panel, int outer, int inner) {
    const u32 lane = lane_index();
    if constexpr (L == INNER) {
        ldmatrix_x4(fragment, place<COLS>(panel, outer + lane % 8 + lane / 16 * 8, inner / 8 + lane / 8 % 2));
    } else {
        ldmatrix_x4_trans(fragment, place<COLS>(panel, inner + lane % 16, outer / 8 + lane / 16));
    }
}

// Summed indices of a pair.
template <class T> DEV int depth_of(const Pair& pair) {
    return T::P == INNER ? pair.p.cols : pair.p.rows;
}

// Asks for the panels of one step.
template <class T> DEV void fetch_step(int stage, const Pair& pair, int row0, int col0, int depth) {
    const u32 p = stage * T::STAGE_BYTES, q = p + T::P_BYTES;
    if constexpr (T::P == INNER) fetch<T::M, T::K, T::THREADS>(p, pair.p, row0, depth);
    else fetch<T::K, T::M, T::THREADS>(p, pair.p, depth, row0);
    if constexpr (T::Q == INNER) fetch<T::N, T::K, T::THREADS>(q, pair.q, col0, depth);
    else fetch<T::K, T::N, T::THREADS>(q, pair.q, depth, col0);
}

// Accumulators of a thread, in the layout of mma.
template <class T> struct Accumulators {
    float of[T::MI][T::NI][4];
};

// The chain of the head comment for the tile at (row0, col0). The second pair is summed from `first` on; an empty first
// pair (depth 0) is none.
template <class T>
DEV void product(Accumulators<T>& acc, const Pair& low, float scale, const Pair& base, int first, int row0, int col0) {
    constexpr int P_COLS = T::P == INNER ? T::K : T::M, Q_COLS = T::Q == INNER ? T::K : T::N;
    const int warp = warp_index();
    const int warp_row = warp / T::WARPS_N * T::WM, warp_col = warp % T::WARPS_N * T::WN;
    const int low_steps = (depth_of<T>(low) + T::K - 1) / T::K;
    const int steps = low_steps + (depth_of<T>(base) - first + T::K - 1) / T::K;

#pragma unroll
    for (int i = 0; i < T::MI; i++)
#pragma unroll
        for (int j = 0; j < T::NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc.of[i][j][e] = 0.0f;

    const auto fetch_ahead = [&](int step) {
        // One group per step, empty or not, so that "all but the last STAGES - 2" always means "this step's".
        if (step < steps) {
            const bool is_low = step < low_steps;
            const int depth = is_low ? step * T::K : first + (step - low_steps) * T::K;
            Pair pair;
            pair.p = choose(is_low, low.p, base.p), pair.q = choose(is_low, low.q, base.q);
            fetch_step<T>(step % T::STAGES, pair, row0, col0, depth);
        }
        cp_async_commit();
    };
    for (int step = 0; step < T::STAGES - 1; step++) fetch_ahead(step);

    for (int step = 0; step < steps; step++) {
#ifdef FAULT_WAIT
        cp_async_wait<T::STAGES - 1>();
#else
        cp_async_wait<T::STAGES - 2>();
#endif
        // Two things at once: the copies of the other threads are there, and everyone has left the stage that is
        // filled next, which is the one of the step before.
#ifndef FAULT_BARRIER
        __syncthreads();
#endif
        fetch_ahead(step + T::STAGES - 1);

        if (step == low_steps) {
#pragma unroll
            for (int i = 0; i < T::MI; i++)
#pragma unroll
                for (int j = 0; j < T::NI; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc.of[i][j][e] *= scale;
        }

        const u32 p = step % T::STAGES * T::STAGE_BYTES, q = p + T::P_BYTES;
#pragma unroll
        for (int inner = 0; inner < T::K; inner += 16) {
            u32 left[T::MI][4], right[T::NI / 2][4];
#pragma unroll
            for (int i = 0; i < T::MI; i++) load_p<T::P, P_COLS>(left[i], p, warp_row + 16 * i, inner);
#pragma unroll
            for (int j = 0; j < T::NI / 2; j++) load_q<T::Q, Q_COLS>(right[j], q, warp_col + 16 * j, inner);
#pragma unroll
            for (int i = 0; i < T::MI; i++)
#pragma unroll
                for (int j = 0; j < T::NI; j++)
                    mma_bf16_16816(acc.of[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// Calls `store(row, col, first, second)` for every pair of adjacent results of this thread; `col` is even.
template <class T, class Store> DEV void for_each_pair(const Accumulators<T>& acc, int row0, int col0, Store store) {
    const int warp = warp_index(), lane = lane_index();
    const int row = row0 + warp / T::WARPS_N * T::WM + lane / 4, col = col0 + warp % T::WARPS_N * T::WN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < T::MI; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < T::NI; j++)
                store(row + 16 * i + 8 * half, col + 8 * j, acc.of[i][j][2 * half], acc.of[i][j][2 * half + 1]);
}
