// What a warp does together, with the layouts of the registers as the PTX ISA manual draws them.
#include "block.hpp"
#include "detector.hpp"
#include <cstring>

namespace emulator {

namespace {

bool missing_lanes(const Warp& warp, const char* instruction) {
    if (warp.alive == 0xffffffffu) return false;
    report("a warp without all its lanes", warp.site, [&] { return text("%s, lanes %08x", instruction, warp.alive); });
    return true;
}

void shuffle(Warp& warp) {
    for (u32 lane = 0; lane < WARP; lane++) {
        if (!(warp.arrived >> lane & 1)) continue;
        const Operands& to = warp.operands[lane];
        if (warp.arrived >> to.first & 1) {
            std::memcpy(to.out, warp.operands[to.first].in, 4);
            continue;
        }
        std::memset(to.out, POISON, 4);
        report("a shuffle reads a lane that has left", warp.site, [&] { return text("lane %u", to.first); });
    }
}

void ballot(Warp& warp) {
    u32 votes = 0;
    for (u32 lane = 0; lane < WARP; lane++) {
        if (!(warp.arrived >> lane & 1)) continue;
        int vote;
        std::memcpy(&vote, warp.operands[lane].in, sizeof vote);
        votes |= static_cast<u32>(vote != 0) << lane;
    }
    for (u32 lane = 0; lane < WARP; lane++)
        if (warp.arrived >> lane & 1) std::memcpy(warp.operands[lane].out, &votes, sizeof votes);
}

void load_matrix(Warp& warp, u32 first_thread) {
    const u32 count = warp.operands[0].second & 0xff;
    const bool transposed = warp.operands[0].second >> 8;
    const u32 shared_bytes = block->launch->shared_bytes;
    if (missing_lanes(warp, "ldmatrix")) return;
    // Rows of 8 elements, one address each.
    u16 elements[4][8][8];
    for (u32 row = 0; row < 8 * count; row++) {
        const u32 address = warp.operands[row].first, offset = address - SHARED_BASE;
        if (address % 16 || address < SHARED_BASE || offset + 16 > shared_bytes) {
            report("ldmatrix of an address outside shared memory or no multiple of 16", warp.site, first_thread + row,
                   [&] { return text("byte %d of %u", static_cast<int>(offset), shared_bytes); });
            std::memset(elements[row / 8][row % 8], POISON, 16);
            continue;
        }
        if (block->detector)
            detector_access_as(*block->detector, first_thread + row, block->shared + offset, 16, false, warp.site);
        std::memcpy(elements[row / 8][row % 8], block->shared + offset, 16);
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        u32 out[4];
        const u32 row = lane / 4, column = lane % 4 * 2;
        for (u32 i = 0; i < count; i++) {
            const u16 low = transposed ? elements[i][column][row] : elements[i][row][column];
            const u16 high = transposed ? elements[i][column + 1][row] : elements[i][row][column + 1];
            out[i] = low | static_cast<u32>(high) << 16;
        }
        std::memcpy(warp.operands[lane].out, out, 4 * count);
    }
}

float widen(u32 bits) {
    const u32 f = bits << 16;
    float value;
    std::memcpy(&value, &f, sizeof value);
    return value;
}

// The products are exact in f32; they are added one by one, rounding each time. Tensor cores add with a few
// bits more or less: no test may depend on the last bits.
void multiply(Warp& warp) {
    if (missing_lanes(warp, "mma")) return;
    float a[16][16], b[16][8], d[16][8];
    for (u32 lane = 0; lane < WARP; lane++) {
        const u32 g = lane / 4, t = lane % 4 * 2;
        u32 in[6];
        float out[4];
        std::memcpy(in, warp.operands[lane].in, sizeof in);
        std::memcpy(out, warp.operands[lane].out, sizeof out);
        for (u32 half = 0; half < 2; half++) {
            a[g][t + half] = widen(in[0] >> 16 * half);
            a[g + 8][t + half] = widen(in[1] >> 16 * half);
            a[g][t + 8 + half] = widen(in[2] >> 16 * half);
            a[g + 8][t + 8 + half] = widen(in[3] >> 16 * half);
            b[t + half][g] = widen(in[4] >> 16 * half);
            b[t + 8 + half][g] = widen(in[5] >> 16 * half);
            d[g][t + half] = out[half];
            d[g + 8][t + half] = out[2 + half];
        }
    }
    for (u32 row = 0; row < 16; row++)
        for (u32 k = 0; k < 16; k++)
            for (u32 column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (u32 lane = 0; lane < WARP; lane++) {
        const u32 g = lane / 4, t = lane % 4 * 2;
        const float out[4] = {d[g][t], d[g][t + 1], d[g + 8][t], d[g + 8][t + 1]};
        std::memcpy(warp.operands[lane].out, out, sizeof out);
    }
}

}  // namespace

void perform(Warp& warp, u32 first_thread) {
    switch (warp.what) {
        case Collective::SyncWarp:
            if (block->detector) detector_warp(*block->detector, first_thread / WARP);
            break;
        case Collective::Shuffle: shuffle(warp); break;
        case Collective::Ballot: ballot(warp); break;
        case Collective::LoadMatrix: load_matrix(warp, first_thread); break;
        case Collective::Multiply: multiply(warp); break;
        // What they do, each lane does for itself when it goes on.
        case Collective::ProductsBegin: missing_lanes(warp, "wgmma_fence"); break;
        case Collective::ProductsCommit: missing_lanes(warp, "wgmma_commit"); break;
        case Collective::ProductsWait: missing_lanes(warp, "wgmma_wait"); break;
    }
    for (u32 lane = 0; lane < WARP; lane++)
        if (warp.arrived >> lane & 1) make_ready(first_thread + lane);
    warp.arrived = 0;
}

}  // namespace emulator
