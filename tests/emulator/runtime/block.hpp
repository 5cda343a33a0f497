// A block of CUDA threads while it runs, and the launch it is part of.
#pragma once
#include "context.hpp"
#include "interface.hpp"
#include "memory.hpp"
#include <map>
#include <string>
#include <vector>

namespace emulator {

constexpr u32 WARP = 32;
constexpr u32 MOST_THREADS = 1024;
constexpr u32 MOST_WARPS = MOST_THREADS / WARP;
constexpr u32 BARRIERS = 16;
// Four warps that carry out products together.
constexpr u32 WARPGROUP = 4 * WARP;
constexpr u32 MOST_WARPGROUPS = MOST_THREADS / WARPGROUP;
// Barriers in shared memory that tensor copies complete on.
constexpr u32 MOST_COPIERS = 24;
// Whoever acts at times of its own: warps, the matrix units of warpgroups, tensor copies.
constexpr u32 MOST_CLOCKS = MOST_WARPS + MOST_WARPGROUPS + MOST_COPIERS;

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
    // Groups of products that were committed, and whether a fence has begun the next.
    u32 products = 0;
    bool fenced = false;
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

// A copy of a tensor's box that is not done yet.
struct TensorCopy {
    TensorContents tensor;
    u32 to;
    int at[3];
    Site site;
};

// What those who came to a barrier knew of everyone's times.
struct Knowledge {
    u32 times[MOST_CLOCKS] = {};
};

// A barrier in shared memory. Phases are numbered from 0; what is missing is so for the present one.
struct MBarrier {
    u32 arrivals, missing;
    long long missing_bytes;
    u32 phase;
    std::vector<u32> waiting;
    // Of the present phase: copies not done yet, and where all of them write.
    std::vector<TensorCopy> copies;
    std::vector<std::pair<u32, u32>> targets;
    // Whether the thread that made it has not fenced yet.
    bool unfenced;
    u32 maker;
    // Among those that copy, if it does: its clock.
    int copier;
    Knowledge met, passed;
};

// One m64nNk16, from its issue to the wait for it.
struct Product {
    Site site;
    // Of the threads of the warpgroup; what is not a pointer is the same in all.
    ProductOperands operands[WARPGROUP];
    u32 a_registers[WARPGROUP][4];
    // What the accumulators held when they were last known, of all threads; empty if an earlier product tells.
    std::vector<float> accumulators;
    u32 group;
    bool done;
};

struct Warpgroup {
    u32 arrived;
    Product coming;
    std::vector<Product> pending;
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
    // By address.
    std::map<u32, MBarrier> mbarriers;
    Warpgroup warpgroups[MOST_WARPGROUPS];
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
// Leaves the thread that runs, which is ready or has left, for the next one the schedule names.
void run_next(Context& from);

// Carries out what the lanes of a warp have met for.
void perform(Warp& warp, u32 first_thread);

// hopper.cpp. Carries out copies that someone waits for, when nobody else can go on; false if there are none.
bool finish_copies();
// What is wrong with an access to a thread's own variables, if they are operands of a product under way.
const char* used_by_product(u32 thread, const u8* at, bool write, Site* site);
// What is left undone when a thread leaves, and when the block is over.
void leave_products();
void leave_copies();
// Barriers in shared memory that someone waits for, as people describe them.
std::string describe_mbarriers();

// Bottom and size of each fibre's stack; below the bottom is a page out of bounds.
constexpr size_t STACK = 64 << 10;

}  // namespace emulator
