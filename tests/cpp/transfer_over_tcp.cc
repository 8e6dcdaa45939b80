// loraserve-transfer as it must never be: reading over TCP, where a peer can stand still in the
// middle of a read. For tests of deadlines and forced closes, on loopback only; never part of a
// wheel.
#include "transfer/program.h"

int main(int argc, char** argv) {
  return loraserve::RunTransfer(argc, argv, {.transports = "tcp", .emulation = true});
}
