// From logits to the next token, one row of logits per prompt.
//
//   penalty       a logit l whose id was seen becomes l * penalty if negative, l / penalty if not
//   temperature   l = l / temperature
//   top-k         ids below the k-th largest l go; those equal to it stay
//   weight        w = e^(l - max l)
//   top-p         ids stay, by descending weight, then ascending id, until their weights reach top_p of all
//   draw          the first id, ascending, whose running sum of weights exceeds u times the sum of all
//
// At temperature 0 the id with the largest l, the lowest among equals.
//
// Shapes    logits [B, V] f32 or bf16; ids [B] u32; log_probs, probabilities [B] f32; scratch [B, V] f32;
//           seen [B, S] u32 of which seen_lengths [B] u32 count; rules [B], see `Rule`: each row has its own. Seen
//           ids from V on are passed over; those of a row without a penalty are not looked at.
// Writes    ids, log_probs (log softmax of the raw logits over all V, at the id) and probabilities (of the id, among
//           those that were left; 1 at temperature 0) are overwritten (=), and so is scratch, which is not used at
//           temperature 0. In a row with a penalty, where fewer than S ids count, its id is written behind them: it
//           is seen the next time. A NaN among the logits makes the log-prob NaN and the id any that may be drawn.
// Numerics  l and w in f32 with the operations of src/model/sampling.rs and of its exponential, bit by bit. Sums of
//           weights are integers in units of 2^-44 of the largest weight: the same in any order. The CPU adds in f64,
//           so that u or top_p within some 1e-8 of a boundary may give the neighbour. u is the CPU's 53-bit number.
// Grid      a block of 512 threads per row. Each warp owns a run of ids and each lane every 32nd of them, in every
//           pass: scratch is never read by another thread than wrote it. Shared memory: 384 bytes for the sums and
//           a bit per id. Any B, V.
// Moves     two passes over the logits, three over scratch, and 16 more each for top-k and top-p, from L2.
// Partners  src/model/sampling.rs, src/random.rs (reference), src/cuda/ops/sampling.rs (launcher),
//           tests/kernels/sampling.rs
#include "dev.cuh"

#if !defined(__CUDACC_RTC__)
DEV u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
#endif

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr u32 ALL = 0xffffffffu;
// Sums of one reduction.
constexpr int SUMS = 3;

// How a row is drawn. Laid out as in the launcher.
struct Rule {
    u64 seed, stream, counter;
    double top_p;       // 1: all stay
    float temperature;  // 0: the largest
    float penalty;      // 1: none
    u32 top_k;          // 0: all stay
    u32 limit;          // ids from here on are not drawn; 0: all may be
};

DEV float logit_of(const float* logits, size_t at) { return logits[at]; }
DEV float logit_of(const bf16* logits, size_t at) { return bf2f(logits[at]); }

// An integer whose order is that of the numbers; -0 and 0 are one, NaN comes first.
DEV u32 ordered(float x) {
    if (x != x) return 0;
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEV float unordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// e^x for x <= 0: the CPU's exp1 without its upper bound. NaN stays NaN.
DEV float exponential(float x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    if (x < -104.0f) x = -104.0f;
    const float rounded = fmaf(x, 1.4426950408889634f, round);
    const float n = __fsub_rn(rounded, round);
    float r = fmaf(n, -0.69314575f, x);
    r = fmaf(n, -1.4286068e-6f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    const float y = __fadd_rn(fmaf(p, __fmul_rn(r, r), r), 1.0f);
    // 2^n in two factors: n reaches -150, where one would not be a normal number.
    const int power = (int)(__float_as_uint(rounded) - __float_as_uint(round)), half = power >> 1;
    const float low = __uint_as_float((u32)(half + 127) << 23);
    const float high = __uint_as_float((u32)(power - half + 127) << 23);
    return __fmul_rn(__fmul_rn(y, low), high);
}

// A weight in [0, 1] in units of 2^-44, so that 2^19 of them fit into 64 bits; 0 for NaN.
DEV u64 units(float weight) { return weight > 0.0f ? (u64)__fmul_rn(weight, 17592186044416.0f) : 0; }

// Philox4x32-10, the low 64 bits of the block at `counter`.
DEV u64 philox(u64 seed, u64 stream, u64 counter) {
    u32 c0 = (u32)counter, c1 = (u32)(counter >> 32), c2 = (u32)stream, c3 = (u32)(stream >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 a = (u64)0xD2511F53u * c0, b = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0, c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1, c3 = (u32)a;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (u64)c1 << 32 | c0;
}

// The value of another lane.
DEV u64 from_lane(u64 value, int lane) {
    const u32 low = __shfl_sync(ALL, (u32)value, lane), high = __shfl_sync(ALL, (u32)(value >> 32), lane);
    return (u64)high << 32 | low;
}

// The sum over the lanes up to and with this one.
DEV u64 inclusive(u64 value) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const u64 lower = from_lane(value, lane - o);
        if (lane >= o) value += lower;
    }
    return value;
}

DEV u64 lesser(u64 a, u64 b) { return a < b ? a : b; }

struct Sum {
    DEV u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Largest {
    DEV u64 operator()(u64 a, u64 b) const { return a < b ? b : a; }
};

// Joins the values of the warp's lanes, each place of the array for itself.
template <class Join, int N> DEV void warp_reduce(u64 (&values)[N], Join join) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = join(values[i], from_lane(values[i], lane ^ o));
}

// The same over the block; every thread gets the result. `partials` has WARPS numbers for each place.
template <class Join, int N> DEV void block_reduce(u64 (&values)[N], u64* partials, Join join) {
    warp_reduce(values, join);
#ifndef FAULT_SAMPLING_NO_BARRIER_BEFORE
    __syncthreads();  // nobody reads the partials of the last reduction any more
#endif
    if (threadIdx.x % 32 == 0)
        for (int i = 0; i < N; i++) partials[i * WARPS + threadIdx.x / 32] = values[i];
#ifndef FAULT_SAMPLING_NO_BARRIER
    __syncthreads();
#endif
#ifdef FAULT_SAMPLING_ONE_TOO_MANY
    const int count = WARPS + 1;
#else
    const int count = WARPS;
#endif
    for (int i = 0; i < N; i++) {
        values[i] = partials[i * WARPS];
        for (int warp = 1; warp < count; warp++) values[i] = join(values[i], partials[i * WARPS + warp]);
    }
}

// The ids of this thread: first, first + 32, ... below end, in the run of its warp.
struct Own {
    int first, end;
};

DEV Own own_ids(int columns) {
    const int run = ((columns + WARPS - 1) / WARPS + 31) / 32 * 32;
    const int start = (int)(threadIdx.x / 32) * run;
    return Own{start + (int)(threadIdx.x % 32), min(start + run, columns)};
}

// The largest key such that the ids from it on reach `target`: in number, or by weight. Found two bits at a time,
// by what three trial keys would reach.
template <bool BY_WEIGHT> DEV u32 threshold(const float* values, Own own, u64 target, u64* partials) {
    u32 found = 0;
    for (int shift = 30; shift >= 0; shift -= 2) {
        u64 reached[SUMS] = {0, 0, 0};
        for (int id = own.first; id < own.end; id += 32) {
            const float value = values[id];
            const u32 key = ordered(value);
            const u64 amount = BY_WEIGHT ? units(value) : 1;
#pragma unroll
            for (int i = 0; i < SUMS; i++)
                if (key >= found + ((u32)(i + 1) << shift)) reached[i] += amount;
        }
        block_reduce(reached, partials, Sum());
        for (int i = 0; i < SUMS; i++)
            if (reached[SUMS - 1 - i] >= target) {
                found += (u32)(SUMS - i) << shift;
                break;
            }
    }
    return found;
}

// One bit per id that was seen.
DEV void mark_seen(u32* marks, const u32* seen, int count, int columns) {
    for (int i = threadIdx.x; i < (columns + 31) / 32; i += THREADS) marks[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (seen[i] < (u32)columns) atomicOr(marks + seen[i] / 32, 1u << seen[i] % 32);
#ifndef FAULT_SAMPLING_NO_BARRIER_AFTER_MARKS
    __syncthreads();
#endif
}

// What the kernels below do, for either type of logits.
template <class Logit>
DEV void sample(u32* ids, float* log_probs, float* probabilities, float* scratch, const Logit* logits, u32* seen,
                const u32* seen_lengths, const Rule* rules, int columns, int seen_columns) {
    u64* partials = smem_ptr<u64>(0);
    u32* marks = smem_ptr<u32>(SUMS * WARPS * 8);
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Rule rule = rules[row];
    const int limit = rule.limit > 0 && rule.limit < (u32)columns ? (int)rule.limit : columns;
    const Own own = own_ids(columns), drawable = Own{own.first, min(own.end, limit)};
    const bool penalised = rule.penalty != 1.0f;
    logits += (size_t)row * columns;
    if (penalised) {
        const int count = min((int)seen_lengths[row], seen_columns);
        mark_seen(marks, seen + (size_t)row * seen_columns, count, columns);
    }
    const bool greedy = rule.temperature == 0.0f;
    float* values = greedy ? nullptr : scratch + (size_t)row * columns;

    // The largest logit, raw and among those that may be drawn, the latter with the lowest of its ids.
    u64 best[2] = {0, 0};
    for (int id = own.first; id < own.end; id += 32) {
        float value = logit_of(logits, id);
        best[0] = Largest()(best[0], ordered(value));
        if (id >= limit) continue;
        if (penalised && marks[id / 32] >> id % 32 & 1)
            value = value < 0.0f ? __fmul_rn(value, rule.penalty) : __fdiv_rn(value, rule.penalty);
        if (!greedy) values[id] = value = __fdiv_rn(value, rule.temperature);
        best[1] = Largest()(best[1], (u64)ordered(value) << 32 | (ALL - (u32)id));
    }
    block_reduce(best, partials, Largest());
    const float raw_max = unordered((u32)best[0]), max = unordered((u32)(best[1] >> 32));

    // The sum of all raw weights; and how many are not numbers, which a sum of integers cannot tell.
    u64 raw[2] = {0, 0};
    for (int id = own.first; id < own.end; id += 32) {
        const float weight = exponential(logit_of(logits, id) - raw_max);
        raw[0] += units(weight);
        raw[1] += weight != weight;
    }
    block_reduce(raw, partials, Sum());
    const double nan = __uint_as_float(0x7fc00000u);
    const double log_total = raw[1] ? nan : log((double)raw[0] * (1.0 / 17592186044416.0));
    const auto finish = [&](u32 id, double probability) {
        ids[row] = id;
        log_probs[row] = (float)((double)(logit_of(logits, id) - raw_max) - log_total);
        probabilities[row] = (float)probability;
        if (penalised && seen_lengths[row] < (u32)seen_columns)
            seen[(size_t)row * seen_columns + seen_lengths[row]] = id;
    };
    if (greedy) {
        if (threadIdx.x == 0) finish(ALL - (u32)best[1], 1.0);
        return;
    }

    // Weights, those below the k-th largest 0.
    const bool some = rule.top_k > 0 && rule.top_k < (u32)limit;
    const u32 least = some ? threshold<false>(values, drawable, rule.top_k, partials) : 0;
    u64 all[1] = {0};
    for (int id = drawable.first; id < drawable.end; id += 32) {
        const float weight = ordered(values[id]) >= least ? exponential(values[id] - max) : 0.0f;
        values[id] = weight;
        all[0] += units(weight);
    }
    block_reduce(all, partials, Sum());

    // The least weight that stays. Unless top-p cuts, that is any above 0.
    u64 target = 0;
    u32 last = 0;
    if (rule.top_p < 1.0) {
        target = (u64)ceil(rule.top_p * (double)all[0]);
        target = target < 1 ? 1 : target > all[0] ? all[0] : target;
        last = threshold<true>(values, drawable, target, partials);
    }
    // What each warp's ids above it weigh, and how many of its ids have just it.
    u64 run[2] = {0, 0};
    for (int id = drawable.first; id < drawable.end; id += 32) {
        const u32 key = ordered(values[id]);
        if (key > last) run[0] += units(values[id]);
        if (key == last) run[1]++;
    }
    warp_reduce(run, Sum());
    __syncthreads();
    if (lane == 0) partials[warp] = run[0], partials[WARPS + warp] = run[1];
#ifndef FAULT_SAMPLING_NO_BARRIER_BEFORE_DRAW
    __syncthreads();
#endif
    // Of the ids with the least weight, the lowest stay, as many as it takes.
    u64 above = 0, equal = 0;
    const u64 each = units(unordered(last));
    for (int w = 0; w < WARPS; w++) above += partials[w];
    if (each > 0) equal = (target - above + each - 1) / each;
    const u64 total = above + equal * each;

    // floor(u * total) for u of 53 bits. Since the sums are integers, one exceeds u * total if it exceeds this.
    const u64 u = philox(rule.seed, rule.stream, rule.counter) >> 11;
    const u64 point = __umul64hi(u << 11, total);
    u64 before = 0;
    for (int w = 0; w < warp; w++) {
        const u64 stay = lesser(equal, partials[WARPS + w]);
        before += partials[w] + stay * each;
        equal -= stay;
    }
    const u64 weight = partials[warp] + lesser(equal, partials[WARPS + warp]) * each;
    if (total == 0 && threadIdx.x == 0) finish(0, 0.0);  // nothing is left: no logit is finite
    if (point < before || point >= before + weight) return;

    // The point is in this warp's run: its lanes go through it together, in ascending order.
    for (int start = drawable.first - lane; start < drawable.end; start += 32) {
        const int id = start + lane;
        const float value = id < drawable.end ? values[id] : 0.0f;
        const u32 key = id < drawable.end ? ordered(value) : 0;
        // Sums over the lanes up to this one, of those with the least weight and then of weights.
        const bool tie = each > 0 && key == last;
        const u64 ties = inclusive(tie);
        const bool stays = key > last || (tie && ties <= equal);
        const u64 mine = stays ? units(value) : 0;
        const u64 through = before + inclusive(mine);
        const bool here = through > point && through - mine <= point;
        if (here) finish(id, (double)mine / (double)total);
        if (__ballot_sync(ALL, here)) return;
        equal -= lesser(equal, from_lane(ties, 31));
        before = from_lane(through, 31);
    }
}

KERNEL(512) sample_f32(u32* __restrict__ ids, float* __restrict__ log_probs, float* __restrict__ probabilities,
                       float* __restrict__ scratch, const float* __restrict__ logits, u32* __restrict__ seen,
                       const u32* __restrict__ seen_lengths, const Rule* __restrict__ rules, int columns,
                       int seen_columns) {
    sample(ids, log_probs, probabilities, scratch, logits, seen, seen_lengths, rules, columns, seen_columns);
}
EXPORT_KERNEL(sample_f32)

KERNEL(512) sample_bf16(u32* __restrict__ ids, float* __restrict__ log_probs, float* __restrict__ probabilities,
                        float* __restrict__ scratch, const bf16* __restrict__ logits, u32* __restrict__ seen,
                        const u32* __restrict__ seen_lengths, const Rule* __restrict__ rules, int columns,
                        int seen_columns) {
    sample(ids, log_probs, probabilities, scratch, logits, seen, seen_lengths, rules, columns, seen_columns);
}
EXPORT_KERNEL(sample_bf16)
