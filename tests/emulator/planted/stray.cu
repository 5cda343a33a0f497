// Copies, and all the ways in which one can go wrong.
#include "dev.cuh"

// y[i] = x[i]. Blocks of 64 threads.
KERNEL(64) copy_all(float* y, const float* x, int n) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= n) return;
#if defined(FAULT_FAR)
    y[i - (1ll << 38)] = x[i];
#elif defined(FAULT_BEHIND)
    y[i + 1] = x[i];
#elif defined(FAULT_AHEAD)
    y[i - 1] = x[i];
#elif defined(FAULT_NO_MEMORY)
    y[i] = *reinterpret_cast<const float*>(16);
#elif defined(FAULT_SKEWED)
    y[i] = __uint_as_float(ld_128(x + i).x);
#elif defined(FAULT_ONE_PLACE)
    y[i] = x[i];
    if (threadIdx.x == 0) y[0] = x[0];
#elif defined(FAULT_NEIGHBOUR)
    y[i] = x[i];
    if (threadIdx.x % 2 == 0) y[i] = y[i + 1] - x[i + 1] + x[i];
#elif defined(FAULT_DIVIDE)
    y[i] = x[n / static_cast<int>(blockIdx.y)];
#elif defined(FAULT_DEEP)
    volatile float large[100000];
    large[i] = x[i];
    y[i] = large[i];
#else
    y[i] = x[i];
#endif
}
EXPORT_KERNEL(copy_all)

// y[i] = x[i]: the first warp reads, the second writes, 32 elements at a time through one place in shared memory
// (128 bytes). Barrier 1: it is full; barrier 2: it is empty. One block of 64 threads; n is a multiple of 32.
KERNEL(64) hand_over(float* y, const float* x, int n) {
    float* const place = smem_ptr<float>(0);
    const u32 lane = lane_index();
    for (int i = lane; i < n; i += 32) {
        if (warp_index() == 0) {
#ifndef FAULT_IGNORES_EMPTY
            if (i >= 32) bar_sync(2, 64);
#endif
            place[lane] = x[i];
#ifndef FAULT_NEVER_FULL
            bar_arrive(1, 64);
#endif
        } else {
#ifndef FAULT_IGNORES_FULL
            bar_sync(1, 64);
#endif
            y[i] = place[lane];
#ifndef FAULT_IGNORES_EMPTY
            if (i + 32 < n) bar_arrive(2, 64);
#endif
        }
    }
}
EXPORT_KERNEL(hand_over)

// y[i] = the sum of its warp's x. One block of 64 threads.
KERNEL(64) sum_of_warp(float* y, const float* x) {
    const u32 i = threadIdx.x;
#if defined(FAULT_TWO_PLACES)
    if (i % 2 == 0) y[i] = warp_sum(x[i]);
    else y[i] = warp_sum(x[i] + 1.0f) - 32.0f;
#elif defined(FAULT_HALF_A_MASK)
    y[i] = x[i] + __shfl_xor_sync(0x0000ffffu, x[i], 1);
#else
    y[i] = warp_sum(x[i]);
#endif
}
EXPORT_KERNEL(sum_of_warp)
