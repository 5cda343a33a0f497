// What every lane of a warp gets of the others, by each kind of shuffle and each distance. One block of 32 threads.
#include "dev.cuh"

// y[distance][kind][lane]; the kinds are: from that lane, from the lane whose number differs in these bits, from this far
// below, from this far above.
KERNEL(32) shuffle_lanes(float* y, const float* x) {
    const u32 lane = lane_index();
    const float mine = x[lane];
    for (int by = 0; by < 32; by++) {
        float* const rows = y + 4 * 32 * by + lane;
        rows[0] = __shfl_sync(FULL_WARP, mine, by);
        rows[32] = __shfl_xor_sync(FULL_WARP, mine, by);
        rows[64] = __shfl_up_sync(FULL_WARP, mine, by);
        rows[96] = __shfl_down_sync(FULL_WARP, mine, by);
    }
}
EXPORT_KERNEL(shuffle_lanes)
