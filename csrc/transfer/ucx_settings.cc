#include "transfer/ucx_settings.h"

#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace loraserve {

UcxSettings SettingsFor(unsigned major, unsigned minor) {
  UcxSettings settings;
  if (major < 1 || (major == 1 && minor < 19)) {
    settings.transports = "rc,dc,srd";
  }
  return settings;
}

UcxSettings DeviceSettings() { return {.transports = "rc,dc,srd,gdr_copy,cuda_copy"}; }

std::vector<std::pair<std::string, std::string>> UcxEnvironment(const UcxSettings& settings) {
  return {
      {"UCX_TLS", settings.transports},
      {"UCX_PROTO_ENABLE", "y"},
      {"UCX_PROTO_EMULATION_ENABLE", settings.emulation ? "y" : "n"},
      // Without these UCX gives up cma and posix on endpoints whose peer may fail.
      {"UCX_CMA_MEMORY_INVALIDATE", "y"},
      {"UCX_POSIX_ERROR_HANDLING", "y"},
  };
}

bool UcxVariableAllowed(const std::string& name) {
  const std::string_view view = name;
  for (const std::string_view prefix : {"UCX_IB_", "UCX_RC_", "UCX_DC_", "UCX_SRD_", "UCX_UD_"}) {
    if (view.starts_with(prefix)) {
      return true;
    }
  }
  return view == "UCX_NET_DEVICES" || view == "UCX_LOG_LEVEL" || view == "UCX_HANDLE_ERRORS" ||
         view == "UCX_WARN_UNUSED_ENV_VARS";
}

bool ApplyUcxEnvironment(const UcxSettings& settings) {
  const auto wanted = UcxEnvironment(settings);
  std::vector<std::string> removed;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable = *entry;
    const std::string name(variable.substr(0, variable.find('=')));
    if (!name.starts_with("UCX_") || UcxVariableAllowed(name)) {
      continue;
    }
    bool ours = false;
    for (const auto& [key, value] : wanted) {
      ours = ours || key == name;
    }
    if (!ours) {
      removed.push_back(name);
    }
  }
  bool changed = !removed.empty();
  for (const std::string& name : removed) {
    unsetenv(name.c_str());
  }
  for (const auto& [name, value] : wanted) {
    const char* given = std::getenv(name.c_str());
    changed = changed || (given != nullptr && value != given);
    setenv(name.c_str(), value.c_str(), 1);
  }
  return changed;
}

}  // namespace loraserve
