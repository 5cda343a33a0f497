// One kernel for each instruction, or few, of dev.cuh: what it does to given bits, and nothing else.
//
// All take (out, in). What `in` holds and `out` has to hold is said, independently, in instructions.rs.
#include "dev.cuh"

// in: per thread a float. out: per thread bf2f of its lower half, f2bf, pack_bf16 with the next thread's, and the
// halves of that. Blocks of 256 threads.
KERNEL(256) conform_conversions(u32* out, const u32* in) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    const float x = __uint_as_float(in[i]);
    const float next = __uint_as_float(in[i ^ 1]);
    const bf16 lower = {static_cast<u16>(in[i] & 0xffff)};
    const u32 pair = pack_bf16(x, next);
    out[5 * i] = __float_as_uint(bf2f(lower));
    out[5 * i + 1] = f2bf(x).x;
    out[5 * i + 2] = pair;
    out[5 * i + 3] = __float_as_uint(lower_bf16(pair));
    out[5 * i + 4] = __float_as_uint(upper_bf16(pair));
}
EXPORT_KERNEL(conform_conversions)

// Functions within some units in the last place: exp2_approx, and those of CUDA that kernels use.
KERNEL(256) conform_exp2(u32* out, const u32* in) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    out[i] = __float_as_uint(exp2_approx(__uint_as_float(in[i])));
}
EXPORT_KERNEL(conform_exp2)

KERNEL(256) conform_exp(u32* out, const u32* in) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    out[i] = __float_as_uint(expf(__uint_as_float(in[i])));
}
EXPORT_KERNEL(conform_exp)

KERNEL(256) conform_log(u32* out, const u32* in) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    out[i] = __float_as_uint(logf(__uint_as_float(in[i])));
}
EXPORT_KERNEL(conform_log)

// in: per thread three floats a, b, c. out: what has to be rounded as IEEE says.
KERNEL(256) conform_arithmetic(u32* out, const u32* in) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    const float a = __uint_as_float(in[3 * i]), b = __uint_as_float(in[3 * i + 1]), c = __uint_as_float(in[3 * i + 2]);
    u32* const mine = out + 9 * i;
    mine[0] = __float_as_uint(__fadd_rn(a, b));
    mine[1] = __float_as_uint(__fsub_rn(a, b));
    mine[2] = __float_as_uint(__fmul_rn(a, b));
    mine[3] = __float_as_uint(__fdiv_rn(a, b));
    mine[4] = __float_as_uint(__fsqrt_rn(fabsf(a)));
    mine[5] = __float_as_uint(sqrtf(fabsf(b)));
    mine[6] = __float_as_uint(fmaf(a, b, c));
    mine[7] = __float_as_uint(fmaxf(a, b));
    mine[8] = __float_as_uint(a / b);
}
EXPORT_KERNEL(conform_arithmetic)

// in: 32 words per thread. out: the same 32 words through each pair of a vector load and store, elements in reverse
// order, the first 16 bytes by way of shared memory and the next thread. One block of 64 threads; 1024 bytes of shared
// memory.
KERNEL(64) conform_vectors(u32* out, const u32* in) {
    const u32* const from = in + 32 * threadIdx.x;
    u32* const to = out + 32 * threadIdx.x;
    uint4 raw = ld_128(from);
    st_128(smem_ptr<u8>(16 * threadIdx.x), raw);
    __syncthreads();
    raw = ld_128(smem_ptr<u8>(16 * (threadIdx.x ^ 1)));
    st_128(to, make_uint4(raw.w, raw.z, raw.y, raw.x));

    float four[4], reversed4[4];
    ld_vec4(four, reinterpret_cast<const float*>(from + 4));
    for (int j = 0; j < 4; ++j) reversed4[j] = four[3 - j];
    st_vec4(reinterpret_cast<float*>(to + 4), reversed4);

    float eight[8], reversed8[8];
    ld_vec8(eight, reinterpret_cast<const float*>(from + 8));
    for (int j = 0; j < 8; ++j) reversed8[j] = eight[7 - j];
    st_vec8(reinterpret_cast<float*>(to + 8), reversed8);

    ld_vec8(eight, reinterpret_cast<const bf16*>(from + 16));
    for (int j = 0; j < 8; ++j) reversed8[j] = eight[7 - j];
    st_vec8(reinterpret_cast<bf16*>(to + 16), reversed8);
    ld_vec8(eight, reinterpret_cast<const bf16*>(from + 20));
    st_vec8(reinterpret_cast<float*>(to + 20), eight);
    ld_vec8(eight, reinterpret_cast<const bf16*>(from + 28));
    st_vec8(reinterpret_cast<bf16*>(to + 28), eight);
}
EXPORT_KERNEL(conform_vectors)

// in: 12 words per thread, 16 bytes for each of three groups of copies; the second group is only copied by odd
// threads, the others write zeros. out: the groups as they are when waited for, of the last the next thread's. One block
// of 64 threads; 3072 bytes of shared memory.
KERNEL(64) conform_copies(u32* out, const u32* in) {
    const u32 t = threadIdx.x;
    for (int group = 0; group < 3; ++group) {
        cp_async16(smem_base() + 1024 * group + 16 * t, in + 12 * t + 4 * group, group != 1 || t % 2 == 1);
        cp_async_commit();
    }
    cp_async_wait<2>();
    for (int j = 0; j < 4; ++j) out[12 * t + j] = smem_ptr<u32>(16 * t)[j];
    cp_async_wait<1>();
    for (int j = 0; j < 4; ++j) out[12 * t + 4 + j] = smem_ptr<u32>(1024 + 16 * t)[j];
    cp_async_wait<0>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) out[12 * t + 8 + j] = smem_ptr<u32>(2048 + 16 * (t ^ 1))[j];
}
EXPORT_KERNEL(conform_copies)

// in: 32 rows of 8 bf16, four matrices. They lie in shared memory in another order, rows 48 bytes apart. out: per lane
// the registers of ldmatrix x4, x4 transposed, x2, x2 transposed. One warp; 1536 bytes of shared memory.
KERNEL(32) conform_ldmatrix(u32* out, const u32* in) {
    const u32 lane = lane_index();
    const u32 place = 48 * (lane * 5 % 32);
    for (int j = 0; j < 4; ++j) smem_ptr<u32>(place)[j] = in[4 * lane + j];
    __syncwarp();
    u32 four[4], two[2];
    u32* const mine = out + 12 * lane;
    ldmatrix_x4(four, smem_base() + place);
    for (int j = 0; j < 4; ++j) mine[j] = four[j];
    ldmatrix_x4_trans(four, smem_base() + place);
    for (int j = 0; j < 4; ++j) mine[4 + j] = four[j];
    ldmatrix_x2(two, smem_base() + place);
    for (int j = 0; j < 2; ++j) mine[8 + j] = two[j];
    ldmatrix_x2_trans(two, smem_base() + place);
    for (int j = 0; j < 2; ++j) mine[10 + j] = two[j];
}
EXPORT_KERNEL(conform_ldmatrix)

// in: per lane its registers of a (4), b (2) and d (4). out: per lane d after the product. A product per warp.
KERNEL(64) conform_mma(u32* out, const u32* in) {
    const u32 thread = blockIdx.x * 64 + threadIdx.x;
    const u32* const mine = in + 10 * thread;
    const u32 a[4] = {mine[0], mine[1], mine[2], mine[3]};
    float d[4];
    for (int j = 0; j < 4; ++j) d[j] = __uint_as_float(mine[6 + j]);
    mma_bf16_16816(d, a, mine[4], mine[5]);
    for (int j = 0; j < 4; ++j) out[4 * thread + j] = __float_as_uint(d[j]);
}
EXPORT_KERNEL(conform_mma)

// in: per thread a float, then per thread a word. out: per thread what it has of its warp and block. 32 n threads; 4 n
// bytes of shared memory.
KERNEL(256) conform_together(u32* out, const u32* in) {
    float* const scratch = smem_ptr<float>(0);
    const u32 threads = blockDim.x;
    const float x = __uint_as_float(in[threadIdx.x]);
    const u32 word = in[threads + threadIdx.x];
    u32* const mine = out + 11 * threadIdx.x;
    mine[0] = lane_index();
    mine[1] = warp_index();
    mine[2] = __float_as_uint(warp_sum(x));
    mine[3] = __float_as_uint(warp_max(x));
    mine[4] = __float_as_uint(block_sum(x, scratch));
    mine[5] = __float_as_uint(block_max(x, scratch));
    mine[6] = __shfl_sync(FULL_WARP, word, static_cast<int>(word % 32));
    mine[7] = __shfl_xor_sync(FULL_WARP, word, 5);
    mine[8] = __shfl_up_sync(FULL_WARP, word, 3);
    mine[9] = __shfl_down_sync(FULL_WARP, word, 9);
    mine[10] = __ballot_sync(FULL_WARP, word & 1);
}
EXPORT_KERNEL(conform_together)

// in: a word per thread. out: threads 0 to 63 get what 64 to 127 left at barrier 1, where these do not wait; they
// exchange among themselves at barrier 2, as the others do at barrier 3. One block of 128 threads; 1024 bytes.
KERNEL(128) conform_barriers(u32* out, const u32* in) {
    u32* const left = smem_ptr<u32>(0);
    u32* const exchanged = smem_ptr<u32>(512);
    const u32 t = threadIdx.x;
    if (t >= 64) {
        left[t - 64] = in[t];
        bar_arrive(1, 128);
    } else {
        bar_sync(1, 128);
        out[t] = left[63 - t];
    }
    exchanged[t] = in[t];
    bar_sync(t < 64 ? 2 : 3, 64);
    out[128 + t] = exchanged[t ^ 33];
    if (t >= 64) out[t] = in[t];
}
EXPORT_KERNEL(conform_barriers)

// in: a word per thread. out: eight words, from 0, into each of which every thread puts bits of its own.
KERNEL(256) conform_atomics(u32* out, const u32* in) {
    const u32 word = in[blockIdx.x * 256 + threadIdx.x];
    atomicOr(out + word % 8, 1u << (word / 8 % 32));
}
EXPORT_KERNEL(conform_atomics)
