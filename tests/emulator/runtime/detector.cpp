// The order of accesses is kept in vector clocks, one per warp. A warp's own time goes on at each barrier and
// each __syncwarp; a barrier tells every warp the times of all who met there. An access happened before
// another if the other's warp has been told of a later time. Shuffles, votes and matrix instructions order
// nothing, as on the device.
//
// What runs behind the threads' backs has clocks of its own, which tick when it is waited for: the matrix unit of
// a warpgroup, whose time is the number of a group of products; tensor copies to a barrier in shared memory, whose
// time is the number of its phase. Both count from 1.
//
// What a cell of memory remembers is the last write and, of shared memory, the last read by each warp.
#include "detector.hpp"
#include "block.hpp"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

// Set by the linker: where the program begins and ends in memory.
extern "C" char __executable_start, _end;

namespace emulator {

namespace {

// One of a cell's accesses: a time of its warp, the warp, the lane. 0 is none.
typedef u32 Stamp;
constexpr u32 SEVERAL_LANES = WARP;
// Times beyond 20 bits are not told apart; no kernel waits a million times.
constexpr u32 LAST_TIME = (1u << 20) - 1;

Stamp stamp(u32 time, u32 warp, u32 lane) {
    return std::min(time, LAST_TIME) << 12 | warp << 6 | lane;
}
u32 time_of(Stamp s) { return s >> 12; }
u32 warp_of(Stamp s) { return s >> 6 & 63; }
u32 lane_of(Stamp s) { return s & 63; }

// Shared memory is watched in pairs of bytes: nothing smaller than a bf16 is kept there.
constexpr u32 GRAIN = 2;

// Of one byte of a buffer, during a launch. Blocks are numbered from 1.
struct GlobalCell {
    u32 writer, reader;
    Stamp write, read;
};
constexpr u32 SEVERAL_BLOCKS = ~0u;

struct Shadow {
    GlobalCell* cells = nullptr;
    size_t bytes = 0;
};

}  // namespace

struct Detector {
    const Launch* launch = nullptr;
    // Clocks: those of warps, then of warpgroups, then of copiers. The first two read shared memory.
    u32 warps = 0, readers = 0, clocks = 0;
    // times[w][k]: what warp w has been told of the time of clock k.
    u32 times[MOST_WARPS][MOST_CLOCKS];
    // What those who came to a barrier knew, and which warps wait there.
    u32 met[BARRIERS][MOST_CLOCKS];
    u32 waiting[BARRIERS];
    // Per cell of shared memory.
    std::vector<Stamp> writes;
    std::vector<u8> copying;
    // Per cell and reader.
    std::vector<Stamp> reads;
    // Who last wrote a cell by an ordinary store (thread + 1), after how many fences of its own.
    std::vector<std::pair<u16, u16>> stores;
    u16 fences[MOST_THREADS];
    // Per buffer of the launch.
    std::vector<Shadow> shadows;
};

namespace {

bool ordered(const Detector& d, Stamp earlier, u32 warp, u32 lane) {
    const u32 time = time_of(earlier);
    const bool same = lane_of(earlier) == lane && lane != SEVERAL_LANES;
    if (warp_of(earlier) == warp) return same || time < d.times[warp][warp];
    return time <= d.times[warp][warp_of(earlier)];
}

std::string with(const Detector& d, Stamp other) {
    const u32 clock = warp_of(other);
    if (clock >= d.readers) return ", and a tensor copy that was not waited for";
    if (clock >= d.warps) return text(", and products of warpgroup %u not waited for", clock - d.warps);
    if (lane_of(other) == SEVERAL_LANES) return text(", and several threads of warp %u", warp_of(other));
    return text(", and thread number %u", warp_of(other) * WARP + lane_of(other));
}

void shared_access(Detector& d, u32 thread, size_t offset, u32 bytes, bool write, Site site) {
    const u32 warp = thread / WARP, lane = thread % WARP, size = block->launch->shared_bytes;
    if (offset + bytes > size) {
        report("an access past the end of shared memory", site, thread,
               [&] { return text("bytes %zu to %zu of %u", offset, offset + bytes, size); });
        return;
    }
    const Stamp mine = stamp(d.times[warp][warp], warp, lane);
    for (size_t cell = offset / GRAIN; cell <= (offset + bytes - 1) / GRAIN; cell++) {
        const auto where = [&] { return text("byte %zu of shared memory", cell * GRAIN); };
        Stamp& written = d.writes[cell];
        Stamp* const reads = &d.reads[cell * d.readers];
        if (d.copying[cell])
            report("shared memory is used while an asynchronous copy to it is under way", site, thread, where);
        else if (written && !ordered(d, written, warp, lane))
            report(write ? "two threads write to shared memory without a barrier between"
                         : "shared memory is read without a barrier after another thread's write",
                   site, thread, [&] { return where() + with(d, written); });
        else if (!written && !write)
            report("shared memory is read that nobody has written", site, thread, where);
        if (!write) {
            Stamp& read = reads[warp];
            const bool together = read && time_of(read) == time_of(mine) && lane_of(read) != lane;
            read = together ? stamp(time_of(mine), warp, SEVERAL_LANES) : mine;
            continue;
        }
        for (u32 k = 0; k < d.readers; k++) {
            if (reads[k] && !ordered(d, reads[k], warp, lane))
                report("shared memory is written without a barrier after another thread's read", site, thread,
                       [&] { return where() + with(d, reads[k]); });
            reads[k] = 0;
        }
        written = mine;
        d.stores[cell] = {static_cast<u16>(thread + 1), d.fences[thread]};
    }
}

void global_access(Detector& d, u32 thread, const Buffer& buffer, Shadow& shadow, const u8* at, u32 bytes, bool write,
                   Site site) {
    if (at < buffer.start || at + bytes > buffer.start + buffer.bytes) {
        report(write ? "a write outside its buffer" : "a read outside its buffer", site, thread, [&] {
            return text("bytes %td to %td of %zu", at - buffer.start, at - buffer.start + bytes, buffer.bytes);
        });
        return;
    }
    if (!shadow.cells) {
        // Zero, and only the pages that are touched take memory.
        shadow.bytes = buffer.bytes * sizeof(GlobalCell);
        void* const pages =
            mmap(nullptr, shadow.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) abort();
        shadow.cells = static_cast<GlobalCell*>(pages);
    }
    const u32 warp = thread / WARP, lane = thread % WARP, own = block->number + 1;
    const Stamp mine = stamp(d.times[warp][warp], warp, lane);
    const size_t first = at - buffer.start;
    for (size_t i = first; i < first + bytes; i++) {
        GlobalCell& cell = shadow.cells[i];
        const auto where = [&] { return text("byte %zu of a buffer of %zu", i, buffer.bytes); };
        if (cell.writer && cell.writer != own)
            report(write ? "two blocks write to the same place" : "a block reads what another writes", site, thread,
                   [&] { return where() + text(", and block number %u", cell.writer - 1); });
        else if (write && cell.reader && cell.reader != own)
            report("a block writes what another reads", site, thread, where);
        else if (cell.writer == own && !ordered(d, cell.write, warp, lane))
            report(write ? "two threads write to the same place without a barrier between"
                         : "memory is read without a barrier after another thread's write",
                   site, thread, [&] { return where() + with(d, cell.write); });
        else if (write && cell.reader == own && !ordered(d, cell.read, warp, lane))
            report("memory is written without a barrier after another thread's read", site, thread,
                   [&] { return where() + with(d, cell.read); });
        if (write) {
            cell.writer = own, cell.write = mine;
            cell.reader = 0;
        } else {
            const bool together = cell.reader == own && time_of(cell.read) == time_of(mine) &&
                                  warp_of(cell.read) == warp && lane_of(cell.read) != lane;
            cell.read = together ? stamp(time_of(mine), warp, SEVERAL_LANES) : mine;
            cell.reader = cell.reader && cell.reader != own ? SEVERAL_BLOCKS : own;
        }
    }
}

// What else a thread may touch: its stack, what it sees of itself, and the program's constants.
bool own(const Thread& thread, const u8* p, bool write) {
    const u8* const stack = reinterpret_cast<const u8*>(thread.stack);
    if (p >= stack - PAGE && p < stack + STACK) return true;
    const u8* const self = reinterpret_cast<const u8*>(&thread);
    const bool of_itself = p >= self && p < self + sizeof thread;
    const char* const c = reinterpret_cast<const char*>(p);
    const bool of_program = c >= &__executable_start && c < &_end;
    return !write && (of_itself || of_program || p == reinterpret_cast<const u8*>(&current));
}

}  // namespace

Detector* detector_new() {
    return new Detector();
}

void detector_begin_launch(Detector& d, const Launch& launch) {
    d.launch = &launch;
    d.warps = (launch.threads.x * launch.threads.y * launch.threads.z + WARP - 1) / WARP;
    d.readers = d.warps + (d.warps + 3) / 4;
    d.clocks = d.readers + MOST_COPIERS;
    d.shadows.assign(launch.buffers.size(), {});
}

void detector_delete(Detector* d) {
    for (Shadow& shadow : d->shadows)
        if (shadow.cells) munmap(shadow.cells, shadow.bytes);
    delete d;
}

void detector_begin_block(Detector& d) {
    std::memset(d.times, 0, sizeof d.times);
    std::memset(d.met, 0, sizeof d.met);
    std::memset(d.waiting, 0, sizeof d.waiting);
    for (u32 w = 0; w < MOST_WARPS; w++) d.times[w][w] = 1;
    const size_t cells = block->launch->shared_bytes / GRAIN + 1;
    d.writes.assign(cells, 0);
    d.copying.assign(cells, 0);
    d.reads.assign(cells * d.readers, 0);
    d.stores.assign(cells, {});
    std::memset(d.fences, 0, sizeof d.fences);
}

void detector_access_as(Detector& d, u32 thread, const void* at, u32 bytes, bool write, Site site) {
    const u8* const p = static_cast<const u8*>(at);
    Block& b = *block;
    if (p >= b.shared_mapping && p < b.shared_mapping + b.shared_mapping_bytes) {
        if (p < b.shared)
            report("an access before the beginning of shared memory", site, thread, no_details);
        else
            shared_access(d, thread, p - b.shared, bytes, write, site);
        return;
    }
    if (const Buffer* buffer = find(d.launch->buffers, p)) {
        global_access(d, thread, *buffer, d.shadows[buffer - d.launch->buffers.data()], p, bytes, write, site);
        return;
    }
    if (own(b.threads[thread], p, write)) {
        Site product = nullptr;
        if (const char* const wrong = used_by_product(thread, p, write, &product))
            report(wrong, site, thread, [&] { return "the product is at " + place(product); });
        return;
    }
    // It may be some memory of the process that must not be spoilt.
    report("an access where there is no memory", site, thread,
           [&] { return text("%s address %p", write ? "a write to" : "a read of", at); });
    give_up();
}

void detector_access(Detector& d, const void* at, u32 bytes, bool write, Site site) {
    detector_access_as(d, block->now, at, bytes, write, site);
}

void detector_copy_begins(Detector& d, u32 offset, Site site) {
    shared_access(d, block->now, offset, 16, true, site);
    for (u32 cell = offset / GRAIN; cell < (offset + 16) / GRAIN; cell++) d.copying[cell] = 1;
}

void detector_copy_ends(Detector& d, u32 offset) {
    const u32 warp = block->now / WARP;
    for (u32 cell = offset / GRAIN; cell < (offset + 16) / GRAIN; cell++) {
        d.copying[cell] = 0;
        d.writes[cell] = stamp(d.times[warp][warp], warp, block->lane());
    }
}

void detector_tell(Detector& d, Knowledge& knowledge, u32 warp) {
    for (u32 k = 0; k < d.clocks; k++) knowledge.times[k] = std::max(knowledge.times[k], d.times[warp][k]);
    d.times[warp][warp]++;
}

void detector_learn(Detector& d, const Knowledge& knowledge, u32 warp) {
    for (u32 k = 0; k < d.clocks; k++) d.times[warp][k] = std::max(d.times[warp][k], knowledge.times[k]);
    d.times[warp][warp]++;
}

void detector_box_begins(Detector& d, u32 offset, u32 bytes, u32 copier, u32 phase, Site site) {
    shared_access(d, block->now, offset, bytes, true, site);
    for (u32 cell = offset / GRAIN; cell < (offset + bytes) / GRAIN; cell++) {
        d.copying[cell] = 1;
        d.writes[cell] = stamp(phase + 1, d.readers + copier, SEVERAL_LANES);
        d.stores[cell] = {};
    }
}

void detector_box_ends(Detector& d, u32 offset, u32 bytes) {
    for (u32 cell = offset / GRAIN; cell < (offset + bytes) / GRAIN; cell++) d.copying[cell] = 0;
}

void detector_phase(Knowledge& knowledge, const Detector& d, u32 copier, u32 phase) {
    u32& time = knowledge.times[d.readers + copier];
    time = std::max(time, phase + 1);
}

void detector_product_reads(Detector& d, u32 warpgroup, u32 group, u32 offset, Site site) {
    const u32 first = warpgroup * 4;
    for (u32 cell = offset / GRAIN; cell < (offset + 16) / GRAIN; cell++) {
        const auto where = [&] { return text("byte %u of shared memory", cell * GRAIN); };
        const Stamp written = d.writes[cell];
        const auto [writer, fences] = d.stores[cell];
        if (d.copying[cell])
            report("shared memory is used while an asynchronous copy to it is under way", site, where);
        else if (!written)
            report("shared memory is read that nobody has written", site, where);
        else if (writer && fences == d.fences[writer - 1])
            report("a product reads what a thread has written without fence_proxy_async", site,
                   [&] { return where() + text(", thread number %u", writer - 1); });
        for (u32 w = first; written && w < first + 4; w++)
            if (!ordered(d, written, w, SEVERAL_LANES))
                report("shared memory is read without a barrier after another thread's write", site,
                       [&] { return where() + with(d, written); });
        d.reads[cell * d.readers + d.warps + warpgroup] = stamp(group + 1, d.warps + warpgroup, SEVERAL_LANES);
    }
}

void detector_products_done(Detector& d, u32 warp, u32 group) {
    u32& known = d.times[warp][d.warps + warp / 4];
    known = std::max(known, group);
    // What it tells from now on includes this.
    d.times[warp][warp]++;
}

void detector_proxy_fence(Detector& d) {
    d.fences[block->now]++;
}

void detector_warp(Detector& d, u32 warp) {
    d.times[warp][warp]++;
}

void detector_arrive(Detector& d, u32 barrier, u32 warp, bool waits) {
    for (u32 k = 0; k < d.clocks; k++) d.met[barrier][k] = std::max(d.met[barrier][k], d.times[warp][k]);
    if (waits) d.waiting[barrier] |= 1u << warp;
    else d.times[warp][warp]++;
}

void detector_pass(Detector& d, u32 barrier) {
    for (u32 w = 0; w < d.warps; w++) {
        if (!(d.waiting[barrier] >> w & 1)) continue;
        for (u32 k = 0; k < d.clocks; k++) d.times[w][k] = std::max(d.times[w][k], d.met[barrier][k]);
        d.times[w][w]++;
    }
    d.waiting[barrier] = 0;
    std::memset(d.met[barrier], 0, sizeof d.met[barrier]);
}

}  // namespace emulator

// ---- What g++ -fsanitize=thread calls: these functions stand in for its own library, which is not linked ----

namespace {

void plain(const void* at, u32 bytes, bool write, emulator::Site site) {
    emulator::Block* const b = emulator::block;
    if (b && b->running && b->detector) emulator::detector_access(*b->detector, at, bytes, write, site);
}

// An access the compiler takes to be aligned.
void aligned(const void* at, u32 bytes, bool write, emulator::Site site) {
    emulator::Block* const b = emulator::block;
    if (!b || !b->running || !b->detector) return;
    if (reinterpret_cast<u64>(at) % bytes)
        emulator::report("an access whose address is no multiple of its size", site,
                         [&] { return emulator::text("%u bytes", bytes); });
    emulator::detector_access(*b->detector, at, bytes, write, site);
}

}  // namespace

#define HERE __builtin_return_address(0)
#define HOOKS(bytes) \
    extern "C" void __tsan_read##bytes(void* at) { aligned(at, bytes, false, HERE); } \
    extern "C" void __tsan_write##bytes(void* at) { aligned(at, bytes, true, HERE); } \
    extern "C" void __tsan_unaligned_read##bytes(void* at) { plain(at, bytes, false, HERE); } \
    extern "C" void __tsan_unaligned_write##bytes(void* at) { plain(at, bytes, true, HERE); } \
    extern "C" void __tsan_volatile_read##bytes(void* at) { aligned(at, bytes, false, HERE); } \
    extern "C" void __tsan_volatile_write##bytes(void* at) { aligned(at, bytes, true, HERE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) { plain(at, bytes, false, HERE); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { plain(at, bytes, true, HERE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
