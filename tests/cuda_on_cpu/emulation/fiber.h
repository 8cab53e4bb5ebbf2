// A fiber: a stack of its own and the place where it stopped. Switching costs a dozen instructions on x86-64; elsewhere
// (and with -DCUDA_ON_CPU_UCONTEXT) ucontext does it.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "sanitizers.h"
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr size_t stack_bytes = 64 << 10, guard_bytes = 4 << 10;

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
__attribute__((naked, noipa)) inline void swap_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void* first_context(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + stack_bytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  return top - 6;
}
#else
inline void swap_stacks(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
inline void* first_context(char* stack, void (*entry)()) {
  ucontext_t* c = new (stack) ucontext_t;
  getcontext(c);
  c->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  c->uc_stack.ss_size = stack_bytes - sizeof(ucontext_t);
  makecontext(c, entry, 0);
  return c;
}
#endif

inline std::vector<char*> free_stacks;

inline char* new_stack() {
  if (watches_threads) return static_cast<char*>(std::malloc(stack_bytes));  // new to the sanitizer
  if (free_stacks.empty()) {
    const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, stack_bytes + guard_bytes, protection, flags, -1, 0);
    if (p == MAP_FAILED || mprotect(p, guard_bytes, PROT_NONE)) throw Error("no memory for the stack of a fiber");
    free_stacks.push_back(static_cast<char*>(p) + guard_bytes);
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

inline void free_stack(char* stack) {
  if (watches_threads)
    std::free(stack);
  else
    free_stacks.push_back(stack);
}

}  // namespace cuda_on_cpu
