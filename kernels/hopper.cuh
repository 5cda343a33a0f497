// The instructions that only compute capability 9.0 has (sm_90a: H100, H200), as C++ functions: barriers in shared
// memory that count arrivals and bytes, copies of a tensor's boxes, products by four warps at once.
//
// For kernels/<op>_hopper.cu alone; a large product wants ring.cuh, which is made of it. As dev.cuh does, it has two
// halves: PTX here, and for a C++ compiler tests/emulator/runtime/hopper.hpp. A name in quotes is a section of the PTX
// ISA manual.
//
// A kernel is one or more consumer warpgroups (128 threads whose first is a multiple of 128) and a producer warp:
//
//   start      one thread: mbarrier_init for each barrier, then mbarrier_init_fence(); then all: __syncthreads().
//   producer   one thread, per stage: mbarrier_wait(empty, parity ^ 1); mbarrier_expect(full, bytes);
//              tensor_load_2d(...) into the stage, completing on `full`.
//   consumer   all threads: mbarrier_wait(full, parity); wgmma_operand(d); wgmma_fence(); wgmma(d, ...) for each 16
//              of the stage; wgmma_commit(); wgmma_wait<0>(); wgmma_operand(d); one thread: mbarrier_arrive(empty).
//
// What the hardware asks for, and which of it the emulator reports when it is left out:
//   * Every tile that a tensor copy writes or wgmma reads begins at a multiple of 1024 bytes. (reported)
//   * wgmma_fence() begins every batch, the products up to a wgmma_commit(): it orders what threads did to d and to A
//     in registers before the products that use them. (reported)
//   * From wgmma to its wgmma_wait neither d nor A in registers may be touched. (reported when they changed; a read
//     is wrong on late schedules.) Both are arrays declared outside of the loop: they must live until the wait.
//   * wgmma_operand(d) before the fence and after the wait keeps the compiler from moving ordinary uses of d across
//     them, as it may: the wait does not name d. (not reported)
//   * Shared memory that threads wrote by ordinary stores, and that wgmma is to read: each writer calls
//     fence_proxy_async() after its stores and before the barrier that tells the reader. (reported by the detector)
//   * A barrier's first use by others: mbarrier_init_fence() and a __syncthreads() after the init. (reported)
//   * A stage goes back to the producer after the wgmma_wait for the products that read it. (detector) One thread's
//     wait is enough for its warpgroup.
//   * Bytes expected equal those of the boxes, zeros beyond the edges counted. (a deadlock that names the barrier)
//   * registers_give and registers_take: whole warpgroups, a multiple of 8; the sum over all warps stays within what
//     the block was launched with; in a HOPPER_KERNEL. (not reported)
#pragma once
#include "dev.cuh"

// Which index of an operand of wgmma is contiguous in shared memory: the summed one, or the other (M of A, N of B).
enum Major { K_MAJOR, MN_MAJOR };

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)

// Stands before the name of a kernel in which warpgroups give and take registers: one block per multiprocessor, so
// that the compiler knows how many a thread is launched with. Without that ptxas may leave both out (its C7508).
#define HOPPER_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

// What a kernel is told of a tensor in global memory; made by `Gpu::tensor_map`. A parameter is written
// `TENSOR_MAP x` and used as `&x`.
struct __align__(64) TensorMap {
    u64 opaque[16];
};
#define TENSOR_MAP const __grid_constant__ TensorMap

// ---- "Parallel Synchronization: mbarrier". A barrier is 8 bytes of shared memory, aligned ----

// A phase completes when so many threads have arrived and as many bytes have come as were expected. Phases are
// numbered from 0.
DEV void mbarrier_init(sptr barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the inits of this thread visible to tensor copies (and, with a __syncthreads, to threads).
// "membar / fence: fence.mbarrier_init", "fence.proxy.async".
DEV void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async;" ::: "memory");
}

DEV void mbarrier_arrive(sptr barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for so many more bytes (fewer than 2^20 at a time).
DEV void mbarrier_expect(sptr barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the latest phase of that parity is complete: parity 1 of a fresh barrier is.
DEV void mbarrier_wait(sptr barrier, u32 parity) {
    u32 complete;
    do {
        asm volatile("{\n\t"
                     ".reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t"
                     "}"
                     : "=r"(complete)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!complete);
}

// Orders this thread's ordinary accesses to shared memory before later ones by tensor copies and wgmma, of whoever
// learns of it through a barrier. "fence.proxy.async".
DEV void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- "Data Movement: cp.async.bulk.tensor" ----

// Copies the box whose first element has the coordinates (c0, c1), c0 the contiguous one, to `to`, a multiple of
// 1024; the copy counts on `barrier` with all bytes of the box. What is outside the tensor becomes zero; coordinates
// may be negative. A row of the box is 128 bytes (64 bf16), rows follow one another, and within each the 16-byte
// chunk c of row r lies at chunk c ^ (r % 8): the 128-byte swizzle, which the descriptors below know.
DEV void tensor_load_2d(sptr to, const TensorMap* map, sptr barrier, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
                 "[%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1)
                 : "memory");
}

// The same of a tensor of three extents; rows of the box follow in the order of c1, then c2.
DEV void tensor_load_3d(sptr to, const TensorMap* map, sptr barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%3, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// ---- "Miscellaneous: setmaxnreg", by all warps of a warpgroup ----

template <int REGISTERS> DEV void registers_take() {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> DEV void registers_give() {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- "Asynchronous Warpgroup Level Matrix", by the four warps of a warpgroup ----

DEV void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit are one group.
DEV void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups, the latest, are unfinished.
template <int N> DEV void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// To the compiler, a use and a change of each register.
template <int N> DEV void wgmma_operand(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N> DEV void wgmma_operand(u32 (&a)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// Names of operands by their numbers, and the operands: accumulators are the first.
#define HOPPER_TEN(t) \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define HOPPER_NAMES_30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " HOPPER_TEN(1) HOPPER_TEN(2)
#define HOPPER_NAMES_32 HOPPER_NAMES_30 "%30, %31"
#define HOPPER_NAMES_64 HOPPER_NAMES_30 HOPPER_TEN(3) HOPPER_TEN(4) HOPPER_TEN(5) "%60, %61, %62, %63"
#define HOPPER_NAMES_128 \
    HOPPER_NAMES_30 HOPPER_TEN(3) HOPPER_TEN(4) HOPPER_TEN(5) HOPPER_TEN(6) HOPPER_TEN(7) HOPPER_TEN(8) \
        HOPPER_TEN(9) HOPPER_TEN(10) HOPPER_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define HOPPER_D8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define HOPPER_D32(i) HOPPER_D8(i), HOPPER_D8(i + 8), HOPPER_D8(i + 16), HOPPER_D8(i + 24)
#define HOPPER_D64(i) HOPPER_D32(i), HOPPER_D32(i + 32)
#define HOPPER_D128(i) HOPPER_D64(i), HOPPER_D64(i + 64)

// For N columns, so many accumulators, the numbers of what follows them.
#define HOPPER_WGMMA(N, COUNT, P0, P1, P2, P3, P4, P5, P6) \
    template <Major A = K_MAJOR, Major B = K_MAJOR> \
    DEV void wgmma(float (&d)[COUNT], u64 a, u64 b, bool accumulate) { \
        asm volatile("{\n\t" \
                     ".reg .pred p;\n\t" \
                     "setp.ne.b32 p, %" #P2 ", 0;\n\t" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HOPPER_NAMES_##COUNT "}, %" #P0 \
                     ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n\t" \
                     "}" \
                     : HOPPER_D##COUNT(0) \
                     : "l"(a), "l"(b), "r"((int)accumulate), "n"((int)(A == MN_MAJOR)), "n"((int)(B == MN_MAJOR)) \
                     : "memory"); \
    } \
    template <Major B = K_MAJOR> \
    DEV void wgmma_registers(float (&d)[COUNT], const u32 (&a)[4], u64 b, bool accumulate) { \
        asm volatile("{\n\t" \
                     ".reg .pred p;\n\t" \
                     "setp.ne.b32 p, %" #P5 ", 0;\n\t" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HOPPER_NAMES_##COUNT "}, {%" #P0 \
                     ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n\t" \
                     "}" \
                     : HOPPER_D##COUNT(0) \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), \
                       "n"((int)(B == MN_MAJOR)) \
                     : "memory"); \
    }

// d [64, N] f32 = (or += with `accumulate`) A [64, 16] times B [16, N], N = 64, 128 or 256 by the size of d.
// Thread t of the warpgroup, with g = t % 32 / 4 and c = t % 4: d[4 j .. 4 j + 4] are the columns 8 j + 2 c and
// 8 j + 2 c + 1 of row t / 32 * 16 + g, then of that row + 8.
//   wgmma            A and B by descriptors, of either kind.
//   wgmma_registers  A in registers, with the layout of `mma_bf16_16816` for the sixteen rows of each warp.
HOPPER_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
HOPPER_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
HOPPER_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef HOPPER_WGMMA

#else
#include "hopper.hpp"
#endif

// Descriptors of operands in shared memory. The fields, by "Asynchronous Warpgroup Level Matrix: Matrix Descriptor
// Format": bits 0-13 the address, 16-29 the leading byte offset (LBO), 32-45 the stride byte offset (SBO), each
// divided by 16; 49-51 the base offset, 0 where tiles begin at multiples of 1024; 62-63 the swizzle, 1 for 128 bytes.
// What LBO and SBO mean, by the manual's "Strides" and, in formulas, by the comment of `make_gmma_desc` in CUTLASS
// (include/cute/atom/mma_traits_sm90_gmma.hpp), layout B128:
//   Major-K    ((8,m),(T,2)) : ((8T,SBO),(1,T))            SBO from 8 rows to the next 8; LBO is not used, 1 by custom
//   Major-MN   ((T,8,m),(8,k)) : ((1,T,LBO),(8T,SBO))      SBO from 8 rows of K to the next 8, LBO from 64 columns
//                                                          to the next 64 (T: 8 elements of bf16)
DEV u64 wgmma_descriptor(sptr at, u32 leading, u32 stride) {
    return (u64)((at & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)1 << 62;
}

// A [M rows][64] panel, K contiguous, as a tensor copy leaves it; `at` is its first row plus 32 bytes for each 16
// elements of K that were passed (the swizzle follows from the address).
DEV u64 k_major(sptr at) {
    return wgmma_descriptor(at, 16, 1024);
}

// [K rows][64] panels, M or N contiguous, as tensor copies of boxes of 64 columns leave them, `panel` bytes from one to
// the next (any number where the operand is 64 wide); `at` is the first one's first row plus 2048 bytes for each 16
// rows of K that were passed.
DEV u64 mn_major(sptr at, u32 panel) {
    return wgmma_descriptor(at, panel, 1024);
}
