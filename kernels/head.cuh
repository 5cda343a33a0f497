// Sums and lists of a row's logits, for head_logprob.cu and head_logprob_hopper.cu: what they write of a span is the
// same in kind, and `head_finish` takes either's.
// Faults    FAULT_NO_RESCALE
#pragma once
#include "dev.cuh"

constexpr int HEAD_ROWS = 128;           // of a block, whichever kernel
constexpr int FORWARD_SPAN = 1024;       // entries of the vocabulary; part of the results
constexpr int BACKWARD_SPAN = 8192;      // likewise
constexpr int STRIP = 32;                // columns that the top-k search looks at in one go
constexpr int STRIP_STRIDE = STRIP + 1;  // odd, so that a column's rows lie in different banks
constexpr u32 NO_ID = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;

// ---- Sums over a part of the vocabulary -----------------------------------------------------------------------

// Largest logit, sum of e^(logit - max), and the same weighted with (logit - max).
struct Sum {
    float max, sum, weighted;
};

DEV float power(float x) { return exp2_approx(x * LOG2_E); }

// What logits are compared with: 0 while none but minus infinity was seen, for whose difference is no number.
DEV float anchor(float max) { return max == -INFINITY ? 0.0f : max; }

DEV Sum nothing() {
    Sum none;
    none.max = -INFINITY, none.sum = 0.0f, none.weighted = 0.0f;
    return none;
}

// The same sums, relative to `max` instead of x.max. A factor of 0 has to win over an infinite shift.
DEV void move(Sum& x, float max) {
#ifndef FAULT_NO_RESCALE
    const float shift = x.max - max, factor = power(shift);
#else
    const float shift = 0.0f, factor = 1.0f;
#endif
    x.weighted = factor > 0.0f ? (x.weighted + x.sum * shift) * factor : 0.0f;
    x.sum *= factor;
    x.max = max;
}

DEV void merge(Sum& x, Sum y) {
    const float max = fmaxf(x.max, y.max), to = anchor(max);
    move(x, to);
    move(y, to);
    x.sum += y.sum;
    x.weighted += y.weighted;
    x.max = max;
}

DEV void merge_with_lane(Sum& x, int other) {
    Sum y;
    y.max = __shfl_xor_sync(FULL_WARP, x.max, other);
    y.sum = __shfl_xor_sync(FULL_WARP, x.sum, other);
    y.weighted = __shfl_xor_sync(FULL_WARP, x.weighted, other);
    merge(x, y);
}

// Adds the logits of one row that a thread holds.
template <int N> DEV void see(Sum& x, const float (&logit)[N]) {
    float max = x.max;
#pragma unroll
    for (int i = 0; i < N; i++) max = fmaxf(max, logit[i]);
    const float to = anchor(max);
    move(x, to);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float shifted = logit[i] - to, e = power(shifted);
        x.sum += e;
        // A logit of minus infinity has weight 0, not 0 * infinity.
        x.weighted += shifted < -200.0f ? 0.0f : e * shifted;
    }
    x.max = max;
}

// ---- Lists of the most likely entries --------------------------------------------------------------------------

// Whether (a, a_id) stands before (b, b_id): larger first, smaller id first among equals. Nothing that is no
// number stands before anything. An empty place, (-infinity, NO_ID), is behind all.
DEV bool before(float a, u32 a_id, float b, u32 b_id) { return a > b || (a == b && a_id < b_id); }

// In shared memory: a strip of logits, then each row's list of `count` places, place by place. One thread owns the list
// of a row.
struct Lists {
    float *strip, *value;
    u32* id;
    int count;
};

// From byte `at` on; `own_row` is the row whose list the calling thread owns, or negative.
DEV Lists empty_lists(u32 at, int own_row, int count) {
    Lists x;
    x.strip = smem_ptr<float>(at);
    x.value = smem_ptr<float>(at + HEAD_ROWS * STRIP_STRIDE * 4);
    x.id = smem_ptr<u32>(at + HEAD_ROWS * STRIP_STRIDE * 4 + HEAD_ROWS * count * 4);
    x.count = count;
    if (own_row >= 0)
        for (int i = own_row; i < count * HEAD_ROWS; i += HEAD_ROWS) x.value[i] = -INFINITY, x.id[i] = NO_ID;
    return x;
}

// Puts an entry in its place of a list, if it has one.
DEV void enter(const Lists& x, int row, float value, u32 id) {
    int to = x.count;
    for (; to > 0; to--) {
        const int other = (to - 1) * HEAD_ROWS + row;
        if (!before(value, id, x.value[other], x.id[other])) break;
        if (to < x.count) x.value[other + HEAD_ROWS] = x.value[other], x.id[other + HEAD_ROWS] = x.id[other];
    }
    if (to < x.count) x.value[to * HEAD_ROWS + row] = value, x.id[to * HEAD_ROWS + row] = id;
}
