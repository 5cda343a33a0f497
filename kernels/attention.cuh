// What the portable attention kernels share: tiles of bf16 rows in shared memory, products of tiles, the online softmax.
//
// A warp owns 16 rows of every product. With g = lane / 4 and t = lane % 4, a lane holds of an accumulator
// c [16, N], as c[n][i]:  row g + 8 * (i / 2),  column 8 * n + 2 * t + i % 2.
#pragma once
#include "packed.cuh"

// What a test may plant, one at a time, by a macro: the emulator, or the comparison with the reference, has to
// notice. NONE is what is shipped.
enum Fault { NONE, NO_END_BARRIER, LAX_WAIT, NO_WAIT_BARRIER, NO_MERGE_BARRIER, MASK_OFF_BY_ONE, NO_RESCALE };
#if defined(FAULT_NO_END_BARRIER)
constexpr Fault FAULT = NO_END_BARRIER;
#elif defined(FAULT_LAX_WAIT)
constexpr Fault FAULT = LAX_WAIT;
#elif defined(FAULT_NO_WAIT_BARRIER)
constexpr Fault FAULT = NO_WAIT_BARRIER;
#elif defined(FAULT_NO_MERGE_BARRIER)
constexpr Fault FAULT = NO_MERGE_BARRIER;
#elif defined(FAULT_MASK_OFF_BY_ONE)
constexpr Fault FAULT = MASK_OFF_BY_ONE;
#elif defined(FAULT_NO_RESCALE)
constexpr Fault FAULT = NO_RESCALE;
#else
constexpr Fault FAULT = NONE;
#endif

// How many groups of copies may still be under way when a tile is used: the next tile's.
constexpr int IN_FLIGHT = FAULT == LAX_WAIT ? 2 : 1;

// Place of 16-byte piece `piece` of row `row` in a tile of rows [D]. Pieces are permuted within a row, so that
// the same piece of 8 rows in turn, which is what ldmatrix reads at once, lies in 8 different groups of banks.
template <int D> DEV u32 place(int row, int piece) { return (u32)(row * (D / 8) + (piece ^ (row & 7))) * 16; }

// Starts to copy ROWS rows of D elements to a tile; `from` is the first, the next is `stride` elements on. Only
// `count` rows exist (it may be less than 1): the others become zeros, and are not read.
template <int D, int ROWS, int THREADS>
DEV void start_copy(sptr tile, const bf16* from, size_t stride, int count, int thread) {
    static_assert(ROWS * D / 8 % THREADS == 0, "every thread copies equally much");
#pragma unroll
    for (int i = 0; i < ROWS * D / 8 / THREADS; i++) {
        const int at = i * THREADS + thread, row = at / (D / 8), piece = at % (D / 8);
        const bool exists = row < count;
        cp_async16(tile + place<D>(row, piece), from + (exists ? row * stride + piece * 8 : 0), exists);
    }
}

// What a head is in memory: all D columns of a tile, or fewer. Then their number, even, is known at run time only, and
// the other columns of a tile are zeros, which add nothing to any product, and are never stored.
template <int D_, bool WHOLE_> struct Head {
    static constexpr int D = D_;
    static constexpr bool WHOLE = WHOLE_;
    int given;
    DEV int size() const { return WHOLE ? D : given; }
};
template <int D> using WholeHead = Head<D, true>;
using SmallHead = Head<64, false>;

// Eight elements of a row of `size` from column `col` on, zeros past its end. Both are even, and so the row starts at
// four bytes, no more.
DEV uint4 gather(const bf16* row, int col, int size) {
    const u32* pairs = reinterpret_cast<const u32*>(row + col);
    uint4 chunk;
    chunk.x = col < size ? pairs[0] : 0;
    chunk.y = col + 2 < size ? pairs[1] : 0;
    chunk.z = col + 4 < size ? pairs[2] : 0;
    chunk.w = col + 6 < size ? pairs[3] : 0;
    return chunk;
}

// The same for rows of a head. Rows that do not start at 16 bytes are gathered pair by pair (right, and slow): the
// barrier that follows the wait for the copies makes these stores visible too.
template <class H, int ROWS, int THREADS>
DEV void start_rows(sptr tile, const bf16* from, size_t stride, int count, int thread, H head) {
    constexpr int PIECES = H::D / 8;
    if constexpr (H::WHOLE) {
        start_copy<H::D, ROWS, THREADS>(tile, from, stride, count, thread);
    } else if (head.size() % 8 == 0) {
#pragma unroll
        for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
            const int at = i * THREADS + thread, row = at / PIECES, piece = at % PIECES;
            const bool exists = row < count && piece * 8 < head.size();
            cp_async16(tile + place<H::D>(row, piece), from + (exists ? row * stride + piece * 8 : 0), exists);
        }
    } else {
#pragma unroll 1
        for (int at = thread; at < ROWS * PIECES; at += THREADS) {
            const int row = at / PIECES, piece = at % PIECES;
            const bool exists = row < count;
            st_128(smem_ptr<u8>(tile - smem_base() + place<H::D>(row, piece)),
                   gather(from + (exists ? row * stride : 0), piece * 8, exists ? head.size() : 0));
        }
    }
}

// Left operand: rows row..row + 16 and columns 16 * k..16 * k + 16 of a tile.
template <int D> DEV void left_operand(u32 (&a)[4], sptr tile, int row, int k, int lane) {
    ldmatrix_x4(a, tile + place<D>(row + (lane & 15), 2 * k + (lane >> 4)));
}

// Right operand of a product with a turned tile: b[0], b[1] for its rows 16 * n..+8, b[2], b[3] for the next 8.
template <int D> DEV void right_operand_turned(u32 (&b)[4], sptr tile, int n, int k, int lane) {
    ldmatrix_x4(b, tile + place<D>(16 * n + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
}

// Right operand of a product with a tile: rows 16 * k..+16, columns 16 * n..+8 and the next 8.
template <int D> DEV void right_operand(u32 (&b)[4], sptr tile, int n, int k, int lane) {
    ldmatrix_x4_trans(b, tile + place<D>(16 * k + (lane & 15), 2 * n + (lane >> 4)));
}

// c [16, N] += a [16, 16] . b^T, where b are columns 16 * k..16 * k + 16 of a tile [N, D].
template <int D, int N> DEV void add_turned(float (&c)[N / 8][4], const u32 (&a)[4], sptr tile, int k, int lane) {
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        u32 b[4];
        right_operand_turned<D>(b, tile, n, k, lane);
        mma_bf16_16816(c[2 * n], a, b[0], b[1]);
        mma_bf16_16816(c[2 * n + 1], a, b[2], b[3]);
    }
}

// c [16, D] += p [16, K] . tile [K, D]. The accumulator p, rounded to bf16, has the layout of a left operand
// already: 16 columns of it are two neighbouring p[n].
template <int D, int K> DEV void add_product(float (&c)[D / 8][4], const float (&p)[K / 8][4], sptr tile, int lane) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        const u32 a[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                          pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 b[4];
            right_operand<D>(b, tile, n, k, lane);
            mma_bf16_16816(c[2 * n], a, b[0], b[1]);
            mma_bf16_16816(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// What a lane keeps of the two rows it has a part in, g and g + 8, while it walks along the keys.
template <int D> struct Rows {
    float o[D / 8][4] = {};               // sum of p v
    float top[2] = {-INFINITY, -INFINITY};  // the largest score so far, before any scaling
    float sum[2] = {};                    // sum of p over this lane's columns
};

// Scores of N more keys, -inf where a key may not be seen, become p = 2^(scale * (score - top)); what was summed
// under the old top is shrunk. At least one of the keys seen so far must be visible to each row.
template <int D, int N> DEV void online_softmax(Rows<D>& rows, float (&scores)[N / 8][4], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = rows.top[r];
#pragma unroll
        for (int n = 0; n < N / 8; n++) top = fmaxf(top, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        top = row_max(top);
        const float level = top * scale;
        const float shrink = exp2_approx(rows.top[r] * scale - level);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                scores[n][i] = exp2_approx(scores[n][i] * scale - level);
                sum += scores[n][i];
            }
        }
        rows.top[r] = top;
        rows.sum[r] = rows.sum[r] * shrink + sum;
        if (FAULT != NO_RESCALE) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                rows.o[n][2 * r] *= shrink;
                rows.o[n][2 * r + 1] *= shrink;
            }
        }
    }
}
