// Device memory: each buffer ends at a page nobody may touch.
#pragma once
#include "interface.hpp"
#include <vector>

namespace emulator {

struct Buffer {
    // Of the whole mapping, its first and last page out of bounds.
    u8* mapping;
    size_t mapping_bytes;
    // What the kernel was given.
    u8* start;
    size_t bytes;
};

constexpr size_t PAGE = 4096;
// What never-written memory holds: a NaN as bf16 and f32, -1 as an integer.
constexpr u8 POISON = 0xff;

u64 allocate(size_t bytes);
void release(u64 address);

// All buffers there are, in the order of their addresses.
std::vector<Buffer> all_buffers();

// The one whose mapping holds `at`, or none.
const Buffer* find(const std::vector<Buffer>& buffers, const void* at);

// Whether the bytes around the buffer, up to its pages' ends, are as they were.
bool untouched_around(const Buffer& buffer);

// `bytes` bytes between two pages out of bounds; they end at the second up to a multiple of `align`.
u8* map_guarded(size_t bytes, size_t align, u8** mapping, size_t* mapping_bytes);

}  // namespace emulator
