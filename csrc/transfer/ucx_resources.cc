#include "transfer/ucx_resources.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>

namespace loraserve {

bool OneSided(const std::string& name) {
  return name.starts_with("rc_") || name.starts_with("dc_") || name == "srd" || name == "cma";
}

bool AllowedByList(const std::string& list, const std::string& name) {
  // "rc" is rc_verbs and rc_mlx5, with ud to connect them.
  std::istringstream allowed(list);
  for (std::string entry; std::getline(allowed, entry, ',');) {
    if (name == entry || name.starts_with(entry + "_") ||
        (entry == "rc" && name.starts_with("ud_"))) {
      return true;
    }
  }
  return false;
}

// "#  resource 1  :  md 1  dev 0  flags -- cma/memory" and the like; UCP has no call for it.
std::set<std::string> UcxResourceNames(ucp_context_h context) {
  char* text = nullptr;
  size_t size = 0;
  FILE* out = open_memstream(&text, &size);
  if (out == nullptr) {
    return {};
  }
  ucp_context_print_info(context, out);
  std::fclose(out);
  std::istringstream lines(std::string(text, size));
  std::free(text);
  std::set<std::string> names;
  for (std::string line; std::getline(lines, line);) {
    const size_t slash = line.rfind('/');
    const size_t blank = line.rfind(' ', slash);
    if (line.find("resource ") != std::string::npos && slash != std::string::npos &&
        blank != std::string::npos) {
      names.insert(line.substr(blank + 1, slash - blank - 1));
    }
  }
  return names;
}

std::string JoinedNames(const std::set<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) {
    joined += (joined.empty() ? "" : ",") + name;
  }
  return joined;
}

}  // namespace loraserve
