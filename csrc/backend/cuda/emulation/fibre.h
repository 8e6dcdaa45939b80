// A thread of control with a stack of its own, switched by hand.
#pragma once

#include <cstddef>
#include <memory>

namespace loraserve::emulation {

class Fibre {
 public:
  struct State;

  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes the next Resume() begin `entry` on this fibre's stack; it never returns but by Suspend().
  void Start(void (*entry)());
  // From the host thread: runs the fibre until it suspends.
  void Resume();
  // From the fibre: back to who resumed it.
  void Suspend();

 private:
  std::unique_ptr<State> state_;
};

}  // namespace loraserve::emulation
