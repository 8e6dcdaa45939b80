// What UCX may do in this process. Set in code: neither the environment nor a ucx.conf widens it.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace loraserve {

struct UcxSettings {
  // The whole allow-list. RDMA (rc, dc, EFA's srd) and, on the same host, cma; posix only carries
  // what cma needs to connect (UCX wants a lane for messages on every endpoint).
  std::string transports = "rc,dc,srd,cma,posix";
  // Reads that no transport can do natively are refused. With true UCX would let the peer's CPU
  // copy: slow, and for tests only.
  bool emulation = false;
};

// For reads into device memory, within the node: RDMA, and what lets a transport touch a GPU's
// memory. No cma and no posix, which read host memory alone.
UcxSettings DeviceSettings();

// The product's, for a release of UCX. Before 1.19 cma is left out: a peer that dies leaves the
// read hanging, and closing the endpoint aborts the process (measured with 1.13.1).
UcxSettings SettingsFor(unsigned major, unsigned minor);

// Names of the environment, with "UCX_", and values, in force over everything a user gave.
std::vector<std::pair<std::string, std::string>> UcxEnvironment(const UcxSettings& settings);

// True where the variable may be the user's own: it tunes or picks hardware and cannot add a
// transport.
bool UcxVariableAllowed(const std::string& name);

// Makes the environment of this process so: every other variable of UCX goes. Returns whether the
// user had given one that had to go or to change: UCX reads some as it is loaded, so exec again.
bool ApplyUcxEnvironment(const UcxSettings& settings);

}  // namespace loraserve
