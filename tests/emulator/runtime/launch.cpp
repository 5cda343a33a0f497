// The table of kernels, launches, and what becomes of an access outside all memory.
#include "block.hpp"
#include "detector.hpp"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <signal.h>
#include <ucontext.h>

namespace emulator {

namespace {

// Filled before `main`, by one thread.
std::deque<Entry>& kernels() {
    static std::deque<Entry> all;
    return all;
}
std::deque<u32>& bounds() {
    static std::deque<u32> all;
    return all;
}

// ---- A crash in a kernel ends its launch, not the process ----

struct sigaction before[NSIG];

// Where a crashed fibre goes on: nothing on its stack is needed any more.
void after_crash() {
    give_up();
}

void on_crash(int signal, siginfo_t* info, void* raw) {
    Block* const b = block;
    if (!b || !b->running) {
        // Not a kernel's: whoever was here before is to see it when the instruction is tried again.
        sigaction(signal, &before[signal], nullptr);
        return;
    }
    ucontext_t* const context = static_cast<ucontext_t*>(raw);
    Thread& thread = b->thread();
    b->crash.happened = true;
    b->crash.signal = signal;
    b->crash.address = static_cast<const u8*>(info->si_addr);
    char* const top = thread.stack + STACK - 256;
#if defined(__x86_64__)
    greg_t* const registers = context->uc_mcontext.gregs;
    // Bit 1 of the page fault's code.
    b->crash.write = registers[REG_ERR] >> 1 & 1;
    b->crash.site = reinterpret_cast<Site>(registers[REG_RIP] + 1);
    registers[REG_RIP] = reinterpret_cast<greg_t>(&after_crash);
    registers[REG_RSP] = reinterpret_cast<greg_t>(top) - 8;
#elif defined(__aarch64__)
    b->crash.site = reinterpret_cast<Site>(context->uc_mcontext.pc + 4);
    context->uc_mcontext.pc = reinterpret_cast<u64>(&after_crash);
    context->uc_mcontext.sp = reinterpret_cast<u64>(top);
#else
    (void)top;
    abort();
#endif
}

void catch_crashes() {
    struct sigaction action = {};
    action.sa_sigaction = on_crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, &before[signal]);
}

void report_crash() {
    const Crash& crash = block->crash;
    const Thread& thread = block->thread();
    const char* const p = reinterpret_cast<const char*>(crash.address);
    const char* const what = crash.write ? "a write to" : "a read of";
    const u8* const shared = block->shared_mapping;
    if (crash.signal == SIGFPE) {
        report("a division by zero", crash.site, no_details);
    } else if (crash.signal == SIGILL) {
        report("a trap", crash.site, no_details);
    } else if (p >= thread.stack - PAGE && p < thread.stack) {
        report("a thread's own variables do not fit its stack", crash.site, no_details);
    } else if (crash.address >= shared && crash.address < shared + block->shared_mapping_bytes) {
        const u32 bytes = block->launch->shared_bytes;
        report("an access outside shared memory", crash.site,
               [&] { return text("%s byte %td of %u", what, crash.address - block->shared, bytes); });
    } else if (const Buffer* buffer = find(block->launch->buffers, crash.address)) {
        report("an access outside its buffer", crash.site,
               [&] { return text("%s byte %td of %zu", what, crash.address - buffer->start, buffer->bytes); });
    } else {
        report("an access where there is no memory", crash.site,
               [&] { return text("%s address %p", what, static_cast<const void*>(crash.address)); });
    }
}

// Pointers have to lead somewhere, and stay within.
void check_arguments(Launch& launch, bool before_it) {
    for (u32 i = 0; i < launch.kernel->parameters; i++) {
        if (!launch.kernel->pointers[i]) continue;
        const u8* pointer;
        std::memcpy(&pointer, launch.arguments[i], sizeof pointer);
        if (!pointer) continue;
        const Buffer* const buffer = find(launch.buffers, pointer);
        if (before_it) {
            if (!buffer || pointer < buffer->start || pointer > buffer->start + buffer->bytes)
                launch.faults.push_back(text("argument %u is a pointer to no buffer", i));
        } else if (buffer && !untouched_around(*buffer)) {
            launch.faults.push_back(text("the buffer of argument %u has been written outside its %zu bytes", i,
                                         buffer->bytes));
        }
    }
}

// Blocks, with their stacks and shared memory, are kept for the next launch: as many as ran at once.
std::mutex idle_lock;
std::vector<Block*> idle;

Block* take_block() {
    const std::lock_guard<std::mutex> held(idle_lock);
    if (idle.empty()) return new Block();
    Block* const taken = idle.back();
    idle.pop_back();
    return taken;
}

void give_back(Block* taken) {
    const std::lock_guard<std::mutex> held(idle_lock);
    idle.push_back(taken);
}

std::vector<u32> order_of_blocks(u32 count, const Options& options) {
    std::vector<u32> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (options.order == Order::Down) std::reverse(order.begin(), order.end());
    if (options.order == Order::Random) {
        u64 state = options.seed * 0x9e3779b97f4a7c15 + 1;
        for (u32 i = count; i > 1; i--) {
            state = state * 6364136223846793005 + 1442695040888963407;
            std::swap(order[i - 1], order[(state >> 33) % i]);
        }
    }
    return order;
}

}  // namespace

void add_kernel(const Entry& entry) {
    kernels().push_back(entry);
}

void add_bounds(u32 threads) {
    bounds().push_back(threads);
}

u32 take_bounds() {
    const u32 first = bounds().empty() ? 0 : bounds().front();
    if (!bounds().empty()) bounds().pop_front();
    return first;
}

}  // namespace emulator

// ---- For the Rust side ----

using namespace emulator;

extern "C" size_t emulator_kernels() {
    return kernels().size();
}

extern "C" const Entry* emulator_kernel(size_t index) {
    return &kernels()[index];
}

extern "C" u64 emulator_allocate(size_t bytes) {
    return allocate(bytes);
}

extern "C" void emulator_release(u64 address) {
    release(address);
}

// Carries out a launch; its faults, a line each, or null. The text is the caller's, to give to `free`.
extern "C" char* emulator_launch(const Entry* kernel, const u32* blocks, const u32* threads, u32 shared_bytes,
                                 void** arguments, const Options* options) {
    static std::once_flag once;
    std::call_once(once, catch_crashes);
    Launch launch = {};
    launch.kernel = kernel;
    launch.options = *options;
    launch.blocks = {blocks[0], blocks[1], blocks[2]};
    launch.threads = {threads[0], threads[1], threads[2]};
    launch.shared_bytes = shared_bytes;
    launch.arguments = arguments;
    launch.buffers = all_buffers();
    check_arguments(launch, true);
    if (launch.faults.empty()) {
        block = take_block();
        if (options->detector && kernel->instrumented) {
            block->detector = detector_new();
            detector_begin_launch(*block->detector, launch);
        }
        for (const u32 number : order_of_blocks(blocks[0] * blocks[1] * blocks[2], *options)) {
            const bool good = run_block(launch, number);
            if (block->crash.happened) report_crash();
            if (!good) break;
        }
        if (block->detector) detector_delete(block->detector);
        block->detector = nullptr;
        give_back(block);
        block = nullptr;
        check_arguments(launch, false);
    }
    if (launch.faults.empty()) return nullptr;
    std::string all;
    for (const std::string& fault : launch.faults) all += fault + "\n";
    return strdup(all.c_str());
}
