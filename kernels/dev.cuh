// The one header a kernel includes: the GPU's instructions as C++ functions.
//
// Two compilers read it. NVRTC takes the first half, where a function is one PTX instruction; a C++ compiler
// takes tests/emulator/runtime/emulated.hpp, where the same function is carried out by the emulator. What
// follows both is written once, in terms of them. Section names are those of the PTX ISA manual.
//
// A kernel uses these and plain CUDA C++ only: no header of the toolkit, no `asm`, no `__shared__` variable
// (shared memory is dynamic and carved up by byte offset), warp collectives with all 32 lanes.
#pragma once

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The bits of a bfloat16: the upper half of a float's.
struct bf16 {
    u16 x;
};

// A function called by kernels.
#define DEV __device__ __forceinline__
// Stands before a kernel's name: at most so many threads per block.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// Follows the kernel; makes it known to the emulator.
#define EXPORT_KERNEL(name)

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

// A byte address in shared memory, as the instructions below want it.
typedef u32 sptr;

extern __shared__ __align__(1024) u8 dynamic_shared_memory[];

// The address of the first byte of the block's dynamic shared memory.
DEV sptr smem_base() {
    return static_cast<u32>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// The same memory as a pointer, `offset` bytes from the first.
template <class T> DEV T* smem_ptr(u32 offset) {
    return reinterpret_cast<T*>(dynamic_shared_memory + offset);
}

// Exact.
DEV float bf2f(bf16 b) {
    return __uint_as_float(static_cast<u32>(b.x) << 16);
}

// To the nearest, ties to even. "Data Movement and Conversion: cvt".
DEV bf16 f2bf(float f) {
    bf16 b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.x) : "f"(f));
    return b;
}

// Two at once, `lo` in the lower half: an element of a matrix fragment. The instruction names the upper first.
DEV u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// 2^x within 2 ulp, denormal results are 0. "Floating Point: ex2".
DEV float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Copies 16 bytes from global to shared memory behind the thread's back, or writes 16 zeros if not `ok` (then
// `src` is not read, but has to be a valid address). Both are multiples of 16. "Data Movement: cp.async".
DEV void cp_async16(sptr dst, const void* src, bool ok) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(ok ? 16 : 0) : "memory");
}

// The copies since the last commit are one group. "cp.async.commit_group".
DEV void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups, the latest, are unfinished. Other threads see the copies only
// after a barrier. "cp.async.wait_group".
template <int N> DEV void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of bf16. Lane 8 i + j gives the address of row j of matrix i, 16 bytes, aligned; lane l
// receives in r[i] the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4. "Warp Level Matrix: ldmatrix".
DEV void ldmatrix_x4(u32 (&r)[4], sptr p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
}

// The same of the transposed matrices.
DEV void ldmatrix_x4_trans(u32 (&r)[4], sptr p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
}

// Two matrices: addresses are those of lanes 0 to 15.
DEV void ldmatrix_x2(u32 (&r)[2], sptr p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(p)
                 : "memory");
}

DEV void ldmatrix_x2_trans(u32 (&r)[2], sptr p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(p)
                 : "memory");
}

// d [16, 8] f32 += a [16, 16] bf16 times b [16, 8] bf16, by a warp. With g = lane / 4 and t = lane % 4:
//   a[0..4]  elements 2t, 2t+1 of columns 0..8 in rows g and g+8, then of columns 8..16 in rows g and g+8
//   b0, b1   rows 2t, 2t+1 and 2t+8, 2t+9 of column g
//   d[0..4]  columns 2t, 2t+1 of row g, then of row g+8
// "Warp Level Matrix: mma.m16n8k16".
DEV void mma_bf16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Waits at barrier `id` (1 to 15; 0 is __syncthreads') until so many threads, a multiple of 32, have come.
// "Parallel Synchronization: bar".
DEV void bar_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Comes to the barrier without waiting.
DEV void bar_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 16 bytes of global or shared memory at once; the address is a multiple of 16.
DEV uint4 ld_128(const void* p) {
    return *static_cast<const uint4*>(p);
}

DEV void st_128(void* p, uint4 v) {
    *static_cast<uint4*>(p) = v;
}

#else
#include "emulated.hpp"
#endif

#define FULL_WARP 0xffffffffu

// Of a block with one dimension.
DEV u32 lane_index() {
    return threadIdx.x % 32;
}

DEV u32 warp_index() {
    return threadIdx.x / 32;
}

DEV float lower_bf16(u32 pair) {
    return __uint_as_float(pair << 16);
}

DEV float upper_bf16(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// Eight bf16 as floats; p is a multiple of 16.
DEV void ld_vec8(float (&v)[8], const bf16* p) {
    const uint4 raw = ld_128(p);
    v[0] = lower_bf16(raw.x), v[1] = upper_bf16(raw.x);
    v[2] = lower_bf16(raw.y), v[3] = upper_bf16(raw.y);
    v[4] = lower_bf16(raw.z), v[5] = upper_bf16(raw.z);
    v[6] = lower_bf16(raw.w), v[7] = upper_bf16(raw.w);
}

// Rounds and stores eight.
DEV void st_vec8(bf16* p, const float (&v)[8]) {
    uint4 raw;
    raw.x = pack_bf16(v[0], v[1]);
    raw.y = pack_bf16(v[2], v[3]);
    raw.z = pack_bf16(v[4], v[5]);
    raw.w = pack_bf16(v[6], v[7]);
    st_128(p, raw);
}

// Four floats; p is a multiple of 16.
DEV void ld_vec4(float (&v)[4], const float* p) {
    const uint4 raw = ld_128(p);
    v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}

DEV void st_vec4(float* p, const float (&v)[4]) {
    uint4 raw;
    raw.x = __float_as_uint(v[0]), raw.y = __float_as_uint(v[1]);
    raw.z = __float_as_uint(v[2]), raw.w = __float_as_uint(v[3]);
    st_128(p, raw);
}

// Eight floats.
DEV void ld_vec8(float (&v)[8], const float* p) {
    float (&lower)[4] = reinterpret_cast<float (&)[4]>(v[0]);
    float (&upper)[4] = reinterpret_cast<float (&)[4]>(v[4]);
    ld_vec4(lower, p);
    ld_vec4(upper, p + 4);
}

DEV void st_vec8(float* p, const float (&v)[8]) {
    st_vec4(p, reinterpret_cast<const float (&)[4]>(v[0]));
    st_vec4(p + 4, reinterpret_cast<const float (&)[4]>(v[4]));
}

// The sum over a warp, the same bits in every lane: each step adds the two halves of a pair, and a + b = b + a.
DEV float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(FULL_WARP, v, step);
    return v;
}

DEV float warp_max(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, step));
    return v;
}

// The sum over a block with one dimension of 32 n threads, the same bits in every thread. `scratch` is a float
// of shared memory per warp, free for other use (this function's too) when it returns.
DEV float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (lane_index() == 0) scratch[warp_index()] = v;
    __syncthreads();
    v = warp_sum(lane_index() < blockDim.x / 32 ? scratch[lane_index()] : 0.0f);
    __syncthreads();
    return v;
}

DEV float block_max(float v, float* scratch) {
    v = warp_max(v);
    if (lane_index() == 0) scratch[warp_index()] = v;
    __syncthreads();
    v = warp_max(lane_index() < blockDim.x / 32 ? scratch[lane_index()] : -INFINITY);
    __syncthreads();
    return v;
}
