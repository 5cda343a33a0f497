// The other half of kernels/hopper.cuh: the instructions of sm_90a, for a C++ compiler.
#pragma once
#include "emulated.hpp"

#define HOPPER_KERNEL(threads) KERNEL(threads)

struct alignas(64) TensorMap {
    u64 opaque[16];
};
#define TENSOR_MAP const TensorMap

EMULATED void mbarrier_init(sptr barrier, u32 arrivals) { emulator::mbarrier_init(barrier, arrivals, EMULATOR_SITE); }
EMULATED void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
EMULATED void mbarrier_arrive(sptr barrier) { emulator::mbarrier_arrive(barrier, 0, EMULATOR_SITE); }
EMULATED void mbarrier_expect(sptr barrier, u32 bytes) { emulator::mbarrier_arrive(barrier, bytes, EMULATOR_SITE); }
EMULATED void mbarrier_wait(sptr barrier, u32 parity) { emulator::mbarrier_wait(barrier, parity, EMULATOR_SITE); }
EMULATED void fence_proxy_async() { emulator::proxy_fence(); }

EMULATED void tensor_load_2d(sptr to, const TensorMap* map, sptr barrier, int c0, int c1) {
    const int at[3] = {c0, c1, 0};
    emulator::tensor_load(to, map, barrier, at, 2, EMULATOR_SITE);
}
EMULATED void tensor_load_3d(sptr to, const TensorMap* map, sptr barrier, int c0, int c1, int c2) {
    const int at[3] = {c0, c1, c2};
    emulator::tensor_load(to, map, barrier, at, 3, EMULATOR_SITE);
}

// Registers are not emulated.
template <int REGISTERS> DEV void registers_take() {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8");
}
template <int REGISTERS> DEV void registers_give() {
    static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8");
}

EMULATED void wgmma_fence() { emulator::products_begin(EMULATOR_SITE); }
EMULATED void wgmma_commit() { emulator::products_commit(EMULATOR_SITE); }
template <int N> EMULATED void wgmma_wait() { emulator::products_wait(N, EMULATOR_SITE); }
template <int N> DEV void wgmma_operand(float (&)[N]) {}
template <int N> DEV void wgmma_operand(u32 (&)[N]) {}

// A and B are of the kernel's enum `Major`: 0 is K_MAJOR, 1 is MN_MAJOR.
#define EMULATED_WGMMA(COUNT) \
    template <int A = 0, int B = 0> EMULATED void wgmma(float (&d)[COUNT], u64 a, u64 b, bool accumulate) { \
        emulator::product({d, 2 * COUNT, nullptr, a, b, A == 1, B == 1, accumulate}, EMULATOR_SITE); \
    } \
    template <int B = 0> \
    EMULATED void wgmma_registers(float (&d)[COUNT], const u32 (&a)[4], u64 b, bool accumulate) { \
        emulator::product({d, 2 * COUNT, a, 0, b, false, B == 1, accumulate}, EMULATOR_SITE); \
    }
EMULATED_WGMMA(32)
EMULATED_WGMMA(64)
EMULATED_WGMMA(128)
