// A block of CUDA threads while it runs, and the launch it is part of.
#pragma once
#include "context.hpp"
#include "interface.hpp"
#include "memory.hpp"
#include <string>
#include <vector>

namespace emulator {

constexpr u32 WARP = 32;
constexpr u32 MOST_THREADS = 1024;
constexpr u32 MOST_WARPS = MOST_THREADS / WARP;
constexpr u32 BARRIERS = 16;

enum class Order : u32 { Up, Down, Random };

// How a launch is carried out. The layout is the Rust side's.
struct Options {
    Order order;
    u32 late_copies;
    u32 detector;
    u32 unused;
    u64 seed;
};

struct Copy {
    u32 to;
    const void* from;
    bool filled;
    // Groups of a thread are numbered from 0.
    u32 group;
    Site site;
};

enum class State : u8 { Ready, Waiting, Left };

struct Thread : Built {
    Context context;
    char* stack = nullptr;
    State state = State::Left;
    // Where a waiting thread waits, and for what.
    Site waits_at = nullptr;
    const char* waits_for = "";
    // Asynchronous copies not done yet, oldest first, and the group of those to come.
    std::vector<Copy> copies;
    u32 group = 0;
};

// A warp's meeting at a collective.
struct Warp {
    Collective what;
    Site site;
    // Lanes that have come and lanes that have not left.
    u32 arrived, alive;
    Operands operands[WARP];
};

struct Barrier {
    // Threads that have come and that are needed.
    u32 arrived, needed;
    Site site;
    std::vector<u32> waiting;
    // Which threads have come.
    u64 here[MOST_THREADS / 64];
};

struct Detector;

// One launch, on one thread of the CPU.
struct Launch {
    const Entry* kernel;
    Options options;
    dim3 blocks, threads;
    u32 shared_bytes;
    void** arguments;
    // As they were at the launch.
    std::vector<Buffer> buffers;
    // What was found: a text for people, in which @{hex} is a place in the code.
    std::vector<std::string> faults;
    // So that each is told once per place.
    std::vector<std::pair<std::string, Site>> told;
};

// What ended a block before its time.
struct Crash {
    bool happened;
    int signal;
    bool write;
    const u8* address;
    Site site;
};

struct Block {
    Launch* launch = nullptr;
    u32 number = 0;
    u32 count = 0;
    u32 live = 0;
    std::vector<Thread> threads;
    Warp warps[MOST_WARPS];
    Barrier barriers[BARRIERS];
    // Of the thread that runs; `running` says whether one does.
    u32 now = 0;
    bool running = false;
    // The launch is to end: a fault after which nothing sensible can follow.
    bool broken = false;
    Crash crash = {};
    u64 ready[MOST_THREADS / 64] = {};
    u64 random = 0;
    Context main;
    u8 *shared = nullptr, *shared_mapping = nullptr;
    size_t shared_mapping_bytes = 0;
    Detector* detector = nullptr;

    Thread& thread() { return threads[now]; }
    Warp& warp() { return warps[now / WARP]; }
    u32 lane() const { return now % WARP; }
};

// The block this thread of the CPU runs, if any.
extern thread_local Block* block;

// Runs block `number`; false if the launch has to end.
bool run_block(Launch& launch, u32 number);

// Whether this kind of fault has not been told yet for this place; it counts as told from now on.
bool first_time(const char* kind, Site site);
void tell(const char* kind, Site site, u32 thread, const std::string& details);
// A fault of `thread`, told once per kind and place. `details()` is asked for only then: a race may be met a
// million times.
template <class F> void report(const char* kind, Site site, u32 thread, F details) {
    if (first_time(kind, site)) tell(kind, site, thread, details());
}
// Of the thread that runs.
template <class F> void report(const char* kind, Site site, F details) {
    report(kind, site, block->now, details);
}
inline std::string no_details() {
    return "";
}
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place(Site site);

// Ends the block, and the launch with it. Called on a fibre.
[[noreturn]] void give_up();

void make_ready(u32 thread);
// Runs others until someone makes this thread ready.
void wait_for(const char* what, Site site);

// Carries out what the lanes of a warp have met for.
void perform(Warp& warp, u32 first_thread);

// Bottom and size of each fibre's stack; below the bottom is a page out of bounds.
constexpr size_t STACK = 64 << 10;

}  // namespace emulator
