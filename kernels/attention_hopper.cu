// Causal attention over packed sequences by warpgroups and tensor copies (sm_90a alone), forward and backward.
//
// Law       that of attention.cu, and its shapes, results, roundings, and its promise that a sequence has the same bits
//           whatever else is in the batch. From its bits these differ in the last place: within 16 keys wgmma sums
//           otherwise than mma.sync does, and the forward pass goes along the keys from the diagonal down.
// Grid      384 threads: two consumer warpgroups, 64 rows each, and a third whose first warp produces. forward and
//           query_gradients: (H * S, ceil(longest / 128)), a block owns 128 queries of one head; the last tiles, which
//           see most keys, come first. key_gradients: (KV * S, ceil(longest / 128)), a block owns 128 keys and visits
//           the query heads of its group in order. delta is attention.cu's.
// Maps      of q, do [T,H,D] and k, v [T,KV,D]: a box is 64 columns of one head, of as many tokens as the tile has
//           rows. Beyond the last token boxes are zero, but beyond a sequence they hold the next one's rows. Rows of a
//           left operand make rows of a result that nobody stores; rows of a right operand are summed over, and are
//           cleared first: a probability of 0 does not make 0 of a NaN.
// Overlap   forward: the scores of the next tile and the sum of this tile's values are under way together, and the
//           softmax of the next tile runs beside the latter. backward: one warpgroup's products run beside the other's
//           exponentials, as they come.
// Shared    see the three `*_bytes` of the launcher.
// Faults    FAULT_FULL, FAULT_EMPTY, FAULT_RELEASE, FAULT_P_EARLY, FAULT_CLEAR_FENCE, FAULT_MASK_OFF_BY_ONE,
//           FAULT_NO_RESCALE, FAULT_NO_CLEAR
// Partners  hopper.cuh, src/tensor/ops/attention.rs (reference), src/cuda/ops/attention.rs (launcher),
//           tests/kernels/attention.rs
//
// Shah et al., "FlashAttention-3" (2024), for the producer and for the overlap in the forward pass.
#include "hopper.cuh"
#include "packed.cuh"

constexpr int CONSUMERS = 256;
// Rows a block owns, 64 for each consumer warpgroup; also the keys that a step of `forward` visits.
constexpr int OWN = 128;
constexpr int STAGES = 2;

// Registers: 384 threads are launched with 168 each, and 128 * 24 + 256 * 240 is as many.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// A tile [ROWS, D] is D / 64 panels [ROWS, 64], each as one box leaves it.
template <int ROWS> constexpr u32 PANEL = ROWS * 128;
template <int D, int ROWS> constexpr u32 TILE = D / 64 * PANEL<ROWS>;

// Stages that a producer fills and the consumers empty in turn; step i uses stage i % STAGES. The stages follow one
// another at `tiles`; a stage has two barriers, full and empty.
struct Ring {
    sptr tiles;
    u32 bytes;
    sptr barriers;

    DEV void init(u32 fillers, u32 emptiers) const {
        for (int stage = 0; stage < STAGES; stage++) {
            mbarrier_init(full(stage), fillers);
            mbarrier_init(empty(stage), emptiers);
        }
    }
    DEV sptr tile(int step) const { return tiles + step % STAGES * bytes; }
    DEV sptr full(int step) const { return barriers + step % STAGES * 16; }
    DEV sptr empty(int step) const { return full(step) + 8; }
    DEV void wait_full(int step) const {
#ifndef FAULT_FULL
        mbarrier_wait(full(step), step / STAGES % 2);
#endif
    }
    // A fresh barrier's phase of parity 1 counts as complete, so the first turn does not wait.
    DEV void wait_empty(int step) const {
#ifndef FAULT_EMPTY
        mbarrier_wait(empty(step), step / STAGES % 2 ^ 1);
#endif
    }
    // After a wgmma_wait for the products that read the stage: one arrival of a warpgroup.
    DEV void release(int step) const {
        if (threadIdx.x % 128 == 0) mbarrier_arrive(empty(step));
    }
    // The same for a stage of which threads read by themselves too: one arrival of each warp, after all its lanes.
    DEV void release_by_warps(int step) const {
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(empty(step));
    }
};
constexpr u32 RING_BARRIERS = STAGES * 16;

// Starts to copy the rows token.. of a head to a tile.
template <int D, int ROWS> DEV void load_tile(sptr tile, const TensorMap* map, sptr barrier, int head, int token) {
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++)
        tensor_load_3d(tile + panel * PANEL<ROWS>, map, barrier, 64 * panel, head, token);
}

// Makes zeros of the rows count.. of a tile that has come. By all consumers, before any of them asks for a product
// with it: `cleared` follows.
template <int D, int ROWS> DEV void clear_rows(sptr tile, int count) {
#ifndef FAULT_NO_CLEAR
    uint4 zeros;
    zeros.x = zeros.y = zeros.z = zeros.w = 0;
    // The swizzle permutes the eight chunks of a row: of zeros it is no matter.
    for (int at = threadIdx.x; at < (ROWS - count) * (D / 8); at += CONSUMERS) {
        const u32 panel = at % (D / 8) / 8, row = count + at / (D / 8), chunk = at % 8;
        st_128(smem_ptr<u8>(tile - smem_base() + panel * PANEL<ROWS> + row * 128 + chunk * 16), zeros);
    }
#endif
}

// What ordinary stores have cleared is read by products of both warpgroups and later overwritten by a copy: each
// writer's fence, then the barrier.
DEV void cleared() {
#ifndef FAULT_CLEAR_FENCE
    fence_proxy_async();
#endif
    bar_sync(1, CONSUMERS);
}

// d [64, COLS] = a b^T, with a the 64 rows from `a` on in a tile of A_ROWS rows, b a tile [COLS, D].
template <int D, int A_ROWS, int COLS> DEV void start_turned(float (&d)[COLS / 2], sptr a, sptr b) {
    wgmma_operand(d);
    wgmma_fence();  // ordinary instructions have read d since its last product
#pragma unroll
    for (int i = 0; i < D / 16; i++)
        wgmma(d, k_major(a + i / 4 * PANEL<A_ROWS> + i % 4 * 32), k_major(b + i / 4 * PANEL<COLS> + i % 4 * 32), i > 0);
    wgmma_commit();
}

// A left operand [64, K] in registers.
template <int K> DEV void hold(u32 (&p)[K / 16][4]) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) wgmma_operand(p[k]);
}

// d [64, D] += p tile [K, D].
template <int D, int K> DEV void start_product(float (&d)[D / 2], u32 (&p)[K / 16][4], sptr tile) {
    wgmma_operand(d);
    hold<K>(p);
    wgmma_fence();  // ordinary instructions have written p, and may have scaled d
#pragma unroll
    for (int k = 0; k < K / 16; k++)
        wgmma_registers<MN_MAJOR>(d, p[k], mn_major(tile + k * 2048, PANEL<K>), true);
    wgmma_commit();
}

// Rounds an accumulator x [64, K] to a left operand: the layouts agree. No product may be using p.
template <int K> DEV void round_to_operand(u32 (&p)[K / 16][4], const float (&x)[K / 2]) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) p[k][i] = pack_bf16(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
    }
}

// Of accumulator element i, whose row of the warp's sixteen is lane / 4 or 8 more.
DEV int column_of(int i) { return i / 4 * 8 + (lane_index() & 3) * 2 + (i & 1); }
DEV int lower(int i) { return i / 2 % 2; }

DEV bool sees(int query, int key) {
#ifdef FAULT_MASK_OFF_BY_ONE
    return key <= query + 1;
#else
    return key <= query;
#endif
}

// Stores this lane's part of x [16, D] * factor in the rows `row` and `row` + 8 of `to`, those that exist.
template <int D>
DEV void store_rows(bf16* to, const Span& span, int row, int head, int heads, const float (&x)[D / 2], float factor0,
                    float factor1) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float factor = r == 0 ? factor0 : factor1;
        if (row + 8 * r >= span.length) continue;
        bf16* at = to + span.at(row + 8 * r, head, heads, D) + (lane_index() & 3) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<u32*>(at + 8 * n) =
                pack_bf16(x[4 * n + 2 * r] * factor, x[4 * n + 2 * r + 1] * factor);
    }
}

// Of the two rows a lane has a part in: the largest score so far, before any scaling, and the sum of p over this
// lane's columns.
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};

    // Scores of N more keys, -inf where a key may not be seen, become p = 2^(scale * (score - top)). What was summed
    // under the old top is to be multiplied by `shrink`.
    template <int N> DEV void take(float (&scores)[N / 2], float (&shrink)[2], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = top[r];
#pragma unroll
            for (int n = 0; n < N / 8; n++)
                largest = fmaxf(largest, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
            largest = row_max(largest);
            const float level = largest * scale;
            float more = 0.0f;
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
#pragma unroll
                for (int i = 4 * n + 2 * r; i < 4 * n + 2 * r + 2; i++) {
                    scores[i] = exp2_approx(scores[i] * scale - level);
                    more += scores[i];
                }
            }
            shrink[r] = exp2_approx(top[r] * scale - level);
            top[r] = largest;
            sum[r] = sum[r] * shrink[r] + more;
        }
    }
};

template <int D>
DEV void forward(bf16* o, float* lse, const TensorMap* q, const TensorMap* k, const TensorMap* v, const int* cu,
                 int heads, int kv_heads, float scale) {
    constexpr u32 BYTES = TILE<D, OWN>;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const Span span(cu, blockIdx.x / heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN;
    if (first >= span.length) return;

    const sptr queries = smem_base(), barriers = queries + (1 + 2 * STAGES) * BYTES;
    const Ring keys = {queries + BYTES, BYTES, barriers};
    const Ring values = {queries + (1 + STAGES) * BYTES, BYTES, barriers + RING_BARRIERS};
    const sptr queries_full = barriers + 2 * RING_BARRIERS;
    if (threadIdx.x == 0) {
        mbarrier_init(queries_full, 1);
        keys.init(1, 2);
        values.init(1, 2);
        mbarrier_init_fence();
    }
    __syncthreads();

    // Step 0 is the tile with the diagonal, the only one with keys that some query may not see.
    const int steps = first / OWN + 1;
    if (threadIdx.x >= CONSUMERS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x != CONSUMERS) return;
        mbarrier_expect(queries_full, BYTES);
        load_tile<D, OWN>(queries, q, queries_full, head, span.begin + first);
        for (int step = 0; step < steps; step++) {
            const int token = span.begin + first - step * OWN;
            keys.wait_empty(step);
            mbarrier_expect(keys.full(step), BYTES);
            load_tile<D, OWN>(keys.tile(step), k, keys.full(step), kv_head, token);
            values.wait_empty(step);
            mbarrier_expect(values.full(step), BYTES);
            load_tile<D, OWN>(values.tile(step), v, values.full(step), kv_head, token);
        }
        return;
    }
    registers_take<CONSUMER_REGISTERS>();

    const int row = first + warp_index() * 16 + lane_index() / 4;  // and the eighth after it
    const sptr own = queries + threadIdx.x / 128 * 64 * 128;       // 64 rows down in each panel
    const float scale2 = scale * LOG2_E;
    float scores[OWN / 2], sums[D / 2] = {}, shrink[2];
    u32 p[OWN / 16][4];
    Softmax softmax;

    mbarrier_wait(queries_full, 0);
    keys.wait_full(0);
    start_turned<D, OWN, OWN>(scores, own, keys.tile(0));
    wgmma_wait<0>();
    wgmma_operand(scores);
    keys.release(0);
    // Keys past the sequence's end come after all its queries, so this mask hides them too.
#pragma unroll
    for (int i = 0; i < OWN / 2; i++)
        if (!sees(row + 8 * lower(i), first + column_of(i))) scores[i] = -INFINITY;
    softmax.take<OWN>(scores, shrink, scale2);
    round_to_operand<OWN>(p, scores);
    if (first + OWN > span.length) {
        values.wait_full(0);
        clear_rows<D, OWN>(values.tile(0), span.length - first);
        cleared();
    }

    if (steps > 1) keys.wait_full(1);
    for (int step = 0; step + 1 < steps; step++) {
        // Two groups of products: the next tile's scores, then this tile's values under p.
        start_turned<D, OWN, OWN>(scores, own, keys.tile(step + 1));
        values.wait_full(step);
        start_product<D, OWN>(sums, p, values.tile(step));
#ifdef FAULT_RELEASE
        keys.release(step + 1);
        values.release(step);
        wgmma_wait<1>();
#else
        wgmma_wait<1>();  // the first of the two
        keys.release(step + 1);
#endif
        wgmma_operand(scores);
        softmax.take<OWN>(scores, shrink, scale2);
#ifdef FAULT_P_EARLY
        round_to_operand<OWN>(p, scores);
#endif
        // The exponentials are to run beside the second group; the compiler would put them after its wait. They may
        // not pass a loop, and a wait for the next keys, which are needed next, is one.
        wgmma_operand(scores);
        if (step + 2 < steps) keys.wait_full(step + 2);
        wgmma_wait<0>();
        // Only now may sums and p be touched: the second group read p until here.
        wgmma_operand(sums);
        hold<OWN>(p);
#ifndef FAULT_RELEASE
        values.release(step);
#endif
#ifndef FAULT_NO_RESCALE
#pragma unroll
        for (int i = 0; i < D / 2; i++) sums[i] *= shrink[lower(i)];
#endif
        round_to_operand<OWN>(p, scores);
    }
    values.wait_full(steps - 1);
    start_product<D, OWN>(sums, p, values.tile(steps - 1));
    wgmma_wait<0>();
    wgmma_operand(sums);

    const float sum[2] = {row_sum(softmax.sum[0]), row_sum(softmax.sum[1])};
    store_rows<D>(o, span, row, head, heads, sums, 1.0f / sum[0], 1.0f / sum[1]);
#pragma unroll
    for (int r = 0; r < 2; r++)
        if ((lane_index() & 3) == 0 && row + 8 * r < span.length)
            lse[(size_t)(span.begin + row + 8 * r) * heads + head] = softmax.top[r] * scale + logf(sum[r]);
}

HOPPER_KERNEL(384) attention_forward_64_hopper(bf16* o, float* lse, TENSOR_MAP q, TENSOR_MAP k, TENSOR_MAP v,
                                               const int* cu, int heads, int kv_heads, float scale) {
    forward<64>(o, lse, &q, &k, &v, cu, heads, kv_heads, scale);
}
EXPORT_KERNEL(attention_forward_64_hopper)

HOPPER_KERNEL(384) attention_forward_128_hopper(bf16* o, float* lse, TENSOR_MAP q, TENSOR_MAP k, TENSOR_MAP v,
                                                const int* cu, int heads, int kv_heads, float scale) {
    forward<128>(o, lse, &q, &k, &v, cu, heads, kv_heads, scale);
}
EXPORT_KERNEL(attention_forward_128_hopper)

// What a step of the backward kernels visits: two tiles of VISIT rows, one behind the other in a stage. Those of the
// rows count.. that are the next sequence's are cleared.
template <int D, int VISIT> DEV void clear_pair(sptr pair, int count) {
    if (count >= VISIT) return;
    clear_rows<D, VISIT>(pair, count);
    clear_rows<D, VISIT>(pair + TILE<D, VISIT>, count);
    cleared();
}

// dk and dv of OWN keys. Products are turned, [key, query], so that p and ds become left operands in registers.
template <int D, int VISIT>
DEV void key_gradients(bf16* dk, bf16* dv, const TensorMap* d_o, const TensorMap* q, const TensorMap* k,
                       const TensorMap* v, const float* lse, const float* delta, const int* cu, int heads,
                       int kv_heads, float scale) {
    constexpr u32 OWN_BYTES = TILE<D, OWN>, VISIT_BYTES = TILE<D, VISIT>;
    const int kv_head = blockIdx.x % kv_heads, group = heads / kv_heads;
    const Span span(cu, blockIdx.x / kv_heads);
    const int first = blockIdx.y * OWN;
    if (first >= span.length) return;

    const sptr keys = smem_base(), values = keys + OWN_BYTES, pairs_at = values + OWN_BYTES;
    constexpr u32 CARRIED = 2 * OWN_BYTES + STAGES * 2 * VISIT_BYTES;  // lse and delta of a stage: [2][VISIT]
    const sptr barriers = smem_base() + CARRIED + STAGES * 2 * VISIT * 4;
    const Ring pairs = {pairs_at, 2 * VISIT_BYTES, barriers};
    const sptr own_full = barriers + RING_BARRIERS;
    if (threadIdx.x == 0) {
        mbarrier_init(own_full, 1);
        pairs.init(32, CONSUMERS / 32);
        mbarrier_init_fence();
    }
    __syncthreads();

    const int tiles = (span.length - first + VISIT - 1) / VISIT, steps = tiles * group;
    if (threadIdx.x >= CONSUMERS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x >= CONSUMERS + 32) return;
        const int lane = lane_index();
        if (lane == 0) {
            mbarrier_expect(own_full, 2 * OWN_BYTES);
            load_tile<D, OWN>(keys, k, own_full, kv_head, span.begin + first);
            load_tile<D, OWN>(values, v, own_full, kv_head, span.begin + first);
        }
        for (int step = 0; step < steps; step++) {
            const int head = kv_head * group + step / tiles, query0 = first + step % tiles * VISIT;
            // lse in powers of 2, and delta: read before the stage is free, written once it is. A query past the end
            // has lse = inf: its probabilities are 0.
            float fetched[VISIT / 16];
#pragma unroll
            for (int i = 0; i < VISIT / 16; i++) {
                const int row = query0 + i / 2 * 32 + lane;
                const size_t at = (size_t)(span.begin + row) * heads + head;
                const bool exists = row < span.length;
                if (i % 2 == 0) fetched[i] = exists ? lse[at] * LOG2_E : INFINITY;
                else fetched[i] = exists ? delta[at] : 0.0f;
            }
            pairs.wait_empty(step);
            float* carried = smem_ptr<float>(CARRIED) + step % STAGES * 2 * VISIT;
#pragma unroll
            for (int i = 0; i < VISIT / 16; i++) carried[i % 2 * VISIT + i / 2 * 32 + lane] = fetched[i];
            const sptr full = pairs.full(step), pair = pairs.tile(step);
            if (lane == 0) {
                mbarrier_expect(full, 2 * VISIT_BYTES);
                load_tile<D, VISIT>(pair, q, full, head, span.begin + query0);
                load_tile<D, VISIT>(pair + VISIT_BYTES, d_o, full, head, span.begin + query0);
            } else {
                mbarrier_arrive(full);
            }
        }
        return;
    }
    registers_take<CONSUMER_REGISTERS>();

    const u32 half = threadIdx.x / 128 * 64 * 128;  // 64 rows down in each panel
    const int top_key = first + threadIdx.x / 128 * 64, row = first + warp_index() * 16 + lane_index() / 4;
    const float scale2 = scale * LOG2_E;
    float p[VISIT / 2], ds[VISIT / 2], sum_dk[D / 2] = {}, sum_dv[D / 2] = {};
    u32 left_p[VISIT / 16][4], left_ds[VISIT / 16][4];

    mbarrier_wait(own_full, 0);
    for (int step = 0; step < steps; step++) {
        const int query0 = first + step % tiles * VISIT;
        const sptr queries = pairs.tile(step), d_outs = queries + VISIT_BYTES;
        pairs.wait_full(step);
        clear_pair<D, VISIT>(queries, span.length - query0);
        // Four groups of products, a wait before each use of a result.
        start_turned<D, OWN, VISIT>(p, keys + half, queries);
        start_turned<D, OWN, VISIT>(ds, values + half, d_outs);
        wgmma_wait<1>();
        wgmma_operand(p);
        const float* carried = smem_ptr<float>(CARRIED) + step % STAGES * 2 * VISIT;
        const bool all_seen = query0 >= top_key + 64;
#pragma unroll
        for (int i = 0; i < VISIT / 2; i++) {
            const int column = column_of(i);
            const bool seen = all_seen || sees(query0 + column, row + 8 * lower(i));
            p[i] = seen ? exp2_approx(p[i] * scale2 - carried[column]) : 0.0f;
        }
        round_to_operand<VISIT>(left_p, p);
        start_product<D, VISIT>(sum_dv, left_p, d_outs);
        wgmma_wait<1>();
        wgmma_operand(ds);
#pragma unroll
        for (int i = 0; i < VISIT / 2; i++) ds[i] = p[i] * (ds[i] - carried[VISIT + column_of(i)]);
        round_to_operand<VISIT>(left_ds, ds);
        start_product<D, VISIT>(sum_dk, left_ds, queries);
#ifdef FAULT_RELEASE
        pairs.release_by_warps(step);
#endif
        wgmma_wait<0>();
        // Only now may the operands in registers be rewritten, and the stage be filled again.
        wgmma_operand(sum_dv);
        wgmma_operand(sum_dk);
        hold<VISIT>(left_p);
        hold<VISIT>(left_ds);
#ifndef FAULT_RELEASE
        pairs.release_by_warps(step);
#endif
    }
    store_rows<D>(dk, span, row, kv_head, kv_heads, sum_dk, scale, scale);
    store_rows<D>(dv, span, row, kv_head, kv_heads, sum_dv, 1.0f, 1.0f);
}

// dq of OWN queries.
template <int D, int VISIT>
DEV void query_gradients(bf16* dq, const TensorMap* d_o, const TensorMap* q, const TensorMap* k, const TensorMap* v,
                         const float* lse, const float* delta, const int* cu, int heads, int kv_heads, float scale) {
    constexpr u32 OWN_BYTES = TILE<D, OWN>, VISIT_BYTES = TILE<D, VISIT>;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const Span span(cu, blockIdx.x / heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN;
    if (first >= span.length) return;

    const sptr queries = smem_base(), d_outs = queries + OWN_BYTES, pairs_at = d_outs + OWN_BYTES;
    const sptr barriers = pairs_at + STAGES * 2 * VISIT_BYTES;
    const Ring pairs = {pairs_at, 2 * VISIT_BYTES, barriers};
    const sptr own_full = barriers + RING_BARRIERS;
    if (threadIdx.x == 0) {
        mbarrier_init(own_full, 1);
        pairs.init(1, 2);
        mbarrier_init_fence();
    }
    __syncthreads();

    const int steps = (min(first + OWN, span.length) + VISIT - 1) / VISIT;
    if (threadIdx.x >= CONSUMERS) {
        registers_give<PRODUCER_REGISTERS>();
        if (threadIdx.x != CONSUMERS) return;
        mbarrier_expect(own_full, 2 * OWN_BYTES);
        load_tile<D, OWN>(queries, q, own_full, head, span.begin + first);
        load_tile<D, OWN>(d_outs, d_o, own_full, head, span.begin + first);
        for (int step = 0; step < steps; step++) {
            const sptr full = pairs.full(step), pair = pairs.tile(step);
            pairs.wait_empty(step);
            mbarrier_expect(full, 2 * VISIT_BYTES);
            load_tile<D, VISIT>(pair, k, full, kv_head, span.begin + step * VISIT);
            load_tile<D, VISIT>(pair + VISIT_BYTES, v, full, kv_head, span.begin + step * VISIT);
        }
        return;
    }
    registers_take<CONSUMER_REGISTERS>();

    const u32 half = threadIdx.x / 128 * 64 * 128;  // 64 rows down in each panel
    const int top_query = first + threadIdx.x / 128 * 64, row = first + warp_index() * 16 + lane_index() / 4;
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool exists = row + 8 * r < span.length;
        const size_t at = (size_t)(span.begin + row + 8 * r) * heads + head;
        row_lse[r] = exists ? lse[at] * LOG2_E : INFINITY;
        row_delta[r] = exists ? delta[at] : 0.0f;
    }
    const float scale2 = scale * LOG2_E;
    float p[VISIT / 2], ds[VISIT / 2], sum_dq[D / 2] = {};
    u32 left_ds[VISIT / 16][4];

    mbarrier_wait(own_full, 0);
    pairs.wait_full(0);
    for (int step = 0; step < steps; step++) {
        const sptr keys = pairs.tile(step), values = keys + VISIT_BYTES;
        clear_pair<D, VISIT>(keys, span.length - step * VISIT);
        start_turned<D, OWN, VISIT>(p, queries + half, keys);
        start_turned<D, OWN, VISIT>(ds, d_outs + half, values);
        wgmma_wait<1>();
        wgmma_operand(p);
        const bool all_seen = step * VISIT + VISIT <= top_query;
#pragma unroll
        for (int i = 0; i < VISIT / 2; i++) {
            const bool seen = all_seen || sees(row + 8 * lower(i), step * VISIT + column_of(i));
            p[i] = seen ? exp2_approx(p[i] * scale2 - row_lse[lower(i)]) : 0.0f;
        }
        // As in `forward`: the exponentials stay before a wait that is a loop, beside the second group.
        wgmma_operand(p);
        if (step + 1 < steps) pairs.wait_full(step + 1);
        wgmma_wait<0>();
        wgmma_operand(ds);
#pragma unroll
        for (int i = 0; i < VISIT / 2; i++) ds[i] = p[i] * (ds[i] - row_delta[lower(i)]);
        round_to_operand<VISIT>(left_ds, ds);
        start_product<D, VISIT>(sum_dq, left_ds, keys);
#ifdef FAULT_RELEASE
        pairs.release(step);
#endif
        wgmma_wait<0>();
        wgmma_operand(sum_dq);
        hold<VISIT>(left_ds);
#ifndef FAULT_RELEASE
        pairs.release(step);
#endif
    }
    store_rows<D>(dq, span, row, head, heads, sum_dq, scale, scale);
}

// Rows a step visits: as many as the registers of two sums, p and ds leave room for.
constexpr int QUERIES_VISITED = 64, KEYS_VISITED = 128;

HOPPER_KERNEL(384) attention_key_gradients_64_hopper(bf16* dk, bf16* dv, TENSOR_MAP d_o, TENSOR_MAP q,
                                                     TENSOR_MAP k, TENSOR_MAP v, const float* lse,
                                                     const float* delta, const int* cu, int heads, int kv_heads,
                                                     float scale) {
    key_gradients<64, QUERIES_VISITED>(dk, dv, &d_o, &q, &k, &v, lse, delta, cu, heads, kv_heads, scale);
}
EXPORT_KERNEL(attention_key_gradients_64_hopper)

HOPPER_KERNEL(384) attention_key_gradients_128_hopper(bf16* dk, bf16* dv, TENSOR_MAP d_o, TENSOR_MAP q,
                                                      TENSOR_MAP k, TENSOR_MAP v, const float* lse,
                                                      const float* delta, const int* cu, int heads, int kv_heads,
                                                      float scale) {
    key_gradients<128, QUERIES_VISITED>(dk, dv, &d_o, &q, &k, &v, lse, delta, cu, heads, kv_heads, scale);
}
EXPORT_KERNEL(attention_key_gradients_128_hopper)

HOPPER_KERNEL(384) attention_query_gradients_64_hopper(bf16* dq, TENSOR_MAP d_o, TENSOR_MAP q, TENSOR_MAP k,
                                                       TENSOR_MAP v, const float* lse, const float* delta,
                                                       const int* cu, int heads, int kv_heads, float scale) {
    query_gradients<64, KEYS_VISITED>(dq, &d_o, &q, &k, &v, lse, delta, cu, heads, kv_heads, scale);
}
EXPORT_KERNEL(attention_query_gradients_64_hopper)

HOPPER_KERNEL(384) attention_query_gradients_128_hopper(bf16* dq, TENSOR_MAP d_o, TENSOR_MAP q, TENSOR_MAP k,
                                                        TENSOR_MAP v, const float* lse, const float* delta,
                                                        const int* cu, int heads, int kv_heads, float scale) {
    query_gradients<128, KEYS_VISITED>(dq, &d_o, &q, &k, &v, lse, delta, cu, heads, kv_heads, scale);
}
EXPORT_KERNEL(attention_query_gradients_128_hopper)
