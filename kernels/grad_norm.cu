// The L2 norm over all gradients, and scaling them all by one factor.
//
//   grad_norm_pieces   partial[i] = sum of g^2 over piece i
//   grad_norm_join     norm[0] = sqrt(sum of partial)
//   grad_scale         g *= scale
//
// Shapes    tensors: a table of (f32 gradient, length); pieces [pieces], partial [pieces] f64; norm [1] f64.
// Writes    partial and norm are overwritten (=), gradients are scaled in place.
// Numerics  f64: the square of an f32 is exact there, so only sums are rounded. A sum has one fixed tree, given by
//           the tensors' lengths alone. Not the tree of the CPU's global_norm: the two agree within some 1e-15.
//           A NaN or an infinity comes out as not finite; squares of large finite values do not overflow.
// Grid      a block of 256 threads per piece of 2,048 elements; grad_norm_join has one block. 2,176 bytes of shared
//           memory for the sums of 256 threads and of 16 groups of them. Any lengths.
// Moves     4 bytes per element for the norm, 8 for scaling; two operations in f64 per element, one in f32.
// Partners  src/train/clip.rs (reference), src/cuda/ops/grad_norm.rs (launcher), tests/kernels/grad_norm.rs
#include "eight.cuh"
#include "pieces.cuh"

constexpr int GROUPS = 16;

struct Gradient {
    float* values;
    u64 length;
};

// The sum over the block's threads, valid in thread 0: 16 threads add 16 numbers each, and one adds theirs.
DEV double sum_of_block(double value) {
    double* of_threads = smem_ptr<double>(0);
    double* of_groups = of_threads + PIECE_THREADS;
    of_threads[threadIdx.x] = value;
#ifndef FAULT_GRAD_NORM_NO_FIRST_BARRIER
    __syncthreads();
#endif
    if (threadIdx.x < GROUPS) {
        double sum = 0.0;
        for (int i = 0; i < PIECE_THREADS / GROUPS; i++) sum += of_threads[i * GROUPS + threadIdx.x];
        of_groups[threadIdx.x] = sum;
    }
#ifndef FAULT_GRAD_NORM_NO_SECOND_BARRIER
    __syncthreads();
#endif
#ifdef FAULT_GRAD_NORM_ONE_TOO_MANY
    const int count = GROUPS + 1;
#else
    const int count = GROUPS;
#endif
    double sum = 0.0;
    if (threadIdx.x == 0)
        for (int i = 0; i < count; i++) sum += of_groups[i];
    return sum;
}

KERNEL(256) grad_norm_pieces(double* __restrict__ partial, const Gradient* __restrict__ tensors,
                             const Piece* __restrict__ pieces) {
    const Piece piece = pieces[blockIdx.x];
    const Gradient tensor = tensors[piece.tensor];
    const size_t at = eight_of_piece(piece);
    double sum = 0.0;
    if (at < tensor.length) {
        float g[8];
        load8(g, tensor.values + at, up_to_eight(tensor.length - at));
#pragma unroll
        for (int i = 0; i < 8; i++) sum += (double)g[i] * (double)g[i];
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
EXPORT_KERNEL(grad_norm_pieces)

KERNEL(256) grad_norm_join(double* __restrict__ norm, const double* __restrict__ partial, int count) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += PIECE_THREADS) sum += partial[i];
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) norm[0] = sqrt(sum);
}
EXPORT_KERNEL(grad_norm_join)

KERNEL(256) grad_scale(const Gradient* __restrict__ tensors, const Piece* __restrict__ pieces, float scale) {
    const Piece piece = pieces[blockIdx.x];
    const Gradient tensor = tensors[piece.tensor];
    const size_t at = eight_of_piece(piece);
    if (at >= tensor.length) return;
    const int count = up_to_eight(tensor.length - at);
    float g[8];
    load8(g, tensor.values + at, count);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] *= scale;
    store8(tensor.values + at, g, count);
}
EXPORT_KERNEL(grad_scale)
