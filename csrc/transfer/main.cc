// loraserve-transfer: exports a node's host pool and reads other nodes' into it.
//
// Started by the node (loraserve/node/transfer) with the number of a descriptor, one end of a pair
// of Unix sockets; ends when the node closes its side. It holds no secrets and may be killed at any
// time.
#include <ucp/api/ucp.h>

#include "transfer/program.h"

int main(int argc, char** argv) {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned patch = 0;
  ucp_get_version(&major, &minor, &patch);
  return loraserve::RunTransfer(argc, argv, loraserve::SettingsFor(major, minor));
}
