// Where a tile of results lies, and how pairs of adjacent results reach memory: for every kernel that is a product.
#pragma once
#include "dev.cuh"

// out[row, col..] = or += the pair, rounded once; what is outside is dropped.
DEV void store_bf16(bf16* out, int rows, int cols, int row, int col, float first, float second, bool add) {
    if (row >= rows || col >= cols) return;
    bf16* to = out + (size_t)row * cols + col;
    if (cols % 2 == 0) {
        u32* both = reinterpret_cast<u32*>(to);
        if (add) {
            const u32 old = *both;
            first += lower_bf16(old);
            second += upper_bf16(old);
        }
        *both = pack_bf16(first, second);
    } else {
        to[0] = f2bf(add ? first + bf2f(to[0]) : first);
        if (col + 1 < cols) to[1] = f2bf(add ? second + bf2f(to[1]) : second);
    }
}

// out[row, col..] = or += the pair in f32.
DEV void store_f32(float* out, int rows, int cols, int row, int col, float first, float second, bool add) {
    if (row >= rows || col >= cols) return;
    float* to = out + (size_t)row * cols + col;
    if (cols % 2 == 0) {
        float2* both = reinterpret_cast<float2*>(to);
        float2 sum;
        sum.x = first, sum.y = second;
        if (add) {
            const float2 old = *both;
            sum.x += old.x, sum.y += old.y;
        }
        *both = sum;
    } else {
        to[0] = add ? first + to[0] : first;
        if (col + 1 < cols) to[1] = add ? second + to[1] : second;
    }
}

// The tile of block `index` when the tiles of `height` x `width` are walked in bands of eight rows, column by column:
// blocks that run at the same time share rows of one operand and columns of the other, which come from the L2 cache.
struct Spot {
    int row, col;
};
DEV Spot spot_of(int index, int height, int width) {
    constexpr int BAND = 8;
    const int band = index / (BAND * width), within = index - band * (BAND * width);
    const int rows = min(BAND, height - band * BAND);
    Spot spot;
    spot.row = band * BAND + within % rows, spot.col = within / rows;
    return spot;
}
