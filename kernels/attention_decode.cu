// Attention of one new token per sequence over a paged cache of keys and values, and the growth of that cache.
//
//   o[b] = sum over s < len[b] of p[b,s] v[b,s]      p[b,s] = softmax over s of q[b] . k[b,s] / sqrt(D)
//
// Shapes    q, o [B,H,D], caches [pages,16,KV,D], k, v [B,KV,D] bf16, D = 64 or 128 or even and below 64:
//           `Head` in attention.cuh. Key s of sequence b is row s % 16 of page table[b, s / 16]; table [B, max_pages]
//           u32, lengths and positions [B] i32. Query head h reads key/value head h / (H / KV).
//           part_o [B,H,spans,D], part_sums [B,H,spans,2] f32.
// Writes    o =, the parts =; append writes the one row positions[b] of each sequence (=) and nothing else. A
//           sequence of length 0 gets zeros.
// Numerics  Scores, softmax and sums in f32, p rounded to bf16 as operand of the second product, one rounding at the
//           store of o.
// Rows      The keys of a sequence are cut every 256, whatever the batch, and parts are added in order: a result
//           depends on its own sequence only.
// Grid      parts: (B * KV, spans, ceil(H / KV / 16)), 128 threads; a block owns 256 keys of a sequence for the heads
//           of one group, a warp every fourth page of them. merge: ceil(B * H / 4), 128 threads, a warp owns a head.
//           append: B blocks of 128 threads.
// Shared    parts: each warp has two pairs of pages that take turns, in the end its sums; 512 bytes for what the
//           warps tell each other.
// Faults    FAULT_NO_END_BARRIER, FAULT_LAX_WAIT, FAULT_NO_WAIT_BARRIER, FAULT_NO_MERGE_BARRIER, FAULT_MASK_OFF_BY_ONE
// Partners  src/tensor/ops/attention.rs (reference), src/cuda/ops/attention_decode.rs (launcher),
//           tests/kernels/attention_decode.rs
//
// Kwon et al., "PagedAttention" (2023), for the pages; Dao et al., "Flash-Decoding" (2023), for the parts.
#include "attention.cuh"
#include "eight.cuh"

constexpr int WARPS = 4;
constexpr int PAGE = 16;   // tokens of a page: one step of the product over keys
constexpr int SPAN = 256;  // keys of a block; part of the results
constexpr int HEADS = 16;  // query heads of a block: the rows of a product, of which a group may fill fewer

template <class H>
DEV void parts(float* part_o, float* part_sums, const bf16* q, const bf16* k_cache, const bf16* v_cache,
               const u32* table, const int* lengths, int max_pages, int heads, int kv_heads, float scale, H of) {
    constexpr int D = H::D;
    constexpr u32 TILE = PAGE * D * 2, WARP_BYTES = 4 * TILE;
    constexpr int SUM_STRIDE = D + 8;  // in floats: the eight rows a warp stores at once start in different banks
    static_assert(HEADS * SUM_STRIDE * 4 <= WARP_BYTES, "a warp's sums fit where its pages were");
    const int sequence = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads, group = heads / kv_heads;
    const int length = lengths[sequence], span0 = blockIdx.y * SPAN;
    if (span0 >= length) return;
    const int head0 = kv_head * group + blockIdx.z * HEADS, count = min(HEADS, group - (int)blockIdx.z * HEADS);

    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3;
    const sptr pairs = smem_base() + warp * WARP_BYTES;
    const int end = (min(span0 + SPAN, length) + PAGE - 1) / PAGE;  // one past the last page of this span
    auto start_pair = [&](int page, int turn) {
        const size_t row = (size_t)table[(size_t)sequence * max_pages + page] * PAGE * kv_heads + kv_head;
        const size_t at = row * of.size(), stride = (size_t)kv_heads * of.size();
        const sptr pair = pairs + turn * 2 * TILE;
        start_rows<H, PAGE, 32>(pair, k_cache + at, stride, length - page * PAGE, lane, of);
        start_rows<H, PAGE, 32>(pair + TILE, v_cache + at, stride, length - page * PAGE, lane, of);
    };

    int page = span0 / PAGE + warp;
    if (page < end) start_pair(page, 0);
    cp_async_commit();

    // The queries are few: each lane takes its part of the left operands from global memory.
    u32 own[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = g + (j & 1) * 8, column = 16 * i + 2 * t + (j >> 1) * 8;
            const size_t at = ((size_t)sequence * heads + head0 + row) * of.size() + column;
            const bool exists = row < count && (H::WHOLE || column < of.size());
            own[i][j] = exists ? *reinterpret_cast<const u32*>(q + at) : 0;
        }
    }

    Rows<D> rows;
    const float scale2 = scale * LOG2_E;
    for (int turn = 0; page < end; page += WARPS, turn ^= 1) {
        if (page + WARPS < end) start_pair(page + WARPS, turn ^ 1);
        cp_async_commit();
        cp_async_wait<IN_FLIGHT>();
        if (FAULT != NO_WAIT_BARRIER) __syncwarp();  // the pages are this warp's alone

        const sptr keys = pairs + turn * 2 * TILE;
        float scores[PAGE / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) add_turned<D, PAGE>(scores, own[i], keys, i, lane);
#pragma unroll
        for (int n = 0; n < PAGE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = page * PAGE + 8 * n + 2 * t + (i & 1);
                if (key >= length + (FAULT == MASK_OFF_BY_ONE)) scores[n][i] = -INFINITY;
            }
        }
        online_softmax<D, PAGE>(rows, scores, scale2);
        add_product<D, PAGE>(rows.o, scores, keys + TILE, lane);
        if (FAULT != NO_END_BARRIER) __syncwarp();
    }
    cp_async_wait<0>();

    // The warps' sums, each where its pages were, and their levels and weights [warp][row][2] behind all of them.
    float* sums = smem_ptr<float>(warp * WARP_BYTES);
    float* levels = smem_ptr<float>(WARPS * WARP_BYTES);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = g + 8 * r;
        const float sum = row_sum(rows.sum[r]);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            sums[row * SUM_STRIDE + 8 * n + 2 * t] = rows.o[n][2 * r];
            sums[row * SUM_STRIDE + 8 * n + 2 * t + 1] = rows.o[n][2 * r + 1];
        }
        if (t == 0) {
            levels[(warp * HEADS + row) * 2] = rows.top[r] * scale2;
            levels[(warp * HEADS + row) * 2 + 1] = sum;
        }
    }
    if (FAULT != NO_MERGE_BARRIER) __syncthreads();
    for (int i = threadIdx.x; i < count * of.size(); i += WARPS * 32) {
        const int row = i / of.size(), column = i % of.size();
        float level = -INFINITY, sum = 0.0f, o = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) level = fmaxf(level, levels[(w * HEADS + row) * 2]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            // The first warp has a page, so `level` is finite; a warp without any has the weight 2^-inf = 0.
            const float weight = exp2_approx(levels[(w * HEADS + row) * 2] - level);
            sum += weight * levels[(w * HEADS + row) * 2 + 1];
            o += weight * smem_ptr<float>(w * WARP_BYTES)[row * SUM_STRIDE + column];
        }
        const size_t part = ((size_t)sequence * heads + head0 + row) * gridDim.y + blockIdx.y;
        part_o[part * of.size() + column] = o;
        if (column == 0) {
            part_sums[part * 2] = level;
            part_sums[part * 2 + 1] = sum;
        }
    }
}

KERNEL(128) attention_decode_parts_64(float* part_o, float* part_sums, const bf16* q, const bf16* k_cache,
                                      const bf16* v_cache, const u32* table, const int* lengths, int max_pages,
                                      int heads, int kv_heads, float scale) {
    parts(part_o, part_sums, q, k_cache, v_cache, table, lengths, max_pages, heads, kv_heads, scale,
          WholeHead<64>{});
}
EXPORT_KERNEL(attention_decode_parts_64)

KERNEL(128) attention_decode_parts_128(float* part_o, float* part_sums, const bf16* q, const bf16* k_cache,
                                       const bf16* v_cache, const u32* table, const int* lengths, int max_pages,
                                       int heads, int kv_heads, float scale) {
    parts(part_o, part_sums, q, k_cache, v_cache, table, lengths, max_pages, heads, kv_heads, scale,
          WholeHead<128>{});
}
EXPORT_KERNEL(attention_decode_parts_128)

KERNEL(128) attention_decode_parts_small(float* part_o, float* part_sums, const bf16* q, const bf16* k_cache,
                                         const bf16* v_cache, const u32* table, const int* lengths, int max_pages,
                                         int heads, int kv_heads, float scale, int head_dim) {
    parts(part_o, part_sums, q, k_cache, v_cache, table, lengths, max_pages, heads, kv_heads, scale,
          SmallHead{head_dim});
}
EXPORT_KERNEL(attention_decode_parts_small)

// Adds up the parts of each head, in order of the keys. `spans` is how many parts there is room for.
KERNEL(128) attention_decode_merge(bf16* o, const float* part_o, const float* part_sums, const int* lengths,
                                   int batch, int heads, int head_dim, int spans) {
    const int row = blockIdx.x * WARPS + warp_index(), lane = lane_index();
    if (row >= batch * heads) return;
    const int own = min(spans, (lengths[row / heads] + SPAN - 1) / SPAN);
    const float* sums = part_sums + (size_t)row * spans * 2;
    float level = -INFINITY, sum = 0.0f;
    for (int i = 0; i < own; i++) level = fmaxf(level, sums[2 * i]);
    for (int i = 0; i < own; i++) sum += exp2_approx(sums[2 * i] - level) * sums[2 * i + 1];
    const float factor = own > 0 ? 1.0f / sum : 0.0f;
    for (int column = lane; column < head_dim; column += 32) {
        float x = 0.0f;
        for (int i = 0; i < own; i++)
            x += exp2_approx(sums[2 * i] - level) * part_o[((size_t)row * spans + i) * head_dim + column];
        o[(size_t)row * head_dim + column] = f2bf(x * factor);
    }
}
EXPORT_KERNEL(attention_decode_merge)

// Row positions[b] of sequence b's cache becomes k[b], v[b]. `width` is KV * D.
KERNEL(128) attention_decode_append(bf16* k_cache, bf16* v_cache, const bf16* k, const bf16* v, const u32* table,
                                    const int* positions, int max_pages, int width) {
    const int sequence = blockIdx.x, position = positions[sequence];
    const u32 page = table[(size_t)sequence * max_pages + position / PAGE];
    const size_t to = ((size_t)page * PAGE + position % PAGE) * width, from = (size_t)sequence * width;
#pragma unroll 1
    for (int i = threadIdx.x * 8; i < width; i += WARPS * 32 * 8) {
        copy8(k_cache + to + i, k + from + i, up_to_eight(width - i));
        copy8(v_cache + to + i, v + from + i, up_to_eight(width - i));
    }
}
EXPORT_KERNEL(attention_decode_append)
