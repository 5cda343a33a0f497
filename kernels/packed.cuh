// What the attention kernels share, whichever instructions they use. A warp owns 16 rows of every product; lane
// 4 g + t has a part of the rows g and g + 8.
#pragma once
#include "dev.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// A sequence of a packed batch, and one head's rows in it.
struct Span {
    int begin, length;
    Span(const int* cu, int sequence) : begin(cu[sequence]), length(cu[sequence + 1] - begin) {}
    // Of element 0 of row `row` of head `head` of `heads`, each of `size` elements.
    DEV size_t at(int row, int head, int heads, int size) const {
        return ((size_t)(begin + row) * heads + head) * size;
    }
};

// Reductions over the four lanes that hold a row.
DEV float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
DEV float row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
