// Many tensors in one launch: they are cut into pieces of 2,048 elements, tensor by tensor, and a block works on
// one piece. The table of pieces is made once, when the tensors' lengths are known.
#pragma once
#include "dev.cuh"

constexpr int PIECE_THREADS = 256;
constexpr int PIECE = PIECE_THREADS * 8;

// Elements PIECE * index .. of a tensor.
struct Piece {
    u32 tensor, index;
};

// Where this thread's eight elements start in the tensor of its piece.
DEV size_t eight_of_piece(Piece piece) { return (size_t)piece.index * PIECE + threadIdx.x * 8; }
