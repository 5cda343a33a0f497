// Switching between stacks. A CUDA thread is a fibre: a stack and the place where it left off.
#pragma once
#include <cstddef>

#if defined(__x86_64__)
namespace emulator {
struct Context {
    void* stack_pointer = nullptr;
};
}
#else
#include <ucontext.h>
namespace emulator {
struct Context {
    ucontext_t saved;
};
}
#endif

namespace emulator {

// Makes `context` start with `begin`, which never returns, on the stack that ends at `top`.
void prepare(Context& context, char* bottom, size_t bytes, void (*begin)());

// Leaves the present stack, noted in `from`, for `to`.
void change(Context& from, Context& to);

}  // namespace emulator
