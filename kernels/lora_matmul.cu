// Linear layer with a low-rank adapter, forward and backward, on tensor cores (mma.sync, sm_80 on).
//
//   forward    low = x A^T                     y    = or += x W^T + scale low B^T + bias
//   backward   dlow = scale dy B               dx   = or += dy W + dlow A
//              da += dlow^T x                  db  += scale dy^T low            dw += dy^T x
//
// Shapes    x, dx [m,k], y, dy [m,n], low, dlow [m,rank], W [n,k], A [rank,k], B [n,rank] bf16; bias [n], da [rank,k],
//           db [n,rank], dw [n,k] f32; all row-major. Any m, n, k >= 1, any rank >= 0; rank 0 is the plain product.
// Writes    low and dlow =; y and dx = or += (flag `add`); da, db, dw +=. One thread writes an element, none adds
//           atomically.
// Numerics  bf16 operands, f32 sums, one rounding at each store (low, dlow, y, dx). The adapter rides in the kernel of
//           the base product, as the first steps of the same accumulators: low B^T is summed, multiplied once by scale
//           in f32, then x W^T is summed on top, then bias, then what was in y. dlow is rounded with scale in it.
// Order     an element of low, dlow, y, dx is one chain over the summed index (gemm.cuh), the same in every kernel
//           here: a row does not depend on m or on its neighbours, and decoded alone it has the bits it has in a
//           batch. That is why few rows are not multiplied with k cut into parts. da and db are sums over m, cut at
//           multiples of a length that follows from m; the parts are added in ascending order.
// Grid      one block per tile, see each kernel; the launcher knows the tiles.
// Slow      an operand whose contiguous extent is not a multiple of 8 is gathered element by element (k: x, W, A;
//           n: dy; rank: low, dlow, B).
// Partners  gemm.cuh (the tile), src/cuda/ops/lora_matmul.rs (launcher), tests/kernels/lora_matmul.rs (reference)
// Faults    planted in gemm.cuh for the tests: FAULT_BARRIER, FAULT_WAIT, FAULT_BOUND, FAULT_SWIZZLE
#include "gemm.cuh"

// 128 x 128 with 64 accumulators a thread and 48 kB: two blocks per multiprocessor on everything from sm_80 on.
typedef Tile<128, 128, 32, 3, 2, 4, INNER, INNER> Forward;
typedef Tile<128, 128, 32, 3, 2, 4, INNER, OUTER> Backward;
typedef Tile<128, 128, 32, 3, 2, 4, OUTER, OUTER> Weights;
// One warp, sixteen rows of W in long lines: W is read once, and n / 16 blocks keep the memory busy.
typedef Tile<16, 16, 128, 6, 1, 1, INNER, INNER> Decode;
// Between the two: a batch that is decoded has too few rows for large tiles to occupy a GPU.
typedef Tile<64, 32, 64, 4, 2, 1, INNER, INNER> Few;
// Sixteen rows of x against the whole (small) factor: x is read once when rank <= 64.
typedef Tile<16, 64, 64, 4, 1, 4, INNER, INNER> Low;
typedef Tile<16, 64, 64, 4, 1, 4, INNER, OUTER> LowBackward;
typedef Tile<64, 64, 32, 4, 2, 2, OUTER, OUTER> Factor;

static_assert(Forward::STAGES * Forward::STAGE_BYTES == 49152 && Backward::STAGE_BYTES == Forward::STAGE_BYTES, "");
static_assert(Weights::STAGE_BYTES == Forward::STAGE_BYTES && Few::STAGES * Few::STAGE_BYTES == 49152, "");
static_assert(Decode::STAGES * Decode::STAGE_BYTES == 49152 && Low::STAGES * Low::STAGE_BYTES == 40960, "");
static_assert(LowBackward::STAGE_BYTES == Low::STAGE_BYTES && Factor::STAGES * Factor::STAGE_BYTES == 32768, "");

DEV Pair pair(const bf16* p, int p_rows, int p_cols, const bf16* q, int q_rows, int q_cols) {
    Pair both;
    both.p.data = p, both.p.rows = p_rows, both.p.cols = p_cols;
    both.q.data = q, both.q.rows = q_rows, both.q.cols = q_cols;
    return both;
}

DEV Pair no_pair() { return pair(nullptr, 0, 0, nullptr, 0, 0); }

template <class T>
DEV void forward_tile(bf16* y, const bf16* x, const bf16* w, const float* bias, const bf16* low, const bf16* b, int m,
                      int n, int k, int rank, float scale, bool add, int row0, int col0) {
    Accumulators<T> acc;
    product<T>(acc, pair(low, m, rank, b, n, rank), scale, pair(x, m, k, w, n, k), 0, row0, col0);
    for_each_pair<T>(acc, row0, col0, [=](int row, int col, float first, float second) {
        if (bias) {
            first += col < n ? bias[col] : 0.0f;
            second += col + 1 < n ? bias[col + 1] : 0.0f;
        }
        store_bf16(y, m, n, row, col, first, second, add);
    });
}

// y. Grid: ceil(m/128) * ceil(n/128), in bands.
KERNEL(256) lora_matmul_forward(bf16* y, const bf16* x, const bf16* w, const float* bias, const bf16* low,
                                const bf16* b, int m, int n, int k, int rank, float scale, int add) {
    const Spot spot = spot_of(blockIdx.x, (m + 127) / 128, (n + 127) / 128);
    forward_tile<Forward>(y, x, w, bias, low, b, m, n, k, rank, scale, add, spot.row * 128, spot.col * 128);
}
EXPORT_KERNEL(lora_matmul_forward)

// y for some rows. Grid: ceil(n/32), ceil(m/64).
KERNEL(64) lora_matmul_few(bf16* y, const bf16* x, const bf16* w, const float* bias, const bf16* low, const bf16* b,
                           int m, int n, int k, int rank, float scale, int add) {
    forward_tile<Few>(y, x, w, bias, low, b, m, n, k, rank, scale, add, blockIdx.y * 64, blockIdx.x * 32);
}
EXPORT_KERNEL(lora_matmul_few)

// y for a row or a handful. Grid: ceil(n/16), ceil(m/16).
KERNEL(32) lora_matmul_decode(bf16* y, const bf16* x, const bf16* w, const float* bias, const bf16* low, const bf16* b,
                              int m, int n, int k, int rank, float scale, int add) {
    forward_tile<Decode>(y, x, w, bias, low, b, m, n, k, rank, scale, add, blockIdx.y * 16, blockIdx.x * 16);
}
EXPORT_KERNEL(lora_matmul_decode)

// low. Grid: ceil(m/16), ceil(rank/64).
KERNEL(128) lora_matmul_low(bf16* low, const bf16* x, const bf16* a, int m, int k, int rank) {
    const int row0 = blockIdx.x * 16, col0 = blockIdx.y * 64;
    Accumulators<Low> acc;
    product<Low>(acc, no_pair(), 1.0f, pair(x, m, k, a, rank, k), 0, row0, col0);
    for_each_pair<Low>(acc, row0, col0, [=](int row, int col, float first, float second) {
        store_bf16(low, m, rank, row, col, first, second, false);
    });
}
EXPORT_KERNEL(lora_matmul_low)

// dlow. Grid: ceil(m/16), ceil(rank/64).
KERNEL(128) lora_matmul_dlow(bf16* dlow, const bf16* dy, const bf16* b, int m, int n, int rank, float scale) {
    const int row0 = blockIdx.x * 16, col0 = blockIdx.y * 64;
    Accumulators<LowBackward> acc;
    product<LowBackward>(acc, no_pair(), 1.0f, pair(dy, m, n, b, n, rank), 0, row0, col0);
    for_each_pair<LowBackward>(acc, row0, col0, [=](int row, int col, float first, float second) {
        store_bf16(dlow, m, rank, row, col, scale * first, scale * second, false);
    });
}
EXPORT_KERNEL(lora_matmul_dlow)

// dx. Grid: ceil(m/128) * ceil(k/128), in bands.
KERNEL(256) lora_matmul_dx(bf16* dx, const bf16* dy, const bf16* w, const bf16* dlow, const bf16* a, int m, int n,
                           int k, int rank, int add) {
    const Spot spot = spot_of(blockIdx.x, (m + 127) / 128, (k + 127) / 128);
    const int row0 = spot.row * 128, col0 = spot.col * 128;
    Accumulators<Backward> acc;
    product<Backward>(acc, pair(dlow, m, rank, a, rank, k), 1.0f, pair(dy, m, n, w, n, k), 0, row0, col0);
    for_each_pair<Backward>(acc, row0, col0, [=](int row, int col, float first, float second) {
        store_bf16(dx, m, k, row, col, first, second, add);
    });
}
EXPORT_KERNEL(lora_matmul_dx)

// dw, or the gradient of any [rows,cols] that is p^T q with p [m,rows], q [m,cols].
// Grid: ceil(rows/128) * ceil(cols/128), in bands.
KERNEL(256) lora_matmul_dw(float* dw, const bf16* p, const bf16* q, int m, int rows, int cols) {
    const Spot spot = spot_of(blockIdx.x, (rows + 127) / 128, (cols + 127) / 128);
    const int row0 = spot.row * 128, col0 = spot.col * 128;
    Accumulators<Weights> acc;
    product<Weights>(acc, no_pair(), 1.0f, pair(p, m, rows, q, m, cols), 0, row0, col0);
    for_each_pair<Weights>(acc, row0, col0, [=](int row, int col, float first, float second) {
        store_f32(dw, rows, cols, row, col, first, second, true);
    });
}
EXPORT_KERNEL(lora_matmul_dw)

// partial[s, rows, cols] = the part of p^T q over the s-th `length` of the m rows; the first step of da and db, which
// are too small to keep a GPU busy without cutting m. `length` is a multiple of 32.
// Grid: ceil(rows/64) * ceil(cols/64), parts.
KERNEL(128) lora_matmul_factor(float* partial, const bf16* p, const bf16* q, int m, int rows, int cols, int length) {
    const int width = (cols + 63) / 64;
    const int row0 = (int)blockIdx.x / width * 64, col0 = (int)blockIdx.x % width * 64;
    const int first = blockIdx.y * length, end = min(m, first + length);
    Accumulators<Factor> acc;
    product<Factor>(acc, no_pair(), 1.0f, pair(p, end, rows, q, end, cols), first, row0, col0);
    float* part = partial + (size_t)blockIdx.y * rows * cols;
    for_each_pair<Factor>(acc, row0, col0, [=](int row, int col, float first, float second) {
        store_f32(part, rows, cols, row, col, first, second, false);
    });
}
EXPORT_KERNEL(lora_matmul_factor)

// out[rows, cols] += scale * sum over s, ascending, of partial[s, rows, cols]. Grid: ceil(rows*cols/256).
KERNEL(256) lora_matmul_reduce(float* out, const float* partial, int parts, int rows, int cols, float scale) {
    const size_t size = (size_t)rows * cols, at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= size) return;
    float sum = 0.0f;
    for (int s = 0; s < parts; s++) sum += partial[s * size + at];
    out[at] += scale * sum;
}
EXPORT_KERNEL(lora_matmul_reduce)
