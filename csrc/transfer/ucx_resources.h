// What UCX found on this machine, by the names of its transports.
#pragma once

#include <ucp/api/ucp.h>

#include <set>
#include <string>

namespace loraserve {

// False for transports that carry messages only: they read no memory.
bool OneSided(const std::string& name);

// Whether the comma separated allow-list, in the words of UCX_TLS, stands for the transport.
bool AllowedByList(const std::string& list, const std::string& name);

std::set<std::string> UcxResourceNames(ucp_context_h context);

// Comma separated.
std::string JoinedNames(const std::set<std::string>& names);

}  // namespace loraserve
