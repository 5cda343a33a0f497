// SwiGLU, forward and backward.
//
//   y = gate * s * up                                   s = sigmoid(gate)
//   d up = dy * gate * s,  d gate = dy * up * s * (1 + gate * (1 - s))
//
// Shapes    all [n] bf16: rows do not matter.
// Writes    y, dgate, dup are overwritten (=).
// Numerics  f32, one rounding at each store. (The composition of a silu and a product rounds the silu too.)
// Grid      a thread per eight elements, 256 a block. Any n.
// Moves     6 bytes per element forward, 10 backward; one exponential and one division each.
// Partners  src/tensor/ops/swiglu.rs (reference), src/cuda/ops/swiglu.rs (launcher), tests/kernels/swiglu.rs
#include "eight.cuh"

// exp(-g) is infinite below -88: then this is 0, as it should be.
DEV float sigmoid(float g) { return 1.0f / (1.0f + expf(-g)); }

KERNEL(256) swiglu_forward(bf16* __restrict__ y, const bf16* __restrict__ gate, const bf16* __restrict__ up, int n) {
    const size_t at = eight_of_thread();
    if (at >= (size_t)n) return;
    const int count = up_to_eight(n - at);
    float g[8], u[8];
    load8(g, gate + at, count);
    load8(u, up + at, count);
#pragma unroll
    for (int i = 0; i < 8; i++) u[i] *= g[i] * sigmoid(g[i]);
    store8(y + at, u, count);
}
EXPORT_KERNEL(swiglu_forward)

KERNEL(256) swiglu_backward(bf16* __restrict__ dgate, bf16* __restrict__ dup, const bf16* __restrict__ dy,
                            const bf16* __restrict__ gate, const bf16* __restrict__ up, int n) {
    const size_t at = eight_of_thread();
    if (at >= (size_t)n) return;
    const int count = up_to_eight(n - at);
    float d[8], g[8], u[8];
    load8(d, dy + at, count);
    load8(g, gate + at, count);
    load8(u, up + at, count);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float s = sigmoid(g[i]);
        u[i] *= d[i] * s * fmaf(g[i], 1.0f - s, 1.0f);
        d[i] *= g[i] * s;
    }
    store8(dgate + at, u, count);
    store8(dup + at, d, count);
}
EXPORT_KERNEL(swiglu_backward)
