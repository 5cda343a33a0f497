// As instructions.cu, of hopper.cuh: for sm_90a alone. All take (out, in), some then maps of tensors that lie in `in`.
#include "hopper.cuh"

// Chunk `chunk` of row `row` of a tile at `at`, where the 128-byte swizzle has it.
DEV u32 swizzled(u32 at, u32 row, u32 chunk) {
    return at + row * 128 + ((chunk ^ row % 8) << 4);
}

// in: per block, first of all, a box's coordinates, c0, c1 and, of three, c2. out: per block the box as it lies in
// shared memory and the 128 bytes behind it, all of which were ones. Blocks of 128 threads; 128 * (ROWS + 1) + 8 bytes
// of shared memory.
template <int EXTENTS, int ROWS> DEV void box_body(u32* out, const u32* in, const TensorMap* map) {
    constexpr u32 WORDS = 32 * (ROWS + 1);
    const sptr full = smem_base() + 4 * WORDS;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init_fence();
    }
    for (u32 i = threadIdx.x; i < WORDS; i += 128) smem_ptr<u32>(0)[i] = 0xffffffff;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32* const at = in + EXTENTS * blockIdx.x;
        const int c0 = static_cast<int>(at[0]), c1 = static_cast<int>(at[1]);
        mbarrier_expect(full, 128 * ROWS);
        if (EXTENTS == 2) tensor_load_2d(smem_base(), map, full, c0, c1);
        else tensor_load_3d(smem_base(), map, full, c0, c1, static_cast<int>(at[2]));
    }
    mbarrier_wait(full, 0);
    for (u32 i = threadIdx.x; i < WORDS; i += 128) out[WORDS * blockIdx.x + i] = smem_ptr<u32>(0)[i];
}

KERNEL(128) conform_box_2d(u32* out, const u32* in, TENSOR_MAP map) { box_body<2, 20>(out, in, &map); }
EXPORT_KERNEL(conform_box_2d)

KERNEL(128) conform_box_3d(u32* out, const u32* in, TENSOR_MAP map) { box_body<3, 18>(out, in, &map); }
EXPORT_KERNEL(conform_box_3d)

// in: per thread an address, two offsets. out: per thread what wgmma_descriptor, k_major and mn_major make of them.
KERNEL(128) conform_descriptors(u32* out, const u32* in) {
    const u32* const mine = in + 3 * threadIdx.x;
    const u64 made[3] = {wgmma_descriptor(mine[0], mine[1], mine[2]), k_major(mine[0]), mn_major(mine[0], mine[1])};
    for (int j = 0; j < 3; ++j) {
        out[6 * threadIdx.x + 2 * j] = static_cast<u32>(made[j]);
        out[6 * threadIdx.x + 2 * j + 1] = static_cast<u32>(made[j] >> 32);
    }
}
EXPORT_KERNEL(conform_descriptors)

enum { A_BYTES = 64 * 128, B_PANEL = 64 * 128 + 1024 };

// d (+)= A B over 64 of K. In shared memory A is at 0, B at A_BYTES, its panels, if M or N is contiguous, with a gap.
template <int N, Major A, Major B, bool REGISTERS>
DEV void product_body(u32* out, const u32* in, bool accumulate) {
    const u32* const a = in;
    const u32* const b = a + 64 * 32;
    const u32* const start = b + N * 32 + threadIdx.x * (N / 2);
    u32 left[4][4];
    for (int i = 0; i < 16; i++) left[i / 4][i % 4] = a[16 * threadIdx.x + i];
    if (!REGISTERS) {
        for (u32 i = threadIdx.x; i < 64 * 8; i += 128)
            st_128(smem_ptr<u8>(swizzled(0, i / 8, i % 8)), ld_128(a + 4 * i));
    }
    for (u32 i = threadIdx.x; i < N * 8; i += 128) {
        const u32 row = i / 8, tile = B == K_MAJOR ? 0 : row / 64;
        st_128(smem_ptr<u8>(swizzled(A_BYTES + B_PANEL * tile, row - 64 * tile, i % 8)), ld_128(b + 4 * i));
    }
    fence_proxy_async();
    __syncthreads();
    float d[N / 2];
    for (int i = 0; i < N / 2; i++) d[i] = __uint_as_float(start[i]);
    wgmma_operand(d);
    for (int i = 0; i < 4; i++) wgmma_operand(left[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const sptr at = smem_base(), to = at + A_BYTES;
        const u64 first = A == K_MAJOR ? k_major(at + 32 * i) : mn_major(at + 2048 * i, 0);
        const u64 second = B == K_MAJOR ? k_major(to + 32 * i) : mn_major(to + 2048 * i, B_PANEL);
        if (REGISTERS) wgmma_registers<B>(d, left[i], second, accumulate || i > 0);
        else wgmma<A, B>(d, first, second, accumulate || i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_operand(d);
    for (int i = 0; i < N / 2; i++) out[threadIdx.x * (N / 2) + i] = __float_as_uint(d[i]);
}

// in: per block A (2048 words), B (32 N words), and per thread its registers of d (N / 2 each). out: per thread d after
// the product. Blocks 0 to 3: A and B in shared memory, rows of A [64] those of M, but in 2 and 3 of K; rows of B [64]
// those of N, but in 1 and 3 of K, 64 for each 64 of N. Blocks 4 and 5: A is per thread four words for each 16 of K, B
// is as in 0 and 1. Blocks 6 to 11: the same, added to what d was. 128 threads; 8192 + 144 N bytes of shared memory.
template <int N> DEV void products_body(u32* out, const u32* in) {
    in += blockIdx.x * (64 * 32 + N * 32 + N * 64);
    out += blockIdx.x * (N * 64);
    const bool accumulate = blockIdx.x >= 6;
    switch (blockIdx.x % 6) {
    case 0: return product_body<N, K_MAJOR, K_MAJOR, false>(out, in, accumulate);
    case 1: return product_body<N, K_MAJOR, MN_MAJOR, false>(out, in, accumulate);
    case 2: return product_body<N, MN_MAJOR, K_MAJOR, false>(out, in, accumulate);
    case 3: return product_body<N, MN_MAJOR, MN_MAJOR, false>(out, in, accumulate);
    case 4: return product_body<N, K_MAJOR, K_MAJOR, true>(out, in, accumulate);
    default: return product_body<N, K_MAJOR, MN_MAJOR, true>(out, in, accumulate);
    }
}

KERNEL(128) conform_wgmma_64(u32* out, const u32* in) { products_body<64>(out, in); }
EXPORT_KERNEL(conform_wgmma_64)

KERNEL(128) conform_wgmma_128(u32* out, const u32* in) { products_body<128>(out, in); }
EXPORT_KERNEL(conform_wgmma_128)

KERNEL(128) conform_wgmma_256(u32* out, const u32* in) { products_body<256>(out, in); }
EXPORT_KERNEL(conform_wgmma_256)

// A ring of three stages that tensor copies fill, two to a stage, 14 times. in: x and then y, each 14 boxes of 8 rows.
// out: per time the stage's 512 words as consumers find it. One block of 160 threads, the last warp the producer;
// 3 * 2048 + 48 bytes of shared memory.
KERNEL(160) conform_ring(u32* out, const u32* in, TENSOR_MAP x, TENSOR_MAP y) {
    constexpr u32 STAGES = 3, TIMES = 14;
    const sptr full = smem_base() + STAGES * 2048, empty = full + STAGES * 8;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, 128);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (lane_index() != 0) return;
        for (u32 time = 0; time < TIMES; time++) {
            const u32 s = time % STAGES;
            mbarrier_wait(empty + 8 * s, time / STAGES % 2 ^ 1);
            mbarrier_expect(full + 8 * s, 2048);
            tensor_load_2d(smem_base() + 2048 * s, &x, full + 8 * s, 0, static_cast<int>(8 * time));
            tensor_load_2d(smem_base() + 2048 * s + 1024, &y, full + 8 * s, 0, static_cast<int>(8 * time));
        }
        return;
    }
    for (u32 time = 0; time < TIMES; time++) {
        const u32 s = time % STAGES;
        mbarrier_wait(full + 8 * s, time / STAGES % 2);
        for (u32 i = threadIdx.x; i < 512; i += 128) out[512 * time + i] = smem_ptr<u32>(2048 * s)[i];
        mbarrier_arrive(empty + 8 * s);
    }
}
EXPORT_KERNEL(conform_ring)

// The same among threads: 64 store a word each, 64 others take it, two stages, 15 times. in: 64 words each time. out:
// the words, each time in reverse order. One block of 128 threads; 512 + 32 bytes of shared memory.
KERNEL(128) conform_phases(u32* out, const u32* in) {
    constexpr u32 TIMES = 15;
    const sptr full = smem_base() + 512, empty = full + 16;
    if (threadIdx.x == 0) {
        for (u32 s = 0; s < 2; s++) {
            mbarrier_init(full + 8 * s, 64);
            mbarrier_init(empty + 8 * s, 64);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    for (u32 time = 0; time < TIMES; time++) {
        const u32 s = time % 2, parity = time / 2 % 2, i = threadIdx.x % 64;
        if (threadIdx.x < 64) {
            mbarrier_wait(empty + 8 * s, parity ^ 1);
            smem_ptr<u32>(256 * s)[i] = in[64 * time + i];
            mbarrier_arrive(full + 8 * s);
        } else {
            mbarrier_wait(full + 8 * s, parity);
            out[64 * time + i] = smem_ptr<u32>(256 * s)[63 - i];
            mbarrier_arrive(empty + 8 * s);
        }
    }
}
EXPORT_KERNEL(conform_phases)

// Holds 16 words of each thread while its warpgroup changes how many registers it has, then N: the words, reversed.
template <int N, int REGISTERS, bool TAKE> DEV void kept(u32* out, const u32* in) {
    u32 early[16], held[N];
    for (int i = 0; i < 16; i++) early[i] = in[i];
    wgmma_operand(early);
    if (TAKE) registers_take<REGISTERS>();
    else registers_give<REGISTERS>();
    wgmma_operand(early);
    for (int i = 0; i < 16; i++) held[i] = early[i];
    for (int i = 16; i < N; i++) held[i] = in[i];
    wgmma_operand(held);
    for (int i = 0; i < N; i++) out[i] = held[N - 1 - i];
}

// in: per thread 192 words. out: of the first warpgroup, which gives, the first 16 of each thread, reversed; of the
// others, all 192, more than the registers of the launch hold. One block of 384 threads, 168 registers each at first.
HOPPER_KERNEL(384) conform_registers(u32* out, const u32* in) {
    const u32 thread = threadIdx.x;
    if (thread < 128) kept<16, 40, false>(out + 16 * thread, in + 192 * thread);
    else kept<192, 232, true>(out + 16 * 128 + 192 * (thread - 128), in + 192 * thread);
}
EXPORT_KERNEL(conform_registers)
