#include "transfer/program.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "transfer/sidecar.h"
#include "transfer/ucx_transport.h"

namespace loraserve {
namespace {

// UCX reads some of the environment as it is loaded, before main.
void CleanEnvironment(char** argv, const UcxSettings& settings) {
  const bool loaded_with_others = ApplyUcxEnvironment(settings);
  // UCX also looks for a ucx.conf in both.
  unsetenv("HOME");
  if (chdir("/") != 0 || loaded_with_others) {
    execv("/proc/self/exe", argv);
    std::perror("loraserve-transfer: exec");
    std::exit(2);
  }
}

}  // namespace

int RunTransfer(int argc, char** argv, const UcxSettings& settings) {
  int socket = -1;
  int domain = 0;
  socklen_t size = sizeof(domain);
  if (argc == 2) {
    const char* const end = argv[1] + std::strlen(argv[1]);
    if (std::from_chars(argv[1], end, socket).ptr != end) {
      socket = -1;
    }
  }
  if (getsockopt(socket, SOL_SOCKET, SO_DOMAIN, &domain, &size) != 0 || domain != AF_UNIX) {
    std::fprintf(stderr, "loraserve-transfer SOCKET: started by loraserve-node, with a socket\n");
    return 2;
  }
  CleanEnvironment(argv, settings);
  fcntl(socket, F_SETFD, FD_CLOEXEC);
  // The terminal's interrupt is the node's business.
  std::signal(SIGINT, SIG_IGN);
  // Where Yama restricts reading to descendants (Ubuntu's default): the sidecars of this user are
  // each other's peers.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  Sidecar sidecar(socket, [&settings] { return UcxTransport::Create(settings); });
  switch (sidecar.Run()) {
    case Sidecar::End::kOk:
      return 0;
    case Sidecar::End::kBadFrame:
      return 3;
    case Sidecar::End::kSocket:
      std::perror("loraserve-transfer: socket");
      return 4;
    case Sidecar::End::kStuck:
      // Destructors would wait for what does not end.
      std::fprintf(stderr, "loraserve-transfer: a closed endpoint did not end its reads\n");
      std::_Exit(5);
  }
  return 1;
}

}  // namespace loraserve
