// A fiber: a stack that can be left and entered again. x86-64 switches in a few instructions; elsewhere ucontext does it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace ef::emulation {
inline constexpr size_t kStackBytes = 128 << 10;

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; callee-saved registers lie on the stack

__attribute__((naked, noinline)) inline void switch_context(Context* /*from: rdi*/, Context /*to: rsi*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
      "ret");
}
inline void start_context(Context& context, char* stack, Context&, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t(15));
  *--top = nullptr;  // where `entry` would return to; also keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
inline void enter(Context* from, Context& to) { switch_context(from, to); }
#else
using Context = ucontext_t;
inline void start_context(Context& context, char* stack, Context& after, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = &after;
  makecontext(&context, entry, 0);
}
inline void enter(Context* from, Context& to) { swapcontext(from, &to); }
#endif

// The scheduler's stack as AddressSanitizer knows it; learnt at each entry into a fiber.
struct SchedulerStack {
  const void* bottom = nullptr;
  size_t size = 0;
};
inline SchedulerStack scheduler_stack;

inline void from_scheduler_to(Context* scheduler, Context& fiber, [[maybe_unused]] char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, kStackBytes);
  enter(scheduler, fiber);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  enter(scheduler, fiber);
#endif
}
inline void entered_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack.bottom, &scheduler_stack.size);
#endif
}
inline void from_fiber_to_scheduler(Context* fiber, Context& scheduler, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack.bottom, scheduler_stack.size);
  enter(fiber, scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack.bottom, &scheduler_stack.size);
#else
  enter(fiber, scheduler);
#endif
}
}  // namespace ef::emulation
