// Watches every access of an instrumented kernel: is it inside its memory, has what it reads been written, and
// is it ordered with respect to the accesses of other threads?
#pragma once
#include "interface.hpp"

namespace emulator {

struct Detector;
struct Launch;

Detector* detector_new();
void detector_delete(Detector* detector);
void detector_begin_launch(Detector& detector, const Launch& launch);
void detector_begin_block(Detector& detector);

// By the thread that runs, or by another on whose behalf a collective reads.
void detector_access(Detector& detector, const void* at, u32 bytes, bool write, Site site);
void detector_access_as(Detector& detector, u32 thread, const void* at, u32 bytes, bool write, Site site);

// An asynchronous copy of 16 bytes to this offset of shared memory.
void detector_copy_begins(Detector& detector, u32 offset, Site site);
void detector_copy_ends(Detector& detector, u32 offset);

// A warp's __syncwarp.
void detector_warp(Detector& detector, u32 warp);
// A thread of `warp` comes to a barrier; everyone who was to come has come.
void detector_arrive(Detector& detector, u32 barrier, u32 warp, bool waits);
void detector_pass(Detector& detector, u32 barrier);

}  // namespace emulator
