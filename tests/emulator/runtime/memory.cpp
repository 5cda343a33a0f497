#include "memory.hpp"
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>

namespace emulator {

namespace {

// A device's addresses are multiples of 256, so up to 255 bytes are between a buffer's end and its guard page.
constexpr size_t ALIGN = 256;
constexpr u8 CANARY = 0xa5;

std::mutex lock;
std::map<u64, Buffer>& buffers() {
    static std::map<u64, Buffer> all;
    return all;
}

size_t round_up(size_t bytes, size_t to) {
    return (bytes + to - 1) / to * to;
}

}  // namespace

u8* map_guarded(size_t bytes, size_t align, u8** mapping, size_t* mapping_bytes) {
    const size_t body = round_up(bytes == 0 ? 1 : bytes, PAGE);
    *mapping_bytes = body + 2 * PAGE;
    void* const at = mmap(nullptr, *mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    *mapping = static_cast<u8*>(at);
    if (mprotect(*mapping + PAGE, body, PROT_READ | PROT_WRITE) != 0) {
        munmap(at, *mapping_bytes);
        return nullptr;
    }
    return *mapping + PAGE + body - round_up(bytes, align);
}

u64 allocate(size_t bytes) {
    Buffer buffer = {};
    buffer.start = map_guarded(bytes, ALIGN, &buffer.mapping, &buffer.mapping_bytes);
    if (!buffer.start) return 0;
    buffer.bytes = bytes;
    std::memset(buffer.mapping + PAGE, CANARY, buffer.mapping_bytes - 2 * PAGE);
    std::memset(buffer.start, POISON, bytes);
    const std::lock_guard<std::mutex> held(lock);
    buffers()[reinterpret_cast<u64>(buffer.start)] = buffer;
    return reinterpret_cast<u64>(buffer.start);
}

void release(u64 address) {
    const std::lock_guard<std::mutex> held(lock);
    const auto found = buffers().find(address);
    if (found == buffers().end()) return;
    munmap(found->second.mapping, found->second.mapping_bytes);
    buffers().erase(found);
}

std::vector<Buffer> all_buffers() {
    const std::lock_guard<std::mutex> held(lock);
    std::vector<Buffer> list;
    list.reserve(buffers().size());
    for (const auto& [address, buffer] : buffers()) list.push_back(buffer);
    return list;
}

const Buffer* find(const std::vector<Buffer>& buffers, const void* at) {
    const u8* const p = static_cast<const u8*>(at);
    size_t low = 0, high = buffers.size();
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (buffers[middle].mapping <= p) low = middle + 1;
        else high = middle;
    }
    if (low == 0) return nullptr;
    const Buffer& buffer = buffers[low - 1];
    return p < buffer.mapping + buffer.mapping_bytes ? &buffer : nullptr;
}

bool untouched_around(const Buffer& buffer) {
    const u8* const end = buffer.mapping + buffer.mapping_bytes - PAGE;
    for (const u8* p = buffer.mapping + PAGE; p < buffer.start; p++)
        if (*p != CANARY) return false;
    for (const u8* p = buffer.start + buffer.bytes; p < end; p++)
        if (*p != CANARY) return false;
    return true;
}

}  // namespace emulator
