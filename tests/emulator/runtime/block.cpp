// Scheduling: which of a block's threads runs, and how they wait for one another.
#include "block.hpp"
#include "detector.hpp"
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <sys/mman.h>

namespace emulator {

thread_local Block* block = nullptr;
thread_local Built* current = nullptr;

// ---- Telling ----

std::string text(const char* format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

std::string place(Site site) {
    Dl_info image = {};
    if (!site || !dladdr(site, &image)) return "an unknown place";
    return text("@{%zx}", static_cast<size_t>(static_cast<const char*>(site) - static_cast<char*>(image.dli_fbase)));
}

bool first_time(const char* kind, Site site) {
    Launch& launch = *block->launch;
    for (const auto& [told, where] : launch.told)
        if (told == kind && where == site) return false;
    launch.told.emplace_back(kind, site);
    return launch.told.size() <= 32;
}

void tell(const char* kind, Site site, u32 thread, const std::string& details) {
    const Thread& t = block->threads[thread];
    const std::string who = text("block (%u, %u, %u), thread (%u, %u, %u)", t.block.x, t.block.y, t.block.z, t.thread.x,
                                 t.thread.y, t.thread.z);
    const std::string more = details.empty() ? "" : ": " + details;
    block->launch->faults.push_back(place(site) + ": " + kind + " (" + who + more + ")");
}

// ---- Who is next ----

namespace {

u64 next_random(u64& state) {
    // SplitMix64.
    u64 z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

// Takes the next thread from those that are ready; none is -1.
int take_ready() {
    u64* const ready = block->ready;
    const int words = (block->count + 63) / 64;
    int found = -1;
    switch (block->launch->options.order) {
        case Order::Up:
            for (int w = 0; w < words && found < 0; w++)
                if (ready[w]) found = w * 64 + __builtin_ctzll(ready[w]);
            break;
        case Order::Down:
            for (int w = words - 1; w >= 0 && found < 0; w--)
                if (ready[w]) found = w * 64 + 63 - __builtin_clzll(ready[w]);
            break;
        case Order::Random: {
            u32 total = 0;
            for (int w = 0; w < words; w++) total += __builtin_popcountll(ready[w]);
            if (total == 0) break;
            u32 skip = next_random(block->random) % total;
            for (int w = 0; w < words; w++) {
                const u32 here = __builtin_popcountll(ready[w]);
                if (skip >= here) {
                    skip -= here;
                    continue;
                }
                u64 bits = ready[w];
                while (skip-- > 0) bits &= bits - 1;
                found = w * 64 + __builtin_ctzll(bits);
                break;
            }
            break;
        }
    }
    if (found >= 0) ready[found / 64] &= ~(1ull << found % 64);
    return found;
}

void begin_thread() {
    Launch& launch = *block->launch;
    launch.kernel->call(launch.kernel->function, launch.arguments);
    leave_products();
    Thread& thread = block->thread();
    thread.state = State::Left;
    block->live--;
    Warp& warp = block->warp();
    warp.alive &= ~(1u << block->lane());
    // The others may have waited for this one only.
    if (warp.alive && warp.arrived == warp.alive) perform(warp, block->now / WARP * WARP);
    run_next(thread.context);
    __builtin_unreachable();
}

}  // namespace

// The fibre's place is kept in `from`; if nobody can go on, the loop over blocks does.
void run_next(Context& from) {
    int next = take_ready();
    while (next < 0 && finish_copies()) next = take_ready();
    if (next < 0) {
        current = nullptr;
        change(from, block->main);
        return;
    }
    block->now = next;
    current = &block->thread();
    if (&block->thread().context != &from) change(from, block->thread().context);
}

void make_ready(u32 thread) {
    block->threads[thread].state = State::Ready;
    block->ready[thread / 64] |= 1ull << thread % 64;
}

void wait_for(const char* what, Site site) {
    Thread& thread = block->thread();
    thread.state = State::Waiting;
    thread.waits_for = what;
    thread.waits_at = site;
    run_next(thread.context);
}

void give_up() {
    block->broken = true;
    current = nullptr;
    change(block->thread().context, block->main);
    __builtin_unreachable();
}

// ---- Meeting ----

void collective(Collective what, u32 mask, const Operands& operands, Site site) {
    static const char* const NAMES[] = {"__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma", "wgmma_fence",
                                        "wgmma_commit", "wgmma_wait"};
    Warp& warp = block->warp();
    const u32 lane = block->lane();
    if (mask != 0xffffffffu) {
        report("a warp collective without all lanes is not emulated", site, [&] { return text("mask %08x", mask); });
        give_up();
    }
    if (warp.arrived && (warp.what != what || warp.site != site)) {
        report("lanes of a warp meet at different instructions", site, [&] {
            return text("comes to %s while others are at %s, ", NAMES[static_cast<int>(what)],
                        NAMES[static_cast<int>(warp.what)]) +
                   place(warp.site);
        });
        give_up();
    }
    warp.what = what;
    warp.site = site;
    warp.arrived |= 1u << lane;
    warp.operands[lane] = operands;
    if (warp.arrived != warp.alive) {
        wait_for(NAMES[static_cast<int>(what)], site);
        return;
    }
    perform(warp, block->now / WARP * WARP);
    // `perform` made everyone ready, this thread too: who goes on first is the schedule's to say.
    Thread& thread = block->thread();
    run_next(thread.context);
}

void barrier(u32 id, u32 threads, bool waits, Site site) {
    const u32 needed = threads ? threads : block->count;
    if (id >= BARRIERS || (threads && (threads % WARP || threads > block->count))) {
        report("no such barrier", site, [&] { return text("barrier %u for %u threads", id, threads); });
        give_up();
    }
    Barrier& barrier = block->barriers[id];
    if (barrier.arrived && barrier.needed != needed) {
        report("threads disagree about how many meet at a barrier", site, [&] {
            return text("waits for %u, others for %u, ", needed, barrier.needed) + place(barrier.site);
        });
        give_up();
    }
    // __syncthreads in two branches is one barrier to the hardware, but not to the language.
    if (threads == 0 && barrier.arrived && barrier.site != site) {
        report("threads of a block meet at different __syncthreads", site,
               [&] { return "others are at " + place(barrier.site); });
        give_up();
    }
    u64& here = barrier.here[block->now / 64];
    const u64 own = 1ull << block->now % 64;
    if (here & own)
        report("a thread comes twice to a barrier before it is complete", site, [&] { return text("barrier %u", id); });
    here |= own;
    barrier.needed = needed;
    barrier.site = site;
    barrier.arrived++;
    if (block->detector) detector_arrive(*block->detector, id, block->now / WARP, waits);
    if (barrier.arrived < needed) {
        if (waits) {
            barrier.waiting.push_back(block->now);
            wait_for(threads ? "a named barrier" : "__syncthreads", site);
        }
        return;
    }
    barrier.arrived = 0;
    std::memset(barrier.here, 0, sizeof barrier.here);
    if (block->detector) detector_pass(*block->detector, id);
    for (const u32 thread : barrier.waiting) make_ready(thread);
    barrier.waiting.clear();
    if (!waits) return;
    make_ready(block->now);
    Thread& thread = block->thread();
    run_next(thread.context);
}

// ---- Asynchronous copies ----

namespace {

void do_copy(const Copy& copy) {
    u8* const to = block->shared + (copy.to - SHARED_BASE);
    if (copy.filled) std::memcpy(to, copy.from, 16);
    else std::memset(to, 0, 16);
}

}  // namespace

void copy_async(u32 to, const void* from, bool filled, Site site) {
    const u32 offset = to - SHARED_BASE;
    if (to < SHARED_BASE || offset + 16 > block->launch->shared_bytes) {
        report("cp.async outside shared memory", site,
               [&] { return text("byte %d of %u", static_cast<int>(offset), block->launch->shared_bytes); });
        give_up();
    }
    if (to % 16 || (filled && reinterpret_cast<u64>(from) % 16)) {
        report("cp.async of an address that is no multiple of 16", site, no_details);
        give_up();
    }
    Thread& thread = block->thread();
    const Copy copy = {to, from, filled, thread.group, site};
    if (block->detector) {
        if (filled) detector_access(*block->detector, from, 16, false, site);
        detector_copy_begins(*block->detector, offset, site);
    }
    // Early or late, both are what a device may do.
    if (!block->launch->options.late_copies) do_copy(copy);
    thread.copies.push_back(copy);
}

void copy_commit() {
    block->thread().group++;
}

void copy_wait(u32 unfinished, Site) {
    Thread& thread = block->thread();
    size_t done = 0;
    while (done < thread.copies.size() && thread.copies[done].group + unfinished < thread.group) {
        const Copy& copy = thread.copies[done++];
        if (block->launch->options.late_copies) do_copy(copy);
        if (block->detector) detector_copy_ends(*block->detector, copy.to - SHARED_BASE);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

u8* shared_memory() {
    return block->shared;
}

void touch(const void* at, u32 bytes, bool write, Site site) {
    if (reinterpret_cast<u64>(at) % bytes) {
        report("an access whose address is no multiple of its size", site, [&] { return text("%u bytes", bytes); });
        give_up();
    }
    if (block->detector) detector_access(*block->detector, at, bytes, write, site);
}

// Blocks run one after the other and threads change only where they wait, so nothing can come between.
u32 atomic32(void* at, u32 (*change)(u32, u32, u32), u32 operand, u32 other, Site) {
    u32* const p = static_cast<u32*>(at);
    const u32 old = *p;
    *p = change(old, operand, other);
    return old;
}

u64 atomic64(void* at, u64 (*change)(u64, u64, u64), u64 operand, u64 other, Site) {
    u64* const p = static_cast<u64*>(at);
    const u64 old = *p;
    *p = change(old, operand, other);
    return old;
}

// ---- A block ----

namespace {

// The threads that wait, as people count them: how many, for what, where.
void report_deadlock() {
    std::map<std::pair<std::string, Site>, u32> groups;
    u32 left = 0;
    for (u32 i = 0; i < block->count; i++) {
        const Thread& thread = block->threads[i];
        if (thread.state == State::Waiting) groups[{thread.waits_for, thread.waits_at}]++;
        else left++;
    }
    std::string list;
    Site first = nullptr;
    for (const auto& [group, threads] : groups) {
        if (!first) first = group.second;
        list += text("%u wait for %s at ", threads, group.first.c_str()) + place(group.second) + ", ";
    }
    for (u32 i = 0; i < block->count; i++)
        if (block->threads[i].state == State::Waiting) {
            block->now = i;
            break;
        }
    report("deadlock", first, [&] { return list + text("%u have left", left) + describe_mbarriers(); });
}

void make_room(Block& b, u32 threads, u32 shared_bytes) {
    while (b.threads.size() < threads) {
        Thread thread;
        u8* mapping;
        size_t mapping_bytes;
        thread.stack = reinterpret_cast<char*>(map_guarded(STACK, PAGE, &mapping, &mapping_bytes));
        b.threads.push_back(std::move(thread));
    }
    // Anew for each size, so that it ends at its guard page.
    const size_t rounded = (static_cast<size_t>(shared_bytes) + 15) / 16 * 16;
    const size_t body = (rounded + PAGE - 1) / PAGE * PAGE + (rounded == 0 ? PAGE : 0);
    if (b.shared_mapping && b.shared_mapping_bytes != body + 2 * PAGE) {
        munmap(b.shared_mapping, b.shared_mapping_bytes);
        b.shared_mapping = nullptr;
    }
    if (!b.shared_mapping) map_guarded(rounded, 16, &b.shared_mapping, &b.shared_mapping_bytes);
    b.shared = b.shared_mapping + PAGE + body - rounded;
}

}  // namespace

bool run_block(Launch& launch, u32 number) {
    Block& b = *block;
    const dim3 size = launch.threads;
    b.launch = &launch;
    b.number = number;
    b.count = b.live = size.x * size.y * size.z;
    b.broken = false;
    b.crash = {};
    make_room(b, b.count, launch.shared_bytes);
    std::memset(b.shared, POISON, (launch.shared_bytes + 15) / 16 * 16);
    b.random = launch.options.seed * 0x2545f4914f6cdd1d + number;
    std::memset(b.ready, 0, sizeof b.ready);
    for (u32 w = 0; w < MOST_WARPS; w++) {
        const u32 lanes = w * WARP >= b.count ? 0 : b.count - w * WARP;
        b.warps[w].arrived = 0;
        b.warps[w].alive = lanes >= WARP ? ~0u : (1u << lanes) - 1;
    }
    for (Barrier& barrier : b.barriers) {
        barrier.arrived = 0;
        barrier.waiting.clear();
        std::memset(barrier.here, 0, sizeof barrier.here);
    }
    b.mbarriers.clear();
    for (Warpgroup& group : b.warpgroups) {
        group.arrived = 0;
        group.pending.clear();
    }
    if (b.detector) detector_begin_block(*b.detector);
    const dim3 position = {number % launch.blocks.x, number / launch.blocks.x % launch.blocks.y,
                           number / launch.blocks.x / launch.blocks.y};
    for (u32 i = 0; i < b.count; i++) {
        Thread& thread = b.threads[i];
        thread.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        thread.block = position;
        thread.threads = size;
        thread.blocks = launch.blocks;
        thread.index = i;
        thread.copies.clear();
        thread.group = 0;
        thread.products = 0;
        thread.fenced = false;
        prepare(thread.context, thread.stack, STACK, begin_thread);
        make_ready(i);
    }
    b.running = true;
    run_next(b.main);
    b.running = false;
    current = nullptr;
    if (b.live && !b.broken) {
        report_deadlock();
        b.broken = true;
    }
    if (!b.broken) leave_copies();
    return !b.broken;
}

}  // namespace emulator
