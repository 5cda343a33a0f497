// Causal attention over packed sequences, forward and backward.
//
//   p[t,s] = softmax over s <= t of q[t] . k[s] / sqrt(D)      o[t] = sum_s p[t,s] v[s]
//   lse[t] = ln sum_s e^(q[t] . k[s] / sqrt(D))
//   dp[t,s] = do[t] . v[s]     delta[t] = do[t] . o[t]         ds = p * (dp - delta)
//   dq[t] = sum_s ds[t,s] k[s] / sqrt(D)     dk[s] = sum_t ds[t,s] q[t] / sqrt(D)     dv[s] = sum_t p[t,s] do[t]
//
// Shapes    q, o, do, dq [T,H,D] and k, v, dk, dv [T,KV,D] bf16, D = 64 or 128 or even and below 64.
//           lse, delta [T,H] f32. Query head h reads key/value head h / (H / KV). Sequence i is the tokens
//           cu[i]..cu[i+1], cu [S+1] i32, and may be empty.
// Writes    everything is overwritten (=), never accumulated (+=). There are no atomics.
// Numerics  Scores, softmax and sums in f32; p and ds are rounded to bf16 as operands of the second product; one
//           rounding at each store. The sum under the softmax is of p before it is rounded. The backward pass makes
//           p again from lse. Scores of any finite size are safe: every exponent is <= 0 up to rounding.
// Rows      Tiles start at the sequence's first token, so a result has the same bits whatever else is in the batch.
// Heads     `_small` kernels are those of 64 with columns of zeros: `Head` in attention.cuh.
// Grid      128 threads. forward and query_gradients: (H * S, ceil(longest / 64)), a block owns 64 queries of one
//           head; the last tiles, which see most keys, come first. key_gradients: (KV * S, ceil(longest / 64)), a
//           block owns 64 keys and visits the query heads of its group in order. delta: ceil(T * H / (1024 / D)),
//           with D = 64 for smaller heads.
// Shared    see the three `*_bytes` of the launcher: tiles that stay, two pairs of tiles that take turns.
// Faults    FAULT_NO_END_BARRIER, FAULT_LAX_WAIT, FAULT_NO_WAIT_BARRIER, FAULT_MASK_OFF_BY_ONE, FAULT_NO_RESCALE
// Partners  src/tensor/ops/attention.rs (reference), src/cuda/ops/attention.rs (launcher), tests/kernels/attention.rs
//
// Dao, "FlashAttention-2" (2023), for the order of the loops.
#include "attention.cuh"
#include "eight.cuh"

constexpr int THREADS = 128;
// Rows a block owns, 16 for each warp.
constexpr int OWN = 64;
// Rows of the other side that the backward kernels visit at once: few, so that two sums, p and dp fit the registers.
constexpr int VISIT = 32;

// Stores this lane's part of x [16, D] * factor as rows row0.. of `to`, those that exist. The factor is one for
// row g, one for row g + 8.
template <class H>
DEV void store_rows(bf16* to, const Span& span, int row0, int head, int heads, const float (&x)[H::D / 8][4],
                    float factor0, float factor1, int lane, H of) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + (lane >> 2) + 8 * r;
        const float factor = r == 0 ? factor0 : factor1;
        if (row >= span.length) continue;
        bf16* at = to + span.at(row, head, heads, of.size()) + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < H::D / 8; n++)
            if (H::WHOLE || 8 * n + (lane & 3) * 2 < of.size())
                *reinterpret_cast<u32*>(at + 8 * n) = pack_bf16(x[n][2 * r] * factor, x[n][2 * r + 1] * factor);
    }
}

// Whether the query at `query` sees the key at `key`.
DEV bool sees(int query, int key) { return key <= query + (FAULT == MASK_OFF_BY_ONE); }

template <class H>
DEV void forward(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* cu, int heads,
                 int kv_heads, float scale, H of) {
    constexpr int D = H::D, KEYS = 64;
    constexpr u32 TILE = KEYS * D * 2;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const Span span(cu, blockIdx.x / heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN;
    if (first >= span.length) return;

    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const size_t stride = (size_t)kv_heads * of.size();
    const sptr queries = smem_base(), pairs = queries + OWN * D * 2;
    const int tiles = (min(first + OWN, span.length) + KEYS - 1) / KEYS;
    auto start_pair = [&](int tile) {
        const size_t at = span.at(tile * KEYS, kv_head, kv_heads, of.size());
        const sptr pair = pairs + (tile & 1) * 2 * TILE;
        start_rows<H, KEYS, THREADS>(pair, k + at, stride, span.length - tile * KEYS, thread, of);
        start_rows<H, KEYS, THREADS>(pair + TILE, v + at, stride, span.length - tile * KEYS, thread, of);
    };

    start_rows<H, OWN, THREADS>(queries, q + span.at(first, head, heads, of.size()), (size_t)heads * of.size(),
                                span.length - first, thread, of);
    start_pair(0);
    cp_async_commit();

    Rows<D> rows;
    u32 own[D / 16][4];  // this warp's queries as left operands
    const float scale2 = scale * LOG2_E;
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) start_pair(tile + 1);
        cp_async_commit();  // an empty group at the end, so that the wait below always counts alike
        cp_async_wait<IN_FLIGHT>();
        if (FAULT != NO_WAIT_BARRIER) __syncthreads();  // a wait is for one's own copies: now everyone's are there
        if (tile == 0) {
#pragma unroll
            for (int i = 0; i < D / 16; i++) left_operand<D>(own[i], queries, 16 * warp, i, lane);
        }

        const sptr keys = pairs + (tile & 1) * 2 * TILE;
        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) add_turned<D, KEYS>(scores, own[i], keys, i, lane);
        // Keys past the sequence's end come after all its queries, so this mask hides them too.
        if (tile * KEYS + KEYS > first) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int query = first + 16 * warp + (lane >> 2) + (i >> 1) * 8;
                    const int key = tile * KEYS + 8 * n + (lane & 3) * 2 + (i & 1);
                    if (!sees(query, key)) scores[n][i] = -INFINITY;
                }
            }
        }
        online_softmax<D, KEYS>(rows, scores, scale2);
        add_product<D, KEYS>(rows.o, scores, keys + TILE, lane);
        if (FAULT != NO_END_BARRIER) __syncthreads();  // the next turn but one overwrites this pair
    }

    const float sum[2] = {row_sum(rows.sum[0]), row_sum(rows.sum[1])};
    store_rows<H>(o, span, first + 16 * warp, head, heads, rows.o, 1.0f / sum[0], 1.0f / sum[1], lane, of);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + 16 * warp + (lane >> 2) + 8 * r;
        if ((lane & 3) == 0 && row < span.length)
            lse[(size_t)(span.begin + row) * heads + head] = rows.top[r] * scale + logf(sum[r]);
    }
}

// delta[row] = do[row] . o[row], where a row is a token's head. D / 8 lanes take a row, eight elements each.
template <class H> DEV void row_products(float* delta, const bf16* d_o, const bf16* o, int rows, H of) {
    constexpr int LANES = H::D / 8;
    const int row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, piece = threadIdx.x % LANES;
    float sum = 0.0f;
    if (row < rows && (H::WHOLE || piece * 8 < of.size())) {
        const size_t at = (size_t)row * of.size() + piece * 8;
        float a[8], b[8];
        if constexpr (H::WHOLE) {
            ld_vec8(a, d_o + at);
            ld_vec8(b, o + at);
        } else {
            const int count = up_to_eight(of.size() - piece * 8);
            load8(a, d_o + at, count);
            load8(b, o + at, count);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, other);
    if (row < rows && piece == 0) delta[row] = sum;
}

// dk and dv of OWN keys. Products are turned, [key, query], so that p and ds become left operands in registers.
template <class H>
DEV void key_gradients(bf16* dk, bf16* dv, const bf16* d_o, const bf16* q, const bf16* k, const bf16* v,
                       const float* lse, const float* delta, const int* cu, int heads, int kv_heads, float scale,
                       H of) {
    constexpr int D = H::D;
    constexpr u32 TILE = VISIT * D * 2;
    static_assert(2 * VISIT <= THREADS, "a thread carries one of lse and delta for a tile");
    const int kv_head = blockIdx.x % kv_heads, group = heads / kv_heads;
    const Span span(cu, blockIdx.x / kv_heads);
    const int first = blockIdx.y * OWN;
    if (first >= span.length) return;

    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const sptr keys = smem_base(), values = keys + OWN * D * 2, pairs = values + OWN * D * 2;
    float* carried = smem_ptr<float>(4 * OWN * D + 4 * TILE);  // [turn][lse, delta][VISIT]
    const int tiles = (span.length - first + VISIT - 1) / VISIT, steps = tiles * group;
    auto head_of = [&](int step) { return kv_head * group + step / tiles; };
    auto query_of = [&](int step) { return first + step % tiles * VISIT; };
    auto start_pair = [&](int step) {
        const size_t at = span.at(query_of(step), head_of(step), heads, of.size()), stride = (size_t)heads * of.size();
        const sptr pair = pairs + (step & 1) * 2 * TILE;
        start_rows<H, VISIT, THREADS>(pair, q + at, stride, span.length - query_of(step), thread, of);
        start_rows<H, VISIT, THREADS>(pair + TILE, d_o + at, stride, span.length - query_of(step), thread, of);
    };
    // What this thread carries to shared memory for a step: an lse, in powers of 2, or a delta. A query past the
    // end has lse = inf: its probabilities are 0.
    auto fetch = [&](int step) {
        const int row = query_of(step) + thread % VISIT;
        const bool is_lse = thread < VISIT, exists = row < span.length && thread < 2 * VISIT;
        const size_t at = (size_t)(span.begin + row) * heads + head_of(step);
        if (!exists) return is_lse ? INFINITY : 0.0f;
        return is_lse ? lse[at] * LOG2_E : delta[at];
    };
    auto put = [&](int step, float x) {
        if (thread < 2 * VISIT) carried[(step & 1) * 2 * VISIT + thread] = x;
    };

    const size_t own = span.at(first, kv_head, kv_heads, of.size()), own_stride = (size_t)kv_heads * of.size();
    start_rows<H, OWN, THREADS>(keys, k + own, own_stride, span.length - first, thread, of);
    start_rows<H, OWN, THREADS>(values, v + own, own_stride, span.length - first, thread, of);
    start_pair(0);
    cp_async_commit();
    put(0, fetch(0));

    float sum_dk[D / 8][4] = {}, sum_dv[D / 8][4] = {};
    const float scale2 = scale * LOG2_E;
    for (int step = 0; step < steps; step++) {
        float next = 0.0f;  // fetched now, needed at the end: the products hide the way
        if (step + 1 < steps) {
            start_pair(step + 1);
            next = fetch(step + 1);
        }
        cp_async_commit();
        cp_async_wait<IN_FLIGHT>();
        if (FAULT != NO_WAIT_BARRIER) __syncthreads();

        const sptr queries = pairs + (step & 1) * 2 * TILE, d_outs = queries + TILE;
        float p[VISIT / 8][4] = {}, ds[VISIT / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            u32 a[4];
            left_operand<D>(a, keys, 16 * warp, i, lane);
            add_turned<D, VISIT>(p, a, queries, i, lane);
            left_operand<D>(a, values, 16 * warp, i, lane);
            add_turned<D, VISIT>(ds, a, d_outs, i, lane);
        }
        const float* lses = carried + (step & 1) * 2 * VISIT;
        const int query0 = query_of(step);
        const bool all_seen = query0 >= first + OWN;
#pragma unroll
        for (int n = 0; n < VISIT / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = 8 * n + (lane & 3) * 2 + (i & 1);
                const int key = first + 16 * warp + (lane >> 2) + (i >> 1) * 8;
                const bool seen = all_seen || sees(query0 + column, key);
                p[n][i] = seen ? exp2_approx(p[n][i] * scale2 - lses[column]) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - lses[VISIT + column]);
            }
        }
        add_product<D, VISIT>(sum_dv, p, d_outs, lane);
        add_product<D, VISIT>(sum_dk, ds, queries, lane);
        put(step + 1, next);
        if (FAULT != NO_END_BARRIER) __syncthreads();
    }
    store_rows<H>(dk, span, first + 16 * warp, kv_head, kv_heads, sum_dk, scale, scale, lane, of);
    store_rows<H>(dv, span, first + 16 * warp, kv_head, kv_heads, sum_dv, 1.0f, 1.0f, lane, of);
}

// dq of OWN queries.
template <class H>
DEV void query_gradients(bf16* dq, const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                         const float* delta, const int* cu, int heads, int kv_heads, float scale, H of) {
    constexpr int D = H::D;
    constexpr u32 TILE = VISIT * D * 2;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const Span span(cu, blockIdx.x / heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN;
    if (first >= span.length) return;

    const int thread = threadIdx.x, lane = lane_index(), warp = warp_index();
    const sptr queries = smem_base(), d_outs = queries + OWN * D * 2, pairs = d_outs + OWN * D * 2;
    const int tiles = (min(first + OWN, span.length) + VISIT - 1) / VISIT;
    auto start_pair = [&](int tile) {
        const size_t at = span.at(tile * VISIT, kv_head, kv_heads, of.size());
        const size_t stride = (size_t)kv_heads * of.size();
        const sptr pair = pairs + (tile & 1) * 2 * TILE;
        start_rows<H, VISIT, THREADS>(pair, k + at, stride, span.length - tile * VISIT, thread, of);
        start_rows<H, VISIT, THREADS>(pair + TILE, v + at, stride, span.length - tile * VISIT, thread, of);
    };

    const size_t own = span.at(first, head, heads, of.size()), own_stride = (size_t)heads * of.size();
    start_rows<H, OWN, THREADS>(queries, q + own, own_stride, span.length - first, thread, of);
    start_rows<H, OWN, THREADS>(d_outs, d_o + own, own_stride, span.length - first, thread, of);
    start_pair(0);
    cp_async_commit();

    float row_lse[2], row_delta[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + 16 * warp + (lane >> 2) + 8 * r;
        const bool exists = row < span.length;
        const size_t at = (size_t)(span.begin + row) * heads + head;
        row_lse[r] = exists ? lse[at] * LOG2_E : INFINITY;
        row_delta[r] = exists ? delta[at] : 0.0f;
    }

    float sum_dq[D / 8][4] = {};
    const float scale2 = scale * LOG2_E;
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) start_pair(tile + 1);
        cp_async_commit();
        cp_async_wait<IN_FLIGHT>();
        if (FAULT != NO_WAIT_BARRIER) __syncthreads();

        const sptr keys = pairs + (tile & 1) * 2 * TILE, values = keys + TILE;
        float p[VISIT / 8][4] = {}, ds[VISIT / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            u32 a[4];
            left_operand<D>(a, queries, 16 * warp, i, lane);
            add_turned<D, VISIT>(p, a, keys, i, lane);
            left_operand<D>(a, d_outs, 16 * warp, i, lane);
            add_turned<D, VISIT>(ds, a, values, i, lane);
        }
        const bool all_seen = tile * VISIT + VISIT <= first;
#pragma unroll
        for (int n = 0; n < VISIT / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = first + 16 * warp + (lane >> 2) + (i >> 1) * 8;
                const bool seen = all_seen || sees(query, tile * VISIT + 8 * n + (lane & 3) * 2 + (i & 1));
                const float probability = seen ? exp2_approx(p[n][i] * scale2 - row_lse[i >> 1]) : 0.0f;
                ds[n][i] = probability * (ds[n][i] - row_delta[i >> 1]);
            }
        }
        add_product<D, VISIT>(sum_dq, ds, keys, lane);
        if (FAULT != NO_END_BARRIER) __syncthreads();
    }
    store_rows<H>(dq, span, first + 16 * warp, head, heads, sum_dq, scale, scale, lane, of);
}

KERNEL(128) attention_forward_64(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* cu,
                                 int heads, int kv_heads, float scale) {
    forward(o, lse, q, k, v, cu, heads, kv_heads, scale, WholeHead<64>{});
}
EXPORT_KERNEL(attention_forward_64)

KERNEL(128) attention_forward_128(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* cu,
                                  int heads, int kv_heads, float scale) {
    forward(o, lse, q, k, v, cu, heads, kv_heads, scale, WholeHead<128>{});
}
EXPORT_KERNEL(attention_forward_128)

KERNEL(128) attention_delta_64(float* delta, const bf16* d_o, const bf16* o, int rows) {
    row_products(delta, d_o, o, rows, WholeHead<64>{});
}
EXPORT_KERNEL(attention_delta_64)

KERNEL(128) attention_delta_128(float* delta, const bf16* d_o, const bf16* o, int rows) {
    row_products(delta, d_o, o, rows, WholeHead<128>{});
}
EXPORT_KERNEL(attention_delta_128)

KERNEL(128) attention_key_gradients_64(bf16* dk, bf16* dv, const bf16* d_o, const bf16* q, const bf16* k,
                                       const bf16* v, const float* lse, const float* delta, const int* cu, int heads,
                                       int kv_heads, float scale) {
    key_gradients(dk, dv, d_o, q, k, v, lse, delta, cu, heads, kv_heads, scale, WholeHead<64>{});
}
EXPORT_KERNEL(attention_key_gradients_64)

KERNEL(128) attention_key_gradients_128(bf16* dk, bf16* dv, const bf16* d_o, const bf16* q, const bf16* k,
                                        const bf16* v, const float* lse, const float* delta, const int* cu, int heads,
                                        int kv_heads, float scale) {
    key_gradients(dk, dv, d_o, q, k, v, lse, delta, cu, heads, kv_heads, scale, WholeHead<128>{});
}
EXPORT_KERNEL(attention_key_gradients_128)

KERNEL(128) attention_query_gradients_64(bf16* dq, const bf16* d_o, const bf16* q, const bf16* k, const bf16* v,
                                         const float* lse, const float* delta, const int* cu, int heads, int kv_heads,
                                         float scale) {
    query_gradients(dq, d_o, q, k, v, lse, delta, cu, heads, kv_heads, scale, WholeHead<64>{});
}
EXPORT_KERNEL(attention_query_gradients_64)

KERNEL(128) attention_query_gradients_128(bf16* dq, const bf16* d_o, const bf16* q, const bf16* k, const bf16* v,
                                          const float* lse, const float* delta, const int* cu, int heads, int kv_heads,
                                          float scale) {
    query_gradients(dq, d_o, q, k, v, lse, delta, cu, heads, kv_heads, scale, WholeHead<128>{});
}
EXPORT_KERNEL(attention_query_gradients_128)

KERNEL(128) attention_forward_small(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const int* cu,
                                    int heads, int kv_heads, float scale, int head_dim) {
    forward(o, lse, q, k, v, cu, heads, kv_heads, scale, SmallHead{head_dim});
}
EXPORT_KERNEL(attention_forward_small)

KERNEL(128) attention_delta_small(float* delta, const bf16* d_o, const bf16* o, int rows, int head_dim) {
    row_products(delta, d_o, o, rows, SmallHead{head_dim});
}
EXPORT_KERNEL(attention_delta_small)

KERNEL(128) attention_key_gradients_small(bf16* dk, bf16* dv, const bf16* d_o, const bf16* q, const bf16* k,
                                          const bf16* v, const float* lse, const float* delta, const int* cu,
                                          int heads, int kv_heads, float scale, int head_dim) {
    key_gradients(dk, dv, d_o, q, k, v, lse, delta, cu, heads, kv_heads, scale, SmallHead{head_dim});
}
EXPORT_KERNEL(attention_key_gradients_small)

KERNEL(128) attention_query_gradients_small(bf16* dq, const bf16* d_o, const bf16* q, const bf16* k, const bf16* v,
                                            const float* lse, const float* delta, const int* cu, int heads,
                                            int kv_heads, float scale, int head_dim) {
    query_gradients(dq, d_o, q, k, v, lse, delta, cu, heads, kv_heads, scale, SmallHead{head_dim});
}
EXPORT_KERNEL(attention_query_gradients_small)
