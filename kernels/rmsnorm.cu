// RMSNorm.
//
//   y[r,c] = x[r,c] rstd[r] w[c]                     rstd[r] = 1 / sqrt(mean over c of x[r,c]^2 + eps)
//
// and its gradients, with g[r,c] = dy[r,c] w[c]:
//
//   dx[r,c] = rstd[r] (g[r,c] - x[r,c] rstd[r]^2 mean over c of g[r,c] x[r,c])
//   dw[c]   = sum over r of dy[r,c] x[r,c] rstd[r]
//
// Shapes    x, y, dy, dx [R,C] bf16 row-major; w, dw [C] f32; rstd [R] f32, kept for the backward pass;
//           partial [B,C] f32, the sums of dw over the rows of each block.
// Writes    y, rstd and partial are overwritten (=); dx is = or, with `add`, +=; dw is +=.
// Numerics  f32 throughout, one rounding at the store of y or dx. Sums are in an order that depends on C and,
//           for dw, on R only: a row's results are the same whatever its neighbours, dw's the same every time.
// Grid      rmsnorm_forward: a block per row, of 32 n threads. rmsnorm_backward: a block per `rows` rows, with
//           4 C bytes of shared memory after its scratch if there is a `partial`. rmsnorm_weights: a block of
//           32 x 8 threads per 32 columns. Rows are read 16 bytes at a time where C is a multiple of 8.
// Partners  src/tensor/ops/rmsnorm.rs (reference), src/cuda/ops/rmsnorm.rs (launcher), tests/kernels/rmsnorm.rs
#include "dev.cuh"

// The first bytes of shared memory: a float per warp for `block_sum`.
constexpr u32 SCRATCH = 128;

// Eight neighbours if N = 8, one element if N = 1.
DEV void load(float (&v)[8], const bf16* p) { ld_vec8(v, p); }
DEV void load(float (&v)[8], const float* p) { ld_vec8(v, p); }
DEV void load(float (&v)[1], const bf16* p) { v[0] = bf2f(*p); }
DEV void load(float (&v)[1], const float* p) { v[0] = *p; }
DEV void store(bf16* p, const float (&v)[8]) { st_vec8(p, v); }
DEV void store(float* p, const float (&v)[8]) { st_vec8(p, v); }
DEV void store(bf16* p, const float (&v)[1]) { *p = f2bf(v[0]); }
DEV void store(float* p, const float (&v)[1]) { *p = v[0]; }

template <int N>
DEV void forward(bf16* y, float* rstd, const bf16* x, const float* w, int channels, float eps) {
    // The row is read twice, the second time from the cache: it is 18 KB at most in the models we know.
    float sum = 0.0f;
    for (int c = threadIdx.x * N; c < channels; c += blockDim.x * N) {
        float v[N];
        load(v, x + c);
#pragma unroll
        for (int i = 0; i < N; i++) sum = fmaf(v[i], v[i], sum);
    }
    const float scale = 1.0f / sqrtf(block_sum(sum, smem_ptr<float>(0)) / channels + eps);
    if (threadIdx.x == 0) *rstd = scale;

    for (int c = threadIdx.x * N; c < channels; c += blockDim.x * N) {
        float v[N], weight[N];
        load(v, x + c);
        load(weight, w + c);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] *= scale * weight[i];
        store(y + c, v);
    }
}

KERNEL(256) rmsnorm_forward(bf16* y, float* rstd, const bf16* x, const float* w, int channels, float eps) {
    const size_t row = blockIdx.x, first = row * channels;
    if (channels % 8 == 0) forward<8>(y + first, rstd + row, x + first, w, channels, eps);
    else forward<1>(y + first, rstd + row, x + first, w, channels, eps);
}
EXPORT_KERNEL(rmsnorm_forward)

// One row. `weights`, in shared memory or null, gathers dw: element i of all groups of N, then element i + 1,
// so that neighbours in a warp meet in no bank. A thread has the same columns in every row, and meets no other.
template <int N>
DEV void backward_row(bf16* dx, float* weights, const bf16* dy, const bf16* x, const float* w, float scale,
                      int channels, bool add) {
    const int groups = channels / N;
    float sum = 0.0f;
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
        float g[N], v[N], weight[N];
        load(g, dy + group * N);
        load(v, x + group * N);
        load(weight, w + group * N);
#pragma unroll
        for (int i = 0; i < N; i++) sum = fmaf(g[i] * weight[i], v[i], sum);
    }
    const float slope = scale * scale * scale * (block_sum(sum, smem_ptr<float>(0)) / channels);

    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
        float g[N], v[N], weight[N], out[N] = {};
        load(g, dy + group * N);
        load(v, x + group * N);
        load(weight, w + group * N);
        if (add) load(out, dx + group * N);
#pragma unroll
        for (int i = 0; i < N; i++) {
            out[i] += fmaf(g[i] * weight[i], scale, -(slope * v[i]));
            if (weights) {
                float& gathered = weights[i * groups + group];
                gathered = fmaf(v[i] * scale, g[i], gathered);
            }
        }
        store(dx + group * N, out);
    }
}

// The rows from `begin` to `end`, and their sum of dw to `partial` unless it is null.
template <int N>
DEV void backward(bf16* dx, float* partial, const bf16* dy, const bf16* x, const float* w, const float* rstd,
                  int begin, int end, int channels, bool add) {
    const int groups = channels / N;
    float* const weights = partial ? smem_ptr<float>(SCRATCH) : nullptr;
    if (weights)
        for (int group = threadIdx.x; group < groups; group += blockDim.x)
#pragma unroll
            for (int i = 0; i < N; i++) weights[i * groups + group] = 0.0f;

    for (int row = begin; row < end; row++) {
        const size_t first = static_cast<size_t>(row) * channels;
        backward_row<N>(dx + first, weights, dy + first, x + first, w, rstd[row], channels, add);
    }

    if (!weights) return;
#ifdef FAULT_OTHERS_COLUMNS
    // Not this thread's own columns, and no barrier before.
    for (int c = threadIdx.x; c < channels; c += blockDim.x) partial[c] = weights[c % N * groups + c / N];
#else
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
        float sums[N];
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] = weights[i * groups + group];
        store(partial + group * N, sums);
    }
#endif
}

KERNEL(256) rmsnorm_backward(bf16* dx, float* partial, const bf16* dy, const bf16* x, const float* w,
                             const float* rstd, int count, int channels, int rows, int add) {
    const int begin = blockIdx.x * rows, end = min(begin + rows, count);
    float* const own = partial ? partial + static_cast<size_t>(blockIdx.x) * channels : nullptr;
    if (channels % 8 == 0) backward<8>(dx, own, dy, x, w, rstd, begin, end, channels, add != 0);
    else backward<1>(dx, own, dy, x, w, rstd, begin, end, channels, add != 0);
}
EXPORT_KERNEL(rmsnorm_backward)

// dw += the sum of the blocks' partial sums. Warp k takes blocks k, k + 8, ... in ascending order; the eight
// sums are then added in ascending order. 1,024 bytes of shared memory.
KERNEL(256) rmsnorm_weights(float* dw, const float* partial, int blocks, int channels) {
    float* const sums = smem_ptr<float>(0);
    const u32 lane = lane_index(), warp = warp_index();
    const int c = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (c < channels)
        for (int b = warp; b < blocks; b += 8) sum += partial[static_cast<size_t>(b) * channels + c];
    sums[warp * 32 + lane] = sum;
#ifndef FAULT_NO_BARRIER
    __syncthreads();
#endif
#ifdef FAULT_EVERY_WARP
    if (c < channels) {
#else
    if (warp == 0 && c < channels) {
#endif
        float total = 0.0f;
        for (int k = 0; k < 8; k++) total += sums[k * 32 + lane];
        dw[c] += total;
    }
}
EXPORT_KERNEL(rmsnorm_weights)
