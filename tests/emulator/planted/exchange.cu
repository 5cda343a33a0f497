// Two small kernels for the emulator's own tests, each with faults to plant.
#include "dev.cuh"

// y[i] = x[i ^ 1] within a warp, through shared memory. One block of 32 threads; 128 bytes of shared memory.
KERNEL(32) exchange_lanes(float* y, const float* x) {
    float* const shared = smem_ptr<float>(0);
    const u32 lane = lane_index();
    shared[lane] = x[lane];
#ifndef FAULT_NO_SYNCWARP
    __syncwarp();
#endif
    y[lane] = shared[lane ^ 1];
}
EXPORT_KERNEL(exchange_lanes)

// y[i] = the sum of all x of i's block. Blocks of 256 threads; 32 bytes of shared memory.
KERNEL(256) sum_of_block(float* y, const float* x, int n) {
    float* const partial = smem_ptr<float>(0);
    const int i = blockIdx.x * 256 + threadIdx.x;
#ifdef FAULT_NO_BOUND
    float sum = x[i];
#else
    float sum = i < n ? x[i] : 0.0f;
#endif
    sum = warp_sum(sum);
    if (lane_index() == 0) partial[warp_index()] = sum;
#ifdef FAULT_BRANCH
    if (warp_index() != 3) __syncthreads();
#elif !defined(FAULT_NO_BARRIER)
    __syncthreads();
#endif
#ifdef FAULT_PAST_END
    const float part = lane_index() < 9 ? partial[lane_index()] : 0.0f;
#else
    const float part = lane_index() < 8 ? partial[lane_index()] : 0.0f;
#endif
#ifdef FAULT_DIVERGENT
    sum = lane_index() < 16 ? warp_sum(part) : 0.0f;
#else
    sum = warp_sum(part);
#endif
    if (i < n) y[i] = sum;
}
EXPORT_KERNEL(sum_of_block)
