// The other half of kernels/dev.cuh: CUDA's words and our wrappers of instructions, for a C++ compiler.
//
// What is built into CUDA C++ (threadIdx, float4, shuffles, fmaxf, ...) is here too, as far as kernels use it.
#pragma once
#include "interface.hpp"
#include <cmath>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)

// Each variant of a kernel is in a namespace of its own, so functions need not be `static`, which members of a
// struct could not be. Forced inline as on the device: a barrier in it is then one place per caller.
#define DEV inline __attribute__((always_inline))

#define EMULATOR_JOIN_(a, b) a##b
#define EMULATOR_JOIN(a, b) EMULATOR_JOIN_(a, b)
#define KERNEL(threads) \
    static const emulator::Bounds EMULATOR_JOIN(bounds_, __COUNTER__)(threads); \
    static void
// The build says which variant this is.
#define EXPORT_KERNEL(name) \
    static const emulator::Kernel EMULATOR_JOIN(kernel_, name)(#name, EMULATOR_FAULT, EMULATOR_DETECTOR, &name);

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->threads)
#define gridDim (emulator::current->blocks)

// A wrapper stays a function of its own, so that its return address is the place in the kernel; what it does
// to memory it tells the detector itself.
#define EMULATED static __attribute__((noinline, no_sanitize("thread"), unused))
#define EMULATOR_SITE __builtin_return_address(0)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};

DEV float2 make_float2(float x, float y) { return {x, y}; }
DEV float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEV int2 make_int2(int x, int y) { return {x, y}; }
DEV int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEV uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEV uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// ---- Numbers ----

template <class To, class From> inline To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

DEV float __uint_as_float(u32 u) { return emulator_bits<float>(u); }
DEV float __int_as_float(int i) { return emulator_bits<float>(i); }
DEV u32 __float_as_uint(float f) { return emulator_bits<u32>(f); }
DEV int __float_as_int(float f) { return emulator_bits<int>(f); }

DEV float bf2f(bf16 b) { return __uint_as_float(static_cast<u32>(b.x) << 16); }

DEV bf16 f2bf(float f) {
    const u32 u = __float_as_uint(f);
    // cvt makes every NaN this one.
    if (f != f) return {0x7fff};
    return {static_cast<u16>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

DEV u32 pack_bf16(float lo, float hi) { return f2bf(lo).x | static_cast<u32>(f2bf(hi).x) << 16; }

DEV float exp2_approx(float x) {
    const float r = exp2f(x);
    return r < 1.17549435e-38f ? 0.0f : r;
}

DEV float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// The C library has functions of its own under these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
DEV float __fdividef(float a, float b) { return a / b; }
DEV float __fdiv_rn(float a, float b) { return a / b; }
DEV float __fsqrt_rn(float x) { return sqrtf(x); }
DEV float __frcp_rn(float x) { return 1.0f / x; }
DEV float __fadd_rn(float a, float b) { return a + b; }
DEV float __fsub_rn(float a, float b) { return a - b; }
DEV float __fmul_rn(float a, float b) { return a * b; }
DEV float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
DEV int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
DEV float __int2float_rn(int x) { return static_cast<float>(x); }

DEV int __popc(u32 x) { return __builtin_popcount(x); }
DEV int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
DEV int __ffs(u32 x) { return __builtin_ffs(static_cast<int>(x)); }
DEV u32 __umulhi(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }

template <class A, class B> inline typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B> inline typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

template <class T> DEV T __ldg(const T* p) { return *p; }

// ---- Memory ----

typedef u32 sptr;

DEV sptr smem_base() { return emulator::SHARED_BASE; }
template <class T> DEV T* smem_ptr(u32 offset) { return reinterpret_cast<T*>(emulator::shared_memory() + offset); }

EMULATED uint4 ld_128(const void* p) {
    emulator::touch(p, 16, false, EMULATOR_SITE);
    uint4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

EMULATED void st_128(void* p, uint4 v) {
    emulator::touch(p, 16, true, EMULATOR_SITE);
    std::memcpy(p, &v, sizeof v);
}

EMULATED void cp_async16(sptr dst, const void* src, bool ok) { emulator::copy_async(dst, src, ok, EMULATOR_SITE); }
EMULATED void cp_async_commit() { emulator::copy_commit(); }
template <int N> EMULATED void cp_async_wait() { emulator::copy_wait(N, EMULATOR_SITE); }

// ---- Threads together ----

EMULATED void __syncthreads() { emulator::barrier(0, 0, true, EMULATOR_SITE); }
EMULATED void bar_sync(u32 id, u32 threads) { emulator::barrier(id, threads, true, EMULATOR_SITE); }
EMULATED void bar_arrive(u32 id, u32 threads) { emulator::barrier(id, threads, false, EMULATOR_SITE); }

EMULATED void __syncwarp(u32 mask = 0xffffffffu) {
    emulator::collective(emulator::Collective::SyncWarp, mask, {}, EMULATOR_SITE);
}

// Memory's order between blocks is not emulated.
DEV void __threadfence() {}
DEV void __threadfence_block() {}

// One function per type and kind, so that the return address is the place in the kernel.
#define EMULATED_SHUFFLE(name, lane) \
    template <class T> EMULATED T name(u32 mask, T v, int by) { \
        static_assert(sizeof(T) == 4, "shuffles move 32 bits"); \
        [[maybe_unused]] const int own = static_cast<int>(emulator::current->index % 32); \
        T got; \
        emulator::collective(emulator::Collective::Shuffle, mask, {&v, &got, static_cast<u32>(lane), 0}, \
                             EMULATOR_SITE); \
        return got; \
    }
EMULATED_SHUFFLE(__shfl_sync, by & 31)
EMULATED_SHUFFLE(__shfl_xor_sync, own ^ by)
// Past the end a lane gets its own value.
EMULATED_SHUFFLE(__shfl_down_sync, own + by > 31 ? own : own + by)
EMULATED_SHUFFLE(__shfl_up_sync, own - by < 0 ? own : own - by)

EMULATED u32 __ballot_sync(u32 mask, int predicate) {
    u32 votes;
    emulator::collective(emulator::Collective::Ballot, mask, {&predicate, &votes, 0, 0}, EMULATOR_SITE);
    return votes;
}
EMULATED int __any_sync(u32 mask, int predicate) {
    u32 votes;
    emulator::collective(emulator::Collective::Ballot, mask, {&predicate, &votes, 0, 0}, EMULATOR_SITE);
    return votes != 0;
}
EMULATED int __all_sync(u32 mask, int predicate) {
    const int against = !predicate;
    u32 votes;
    emulator::collective(emulator::Collective::Ballot, mask, {&against, &votes, 0, 0}, EMULATOR_SITE);
    return votes == 0;
}

EMULATED void ldmatrix_x4(u32 (&r)[4], sptr p) {
    emulator::collective(emulator::Collective::LoadMatrix, ~0u, {nullptr, r, p, 4}, EMULATOR_SITE);
}
EMULATED void ldmatrix_x4_trans(u32 (&r)[4], sptr p) {
    emulator::collective(emulator::Collective::LoadMatrix, ~0u, {nullptr, r, p, 4 | 1 << 8}, EMULATOR_SITE);
}
EMULATED void ldmatrix_x2(u32 (&r)[2], sptr p) {
    emulator::collective(emulator::Collective::LoadMatrix, ~0u, {nullptr, r, p, 2}, EMULATOR_SITE);
}
EMULATED void ldmatrix_x2_trans(u32 (&r)[2], sptr p) {
    emulator::collective(emulator::Collective::LoadMatrix, ~0u, {nullptr, r, p, 2 | 1 << 8}, EMULATOR_SITE);
}

EMULATED void mma_bf16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 in[6] = {a[0], a[1], a[2], a[3], b0, b1};
    emulator::collective(emulator::Collective::Multiply, ~0u, {in, d, 0, 0}, EMULATOR_SITE);
}

// ---- Atomics, on integers: those on floats would make results depend on the order ----

#define EMULATED_ATOMIC(name, bits, type, expression) \
    EMULATED type name(type* at, type operand) { \
        const auto change = [](u##bits raw, u##bits raw_operand, u##bits) -> u##bits { \
            const type old = static_cast<type>(raw), by = static_cast<type>(raw_operand); \
            return static_cast<u##bits>(expression); \
        }; \
        return static_cast<type>(emulator::atomic##bits(at, change, static_cast<u##bits>(operand), 0, EMULATOR_SITE)); \
    }
EMULATED_ATOMIC(atomicAdd, 32, int, old + by)
EMULATED_ATOMIC(atomicAdd, 32, u32, old + by)
EMULATED_ATOMIC(atomicAdd, 64, u64, old + by)
EMULATED_ATOMIC(atomicMax, 32, int, old > by ? old : by)
EMULATED_ATOMIC(atomicMax, 32, u32, old > by ? old : by)
EMULATED_ATOMIC(atomicMax, 64, u64, old > by ? old : by)
EMULATED_ATOMIC(atomicMin, 32, int, old < by ? old : by)
EMULATED_ATOMIC(atomicMin, 32, u32, old < by ? old : by)
EMULATED_ATOMIC(atomicMin, 64, u64, old < by ? old : by)
EMULATED_ATOMIC(atomicOr, 32, int, old | by)
EMULATED_ATOMIC(atomicOr, 32, u32, old | by)
EMULATED_ATOMIC(atomicExch, 32, int, (static_cast<void>(old), by))
EMULATED_ATOMIC(atomicExch, 32, u32, (static_cast<void>(old), by))

EMULATED u32 atomicCAS(u32* at, u32 compare, u32 value) {
    const auto change = [](u32 old, u32 wanted, u32 fresh) -> u32 { return old == wanted ? fresh : old; };
    return emulator::atomic32(at, change, compare, value, EMULATOR_SITE);
}
