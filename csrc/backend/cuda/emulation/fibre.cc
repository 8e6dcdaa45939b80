#include "backend/cuda/emulation/fibre.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "base/check.h"

#if defined(__SANITIZE_ADDRESS__)
#define LS_FIBRE_ASAN 1
#include <sanitizer/common_interface_defs.h>
#else
#define LS_FIBRE_ASAN 0
#endif

// A switch in user space, where swapcontext asks the kernel about signals each time. Only the
// registers that a call preserves are kept.
#if defined(__x86_64__) && defined(__linux__)
#define LS_FIBRE_ASM 1
extern "C" void ls_fibre_switch(void** save, void* load);
asm(R"(
.text
.globl ls_fibre_switch
.hidden ls_fibre_switch
.type ls_fibre_switch, @function
ls_fibre_switch:
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
.size ls_fibre_switch, .-ls_fibre_switch
)");
#else
#define LS_FIBRE_ASM 0
#endif

namespace loraserve::emulation {

namespace {

constexpr size_t kStackBytes = LS_FIBRE_ASAN ? 256 << 10 : 64 << 10;

}  // namespace

struct Fibre::State {
  std::byte* stack = nullptr;
#if LS_FIBRE_ASM
  void* own = nullptr;
  void* caller = nullptr;
#else
  ucontext_t own;
  ucontext_t caller;
#endif
  void* fake_stack = nullptr;
  void* caller_fake_stack = nullptr;
  const void* caller_stack = nullptr;
  size_t caller_stack_bytes = 0;
  void (*entry)() = nullptr;
};

namespace {

thread_local Fibre::State* starting = nullptr;

[[noreturn]] void Trampoline() {
#if LS_FIBRE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &starting->caller_stack, &starting->caller_stack_bytes);
#endif
  starting->entry();
  LS_CHECK(false);
}

}  // namespace

Fibre::Fibre() : state_(std::make_unique<State>()) {
  // Mapped, not allocated: pages of a stack that are never touched cost nothing.
  void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  LS_CHECK(memory != MAP_FAILED);
  state_->stack = static_cast<std::byte*>(memory);
}

Fibre::~Fibre() { munmap(state_->stack, kStackBytes); }

void Fibre::Start(void (*entry)()) {
  state_->entry = entry;
  state_->fake_stack = nullptr;
#if LS_FIBRE_ASM
  auto* top = reinterpret_cast<void**>(state_->stack + kStackBytes);
  *--top = nullptr;  // where Trampoline would return to; keeps its stack aligned as after a call
  *--top = reinterpret_cast<void*>(&Trampoline);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  state_->own = static_cast<void*>(top);
#else
  getcontext(&state_->own);
  state_->own.uc_stack.ss_sp = state_->stack;
  state_->own.uc_stack.ss_size = kStackBytes;
  state_->own.uc_link = nullptr;
  makecontext(&state_->own, Trampoline, 0);
#endif
}

void Fibre::Resume() {
  starting = state_.get();
#if LS_FIBRE_ASAN
  __sanitizer_start_switch_fiber(&state_->caller_fake_stack, state_->stack, kStackBytes);
#endif
#if LS_FIBRE_ASM
  ls_fibre_switch(&state_->caller, state_->own);
#else
  swapcontext(&state_->caller, &state_->own);
#endif
#if LS_FIBRE_ASAN
  __sanitizer_finish_switch_fiber(state_->caller_fake_stack, nullptr, nullptr);
#endif
}

void Fibre::Suspend() {
#if LS_FIBRE_ASAN
  __sanitizer_start_switch_fiber(&state_->fake_stack, state_->caller_stack,
                                 state_->caller_stack_bytes);
#endif
#if LS_FIBRE_ASM
  ls_fibre_switch(&state_->own, state_->caller);
#else
  swapcontext(&state_->own, &state_->caller);
#endif
#if LS_FIBRE_ASAN
  __sanitizer_finish_switch_fiber(state_->fake_stack, &state_->caller_stack,
                                  &state_->caller_stack_bytes);
#endif
}

}  // namespace loraserve::emulation
