// The program loraserve-transfer, but for the transports that it may use.
#pragma once

#include "transfer/ucx_settings.h"

namespace loraserve {

// What main does: argv[1] is the number of a descriptor, one end of a pair of Unix sockets. Returns
// the exit status: 0 after the node closed its end, 2 where it was started wrongly, 3 after what
// was no message, 4 where the socket fails, 5 where a read could not be ended.
int RunTransfer(int argc, char** argv, const UcxSettings& settings);

}  // namespace loraserve
