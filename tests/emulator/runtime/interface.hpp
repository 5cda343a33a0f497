// What a kernel compiled for the CPU asks of the runtime. `emulated.hpp` puts CUDA's words on top.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 x;
};

struct dim3 {
    u32 x = 1, y = 1, z = 1;
};

namespace emulator {

// What the CUDA thread that runs now sees of itself.
struct Built {
    dim3 thread, block, threads, blocks;
    // Its number in the block.
    u32 index;
};

extern thread_local Built* current;

// A place in a kernel: an address of its code, which the Rust side turns into file and line.
typedef const void* Site;

// Instructions that all lanes of a warp carry out together.
enum class Collective : u8 {
    SyncWarp,
    Shuffle,
    Ballot,
    LoadMatrix,
    Multiply,
    ProductsBegin,
    ProductsCommit,
    ProductsWait
};

// One lane's part in it. The pointers are to variables of the lane.
struct Operands {
    const void* in;
    void* out;
    // Shuffle: the lane to read. LoadMatrix: an address in shared memory, and count | transposed << 8.
    u32 first, second;
};

void collective(Collective what, u32 mask, const Operands& operands, Site site);

// Comes to a barrier and, if it `waits`, stays until `threads` have come; 0 are all of the block.
void barrier(u32 id, u32 threads, bool waits, Site site);

void copy_async(u32 to, const void* from, bool filled, Site site);
void copy_commit();
void copy_wait(u32 unfinished, Site site);

// ---- sm_90a: barriers in shared memory, tensor copies, products of a warpgroup ----

void mbarrier_init(u32 at, u32 arrivals, Site site);
void mbarrier_init_fence();
// Arrives and expects so many more bytes.
void mbarrier_arrive(u32 at, u32 bytes, Site site);
void mbarrier_wait(u32 at, u32 parity, Site site);
void proxy_fence();

// What a tensor map holds here; the Rust side makes it. Extents are in elements of two bytes, innermost first; a
// pitch is the bytes from one row (or plane) to the next.
struct TensorContents {
    u64 kind, address, rank, extents[3], pitches[2], box[3];
};
// So that other memory is not taken for one.
constexpr u64 TENSOR_KIND = 0x70616d20726f736e;
void tensor_load(u32 to, const void* map, u32 barrier, const int* at, u32 rank, Site site);

// One thread's part in a product of its warpgroup: m64nNk16 with N columns.
struct ProductOperands {
    float* d;
    u32 columns;
    // Four registers, or null and a descriptor.
    const u32* a_registers;
    u64 a, b;
    bool a_transposed, b_transposed, accumulate;
};
void product(const ProductOperands& operands, Site site);
void products_begin(Site site);
void products_commit(Site site);
void products_wait(u32 unfinished, Site site);

// Where dynamic shared memory begins in the numbers of `sptr`: not at 0, so that who takes an offset for an
// address is found out.
constexpr u32 SHARED_BASE = 1024;
u8* shared_memory();

// Tells of an access the compiler's instrumentation does not see, or which has to be aligned to its size.
void touch(const void* at, u32 bytes, bool write, Site site);

// Runs `change` as one step no other thread can come between.
u32 atomic32(void* at, u32 (*change)(u32 old, u32 operand, u32 other), u32 operand, u32 other, Site site);
u64 atomic64(void* at, u64 (*change)(u64 old, u64 operand, u64 other), u64 operand, u64 other, Site site);

// A kernel as the table of kernels holds it.
struct Entry {
    const char* name;
    // "" or what is wrong with this one.
    const char* fault;
    // Whether it tells the detector of its accesses.
    u32 instrumented;
    // The most threads of a block, of its KERNEL(threads).
    u32 threads;
    u32 parameters;
    // Per parameter: whether it is a pointer.
    const u8* pointers;
    void (*call)(void* function, void** arguments);
    void* function;
};

void add_kernel(const Entry& entry);
void add_bounds(u32 threads);
u32 take_bounds();

// KERNEL(threads) and EXPORT_KERNEL(name) are read in this order, in each file.
struct Bounds {
    explicit Bounds(u32 threads) { add_bounds(threads); }
};

template <class... A> struct IsPointer {
    static constexpr u8 list[sizeof...(A) + 1] = {(static_cast<u8>(std::is_pointer<A>::value))..., 0};
};

// Arguments are no memory of the kernel's.
#define UNWATCHED __attribute__((no_sanitize("thread")))

template <class... A, size_t... I>
UNWATCHED void call_with(void (*function)(A...), void** arguments, std::index_sequence<I...>) {
    function(*static_cast<A*>(arguments[I])...);
}

template <class... A> UNWATCHED void call(void* function, void** arguments) {
    call_with(reinterpret_cast<void (*)(A...)>(function), arguments, std::index_sequence_for<A...>());
}

struct Kernel {
    template <class... A> Kernel(const char* name, const char* fault, bool instrumented, void (*function)(A...)) {
        add_kernel({name, fault, instrumented, take_bounds(), sizeof...(A), IsPointer<A...>::list, &call<A...>,
                    reinterpret_cast<void*>(function)});
    }
};

}  // namespace emulator
