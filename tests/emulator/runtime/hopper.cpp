// What only sm_90a has: barriers in shared memory, tensor copies, products of a warpgroup. Both are done at once or
// as late as allowed: copies when nobody can go on without them, products when they are waited for. The schedule says
// which, for both alike, but that in random order products are late: copies at once may then overwrite what they read.
#include "block.hpp"
#include "detector.hpp"
#include <algorithm>
#include <cstring>

namespace emulator {

namespace {

// ---- Barriers in shared memory ----

MBarrier& find_mbarrier(u32 at, const char* instruction, bool by_copy, Site site) {
    const auto found = block->mbarriers.find(at);
    if (found == block->mbarriers.end()) {
        report("an mbarrier that was not initialised", site, [&] {
            return text("%s at byte %d of shared memory", instruction, static_cast<int>(at - SHARED_BASE));
        });
        give_up();
    }
    MBarrier& barrier = found->second;
    if (barrier.unfenced && (by_copy || barrier.maker != block->now))
        report("an mbarrier is used without mbarrier_init_fence after its initialisation", site,
               [&] { return std::string(instruction); });
    if (block->detector) detector_access(*block->detector, block->shared + (at - SHARED_BASE), 8, false, site);
    return barrier;
}

void complete_if_all_is_there(MBarrier& barrier) {
    if (barrier.missing > 0 || barrier.missing_bytes != 0) return;
    if (block->detector) {
        for (const auto& [offset, bytes] : barrier.targets) detector_box_ends(*block->detector, offset, bytes);
        if (barrier.copier >= 0) detector_phase(barrier.met, *block->detector, barrier.copier, barrier.phase);
    }
    barrier.targets.clear();
    barrier.passed = barrier.met;
    barrier.phase++;
    barrier.missing = barrier.arrivals;
    for (const u32 thread : barrier.waiting) make_ready(thread);
    barrier.waiting.clear();
}

}  // namespace

void mbarrier_init(u32 at, u32 arrivals, Site site) {
    const u32 offset = at - SHARED_BASE;
    if (at % 8 || at < SHARED_BASE || offset + 8 > block->launch->shared_bytes || arrivals == 0) {
        report("no place for an mbarrier, or none to arrive", site,
               [&] { return text("byte %d, %u arrivals", static_cast<int>(offset), arrivals); });
        give_up();
    }
    if (block->detector) detector_access(*block->detector, block->shared + offset, 8, true, site);
    MBarrier barrier = {};
    barrier.arrivals = barrier.missing = arrivals;
    barrier.unfenced = true;
    barrier.maker = block->now;
    barrier.copier = -1;
    block->mbarriers[at] = barrier;
}

void mbarrier_init_fence() {
    for (auto& [at, barrier] : block->mbarriers)
        if (barrier.maker == block->now) barrier.unfenced = false;
    proxy_fence();
}

void mbarrier_arrive(u32 at, u32 bytes, Site site) {
    MBarrier& barrier = find_mbarrier(at, "an arrival", false, site);
    if (barrier.missing == 0) {
        report("more arrivals at an mbarrier than it counts", site,
               [&] { return text("%u in a phase that waits for bytes", barrier.arrivals); });
        give_up();
    }
    barrier.missing--;
    barrier.missing_bytes += bytes;
    if (block->detector) detector_tell(*block->detector, barrier.met, block->now / WARP);
    complete_if_all_is_there(barrier);
}

void mbarrier_wait(u32 at, u32 parity, Site site) {
    MBarrier& barrier = find_mbarrier(at, "a wait", false, site);
    while ((barrier.phase & 1) == (parity & 1)) {
        barrier.waiting.push_back(block->now);
        wait_for("an mbarrier", site);
    }
    if (block->detector) detector_learn(*block->detector, barrier.passed, block->now / WARP);
}

void proxy_fence() {
    if (block->detector) detector_proxy_fence(*block->detector);
}

std::string describe_mbarriers() {
    std::string all;
    for (const auto& [at, barrier] : block->mbarriers) {
        if (barrier.waiting.empty()) continue;
        all += text(", the mbarrier at byte %u misses %u arrivals and %lld bytes", at - SHARED_BASE, barrier.missing,
                    barrier.missing_bytes);
    }
    return all;
}

// ---- Tensor copies ----

namespace {

// The 128-byte swizzle: by the address, as the hardware does it.
u32 swizzled(u32 address) {
    return address ^ (address >> 7 & 7) << 4;
}

constexpr u32 ROW = 128;

u32 rows_of(const TensorContents& tensor) {
    return tensor.box[1] * tensor.box[2];
}

// What row `row` of the box is made of: `count` elements at `from` go to the row's element `first`; the rest is zero.
struct Source {
    const u8* from;
    u32 first, count;
};

Source source_of(const TensorCopy& copy, u32 row) {
    const TensorContents& tensor = copy.tensor;
    const long long c0 = copy.at[0], c1 = copy.at[1] + static_cast<long long>(row % tensor.box[1]),
                    c2 = copy.at[2] + static_cast<long long>(row / tensor.box[1]);
    const long long e0 = tensor.extents[0], e1 = tensor.extents[1], e2 = tensor.extents[2];
    const long long begin = std::max(0ll, c0), end = std::min(e0, c0 + ROW / 2);
    if (begin >= end || c1 < 0 || c1 >= e1 || c2 < 0 || c2 >= e2) return {nullptr, 0, 0};
    const u64 at = tensor.address + begin * 2 + c1 * tensor.pitches[0] + c2 * tensor.pitches[1];
    return {reinterpret_cast<const u8*>(at), static_cast<u32>(begin - c0), static_cast<u32>(end - begin)};
}

void do_copy(const TensorCopy& copy) {
    for (u32 row = 0; row < rows_of(copy.tensor); row++) {
        u8 line[ROW] = {};
        const Source source = source_of(copy, row);
        if (source.count) std::memcpy(line + 2 * source.first, source.from, 2 * source.count);
        for (u32 chunk = 0; chunk < ROW; chunk += 16)
            std::memcpy(block->shared + (swizzled(copy.to + row * ROW + chunk) - SHARED_BASE), line + chunk, 16);
    }
}

void bytes_have_come(MBarrier& barrier, const TensorCopy& copy) {
    barrier.missing_bytes -= rows_of(copy.tensor) * ROW;
}

// Among the barriers that copies complete on.
int new_copier(Site site) {
    int copiers = 0;
    for (const auto& [at, barrier] : block->mbarriers) copiers += barrier.copier >= 0;
    if (copiers == static_cast<int>(MOST_COPIERS)) {
        report("tensor copies complete on more mbarriers than are emulated", site,
               [&] { return text("%u", MOST_COPIERS); });
        give_up();
    }
    return copiers;
}

}  // namespace

void tensor_load(u32 to, const void* map, u32 barrier_at, const int* at, u32 rank, Site site) {
    TensorCopy copy = {};
    std::memcpy(&copy.tensor, map, sizeof copy.tensor);
    const TensorContents& tensor = copy.tensor;
    if (tensor.kind != TENSOR_KIND || tensor.rank != rank) {
        report("not a tensor map of so many extents", site, [&] { return text("%u", rank); });
        give_up();
    }
    copy.to = to;
    std::memcpy(copy.at, at, sizeof copy.at);
    copy.site = site;
    const u32 offset = to - SHARED_BASE, bytes = rows_of(tensor) * ROW;
    if (to % 1024 || to < SHARED_BASE || offset + bytes > block->launch->shared_bytes) {
        report("a tensor copy to a place that is outside shared memory or no multiple of 1024", site, [&] {
            return text("bytes %d to %d of %u", static_cast<int>(offset), static_cast<int>(offset + bytes),
                        block->launch->shared_bytes);
        });
        give_up();
    }
    const u8* const start = reinterpret_cast<const u8*>(tensor.address);
    const u8* const end = start + (tensor.extents[2] - 1) * tensor.pitches[1] +
                          (tensor.extents[1] - 1) * tensor.pitches[0] + tensor.extents[0] * 2;
    const Buffer* const buffer = find(block->launch->buffers, start);
    if (!buffer || start < buffer->start || end > buffer->start + buffer->bytes) {
        report("a tensor map that is not within one buffer", site, no_details);
        give_up();
    }
    MBarrier& barrier = find_mbarrier(barrier_at, "a tensor copy", true, site);
    if (barrier.copier < 0) barrier.copier = new_copier(site);
    if (block->detector) {
        for (u32 row = 0; row < rows_of(tensor); row++) {
            const Source source = source_of(copy, row);
            if (source.count) detector_access(*block->detector, source.from, 2 * source.count, false, site);
        }
        detector_box_begins(*block->detector, offset, bytes, barrier.copier, barrier.phase, site);
    }
    barrier.targets.emplace_back(offset, bytes);
    if (block->launch->options.late_copies) {
        barrier.copies.push_back(copy);
        return;
    }
    do_copy(copy);
    bytes_have_come(barrier, copy);
    complete_if_all_is_there(barrier);
}

bool finish_copies() {
    for (auto& [at, barrier] : block->mbarriers) {
        if (barrier.waiting.empty() || barrier.copies.empty()) continue;
        const std::vector<TensorCopy> copies = std::move(barrier.copies);
        barrier.copies.clear();
        for (const TensorCopy& copy : copies) {
            do_copy(copy);
            bytes_have_come(barrier, copy);
        }
        complete_if_all_is_there(barrier);
        return true;
    }
    return false;
}

void leave_copies() {
    for (const auto& [at, barrier] : block->mbarriers)
        if (!barrier.targets.empty())
            report("the block ends before a tensor copy is waited for", barrier.copies.empty() ? nullptr :
                   barrier.copies[0].site, 0, no_details);
}

// ---- Products of a warpgroup ----

namespace {

// Where the eight elements are that begin at (outer, k) of an operand, outer being M or N and the eight those along
// the contiguous index: a chunk of 16 bytes.
u32 chunk_of(u64 descriptor, bool transposed, u32 outer, u32 k) {
    const u32 start = (descriptor & 0x3fff) << 4;
    const u32 leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (transposed) return swizzled(start + outer / 64 * leading + k / 8 * stride + k % 8 * ROW + outer % 64 * 2);
    return swizzled(start + outer / 8 * stride + outer % 8 * ROW + k * 2);
}

// Calls `each(outer, k, address)` for every chunk of an operand with so many rows or columns.
template <class F> void for_each_chunk(u64 descriptor, bool transposed, u32 outers, F each) {
    for (u32 outer = 0; outer < outers; outer += transposed ? 8 : 1)
        for (u32 k = 0; k < 16; k += transposed ? 1 : 8) each(outer, k, chunk_of(descriptor, transposed, outer, k));
}

void check_operand(u64 descriptor, bool transposed, u32 outers, u32 warpgroup, u32 group, Site site) {
    const u32 start = (descriptor & 0x3fff) << 4, begins = transposed ? start % 1024 : start & 0x380;
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7 || begins) {
        report("an operand of wgmma that is not a swizzled tile at a multiple of 1024", site,
               [&] { return text("descriptor %016llx", descriptor); });
        give_up();
    }
    for_each_chunk(descriptor, transposed, outers, [&](u32, u32, u32 address) {
        const u32 offset = address - SHARED_BASE;
        if (address < SHARED_BASE || offset + 16 > block->launch->shared_bytes) {
            report("an operand of wgmma outside shared memory", site,
                   [&] { return text("byte %d of %u", static_cast<int>(offset), block->launch->shared_bytes); });
            give_up();
        }
        if (block->detector) detector_product_reads(*block->detector, warpgroup, group, offset, site);
    });
}

float widen(u32 bits) {
    const u32 f = bits << 16;
    float value;
    std::memcpy(&value, &f, sizeof value);
    return value;
}

// On the stack of a fibre there is no room for them.
struct Matrices {
    float a[16][64], b[16][256], d[64][256];
};

template <u32 OUTERS> void load(float (&to)[16][OUTERS], u64 descriptor, bool transposed, u32 outers) {
    for_each_chunk(descriptor, transposed, outers, [&](u32 outer, u32 k, u32 address) {
        u16 elements[8];
        std::memcpy(elements, block->shared + (address - SHARED_BASE), sizeof elements);
        for (u32 i = 0; i < 8; i++)
            to[transposed ? k : k + i][transposed ? outer + i : outer] = widen(elements[i]);
    });
}

// `each(lane's accumulator, row, column)` for every accumulator of thread `thread`.
template <class F> void for_each_result(u32 thread, u32 columns, F each) {
    const u32 row = thread / WARP * 16 + thread % WARP / 4, column = thread % 4 * 2;
    for (u32 i = 0; i < columns / 2; i++) each(i, row + i % 4 / 2 * 8, i / 4 * 8 + column + i % 2);
}

void keep_accumulators(Product& product) {
    const u32 count = product.operands[0].columns / 2;
    product.accumulators.resize(WARPGROUP * count);
    for (u32 t = 0; t < WARPGROUP; t++)
        std::memcpy(&product.accumulators[t * count], product.operands[t].d, count * sizeof(float));
}

void do_product(const Product& product) {
    static thread_local Matrices m;
    const ProductOperands& all = product.operands[0];
    const u32 columns = all.columns;
    load(m.b, all.b, all.b_transposed, columns);
    if (!all.a_registers) load(m.a, all.a, all.a_transposed, 64);
    for (u32 t = 0; t < WARPGROUP; t++) {
        const ProductOperands& own = product.operands[t];
        for_each_result(t, columns,
                        [&](u32 i, u32 row, u32 column) { m.d[row][column] = all.accumulate ? own.d[i] : 0.0f; });
        if (!own.a_registers) continue;
        const u32 row = t / WARP * 16 + t % WARP / 4, k = t % 4 * 2;
        for (u32 i = 0; i < 8; i++)
            m.a[k + i % 2 + i / 4 * 8][row + i / 2 % 2 * 8] = widen(own.a_registers[i / 2] >> 16 * (i % 2) & 0xffff);
    }
    for (u32 row = 0; row < 64; row++)
        for (u32 k = 0; k < 16; k++)
            for (u32 column = 0; column < columns; column++) m.d[row][column] += m.a[k][row] * m.b[k][column];
    for (u32 t = 0; t < WARPGROUP; t++)
        for_each_result(t, columns,
                        [&](u32 i, u32 row, u32 column) { product.operands[t].d[i] = m.d[row][column]; });
}

bool products_are_late() {
    const Options& options = block->launch->options;
    return options.late_copies || options.order == Order::Random;
}

// Registers that changed under a product.
void check_registers(const Product& product, u32 first_thread) {
    const u32 count = product.operands[0].columns / 2;
    for (u32 t = 0; t < WARPGROUP; t++) {
        const ProductOperands& own = product.operands[t];
        if (own.a_registers && std::memcmp(own.a_registers, product.a_registers[t], sizeof product.a_registers[t]))
            report("registers of A are changed before their product is waited for", product.site, first_thread + t,
                   no_details);
        if (!product.accumulators.empty() &&
            std::memcmp(own.d, &product.accumulators[t * count], count * sizeof(float)))
            report("accumulators are changed before their product is waited for", product.site, first_thread + t,
                   no_details);
    }
}

// All threads have come.
void issue(Warpgroup& group, u32 number) {
    Product product = std::move(group.coming);
    group.arrived = 0;
    const ProductOperands& all = product.operands[0];
    product.group = block->threads[number * WARPGROUP].products;
    for (u32 t = 0; t < WARPGROUP; t++) {
        const ProductOperands& own = product.operands[t];
        const bool same = own.columns == all.columns && own.a == all.a && own.b == all.b &&
                          own.accumulate == all.accumulate && !own.a_registers == !all.a_registers &&
                          block->threads[number * WARPGROUP + t].products == product.group;
        if (!same) {
            report("threads of a warpgroup ask for different products", product.site, number * WARPGROUP + t,
                   no_details);
            give_up();
        }
        if (own.a_registers) std::memcpy(product.a_registers[t], own.a_registers, sizeof product.a_registers[t]);
    }
    if (!all.a_registers) check_operand(all.a, all.a_transposed, 64, number, product.group, product.site);
    check_operand(all.b, all.b_transposed, all.columns, number, product.group, product.site);
    const bool late = products_are_late();
    bool first = true;
    for (Product& earlier : group.pending) {
        if (earlier.operands[0].d != all.d) continue;
        first = false;
        // At once, the earlier one's results are no more.
        if (!late) earlier.accumulators.clear();
    }
    if (!late) do_product(product);
    product.done = !late;
    if (!late || first) keep_accumulators(product);
    group.pending.push_back(std::move(product));
}

}  // namespace

void product(const ProductOperands& operands, Site site) {
    Thread& thread = block->thread();
    const u32 number = block->now / WARPGROUP, t = block->now % WARPGROUP;
    Warpgroup& group = block->warpgroups[number];
    if ((number + 1) * WARPGROUP > block->count) {
        report("a warpgroup without all its warps", site, no_details);
        give_up();
    }
    if (!thread.fenced) report("a batch of products that wgmma_fence does not begin", site, no_details);
    if (group.arrived && group.coming.site != site) {
        report("warps of a warpgroup meet at different products", site,
               [&] { return "others are at " + place(group.coming.site); });
        give_up();
    }
    group.coming.site = site;
    group.coming.operands[t] = operands;
    if (++group.arrived < WARPGROUP) {
        wait_for("wgmma", site);
        return;
    }
    issue(group, number);
    for (u32 i = 0; i < WARPGROUP; i++) make_ready(number * WARPGROUP + i);
    run_next(thread.context);
}

void products_begin(Site site) {
    collective(Collective::ProductsBegin, ~0u, {}, site);
    block->thread().fenced = true;
}

void products_commit(Site site) {
    collective(Collective::ProductsCommit, ~0u, {}, site);
    block->thread().fenced = false;
    block->thread().products++;
}

void products_wait(u32 unfinished, Site site) {
    collective(Collective::ProductsWait, ~0u, {}, site);
    const u32 number = block->now / WARPGROUP, committed = block->thread().products;
    const u32 end = committed > unfinished ? committed - unfinished : 0;
    std::vector<Product>& pending = block->warpgroups[number].pending;
    size_t done = 0;
    for (; done < pending.size() && pending[done].group < end; done++) {
        Product& product = pending[done];
        check_registers(product, number * WARPGROUP);
        if (!product.done) do_product(product);
    }
    pending.erase(pending.begin(), pending.begin() + done);
    if (block->detector) detector_products_done(*block->detector, block->now / WARP, end);
}

const char* used_by_product(u32 thread, const u8* at, bool write, Site* site) {
    for (const Product& product : block->warpgroups[thread / WARPGROUP].pending) {
        const ProductOperands& own = product.operands[thread % WARPGROUP];
        const u8* const d = reinterpret_cast<const u8*>(own.d);
        const u8* const a = reinterpret_cast<const u8*>(own.a_registers);
        *site = product.site;
        if (at >= d && at < d + own.columns / 2 * sizeof(float))
            return "accumulators are used before their product is waited for";
        if (write && a && at >= a && at < a + 16)
            return "registers of A are changed before their product is waited for";
    }
    return nullptr;
}

void leave_products() {
    const u32 number = block->now / WARPGROUP;
    for (const Product& product : block->warpgroups[number].pending)
        report("a thread leaves before its products are waited for", product.site, no_details);
}

}  // namespace emulator
