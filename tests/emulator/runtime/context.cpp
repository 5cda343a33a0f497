#include "context.hpp"
#include <cstdint>

#if defined(__x86_64__)

// Only what a function must preserve has to be kept: six registers and the stack pointer.
extern "C" void emulator_change(void** from, void* to);
asm(R"(
.text
.globl emulator_change
.type emulator_change, @function
emulator_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_change, . - emulator_change
)");

namespace emulator {

void prepare(Context& context, char* bottom, size_t bytes, void (*begin)()) {
    // Six registers, the address `ret` goes to, and a return address of 0 that ends a backtrace. A function
    // expects the stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(bottom + bytes - 16);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(begin);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.stack_pointer = top;
}

void change(Context& from, Context& to) {
    emulator_change(&from.stack_pointer, to.stack_pointer);
}

}  // namespace emulator

#else

namespace emulator {

void prepare(Context& context, char* bottom, size_t bytes, void (*begin)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = bottom;
    context.saved.uc_stack.ss_size = bytes;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, begin, 0);
}

void change(Context& from, Context& to) {
    swapcontext(&from.saved, &to.saved);
}

}  // namespace emulator

#endif
