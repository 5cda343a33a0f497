// Watches every access of an instrumented kernel: is it inside its memory, has what it reads been written, and
// is it ordered with respect to the accesses of other threads?
#pragma once
#include "interface.hpp"

namespace emulator {

struct Detector;
struct Launch;
struct Knowledge;

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

// A thread of `warp` tells those who will learn from `knowledge` all it knows; a thread of `warp` learns.
void detector_tell(Detector& detector, Knowledge& knowledge, u32 warp);
void detector_learn(Detector& detector, const Knowledge& knowledge, u32 warp);

// A tensor copy to this part of shared memory, complete with the phase `phase` of copier `copier`.
void detector_box_begins(Detector& detector, u32 offset, u32 bytes, u32 copier, u32 phase, Site site);
void detector_box_ends(Detector& detector, u32 offset, u32 bytes);
void detector_phase(Knowledge& knowledge, const Detector& detector, u32 copier, u32 phase);

// The matrix unit of a warpgroup reads 16 bytes for its group `group` of products.
void detector_product_reads(Detector& detector, u32 warpgroup, u32 group, u32 offset, Site site);
// A thread of `warp` has waited for all groups of its warpgroup before `group`.
void detector_products_done(Detector& detector, u32 warp, u32 group);

// Fences between ordinary accesses and those of copies and products, by the thread that runs.
void detector_proxy_fence(Detector& detector);

}  // namespace emulator
