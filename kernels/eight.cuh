// Eight neighbours at a time: the unit in which the element-wise kernels read and write, 16 bytes of bf16.
//
// A thread owns eight neighbours of a row, or of the whole tensor where rows do not matter. The last of a row
// may be fewer, and a row whose width is no multiple of eight starts where 16 bytes may not be read at once:
// both are met here, one element at a time, so that no kernel has a second path of its own.
#pragma once
#include "dev.cuh"

// How many of eight are there when `left` elements are.
DEV int up_to_eight(size_t left) {
    return left < 8 ? (int)left : 8;
}

// Where this thread's eight start in a tensor without rows.
DEV size_t eight_of_thread() {
    return ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
}

DEV bool at_once(const void* p, int count) {
    return count == 8 && ((size_t)p & 15) == 0;
}

DEV float plain(bf16 b) {
    return bf2f(b);
}
DEV float plain(float f) {
    return f;
}
DEV void put(bf16* p, float f) {
    *p = f2bf(f);
}
DEV void put(float* p, float f) {
    *p = f;
}

// v = the `count` elements at p, bf16 or float, then zeros.
template <class T> DEV void load8(float (&v)[8], const T* p, int count) {
    if (at_once(p, count)) {
        ld_vec8(v, p);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < count ? plain(p[i]) : 0.0f;
    }
}

// The first `count` of v to p; those to bf16 are rounded to the nearest, ties to even.
template <class T> DEV void store8(T* p, const float (&v)[8], int count) {
    if (at_once(p, count)) {
        st_vec8(p, v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) put(p + i, v[i]);
    }
}

// `count` elements from one place to another, bit by bit.
DEV void copy8(bf16* to, const bf16* from, int count) {
    if (at_once(to, count) && at_once(from, count)) {
        st_128(to, ld_128(from));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) to[i] = from[i];
    }
}

// `count` NaN: what a row holds that an index out of range asked for.
DEV void spoil8(bf16* to, int count) {
    for (int i = 0; i < count; i++) to[i].x = 0x7fff;
}
