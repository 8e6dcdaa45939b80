// What the sidecar adds to a read: one-sided gets between two processes by UcxTransport, without
// the node and its messages, beside memcpy. Argument: KiB. Counters: bandwidth, and CPU seconds for
// each GB of this process alone; the holder's are printed at the end.
#include <benchmark/benchmark.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/check.h"
#include "transfer/ucx_transport.h"

namespace loraserve {
namespace {

constexpr size_t kBytes = 256 << 20;
constexpr uint64_t kPiece = 16 << 20;

double CpuSeconds(int who) {
  rusage usage{};
  getrusage(who, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

uint8_t* Memory(int fill) {
  // Shared memory on a huge page's boundary, as the host pool is mapped.
  constexpr size_t kHuge = 2 << 20;
  const int fd = memfd_create("bench", 0);
  LS_CHECK(fd >= 0 && ftruncate(fd, kBytes) == 0);
  auto* room = static_cast<uint8_t*>(
      mmap(nullptr, kBytes + kHuge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  uint8_t* aligned = room + (kHuge - reinterpret_cast<uintptr_t>(room) % kHuge);
  void* data = mmap(aligned, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  LS_CHECK(data != MAP_FAILED);
  close(fd);
  madvise(data, kBytes, MADV_HUGEPAGE);
  std::memset(data, fill, kBytes);
  return static_cast<uint8_t*>(data);
}

std::unique_ptr<UcxTransport> Open(const UcxSettings& settings) {
  auto made = UcxTransport::Create(settings);
  if (!made.ok()) {
    std::fprintf(stderr, "no transport: %s\n", made.status().message().c_str());
    std::exit(1);
  }
  return std::move(made.value());
}

void Sleep(UcxTransport& transport, int stop) {
  pollfd waits[] = {{transport.event_fd(), POLLIN, 0}, {stop, POLLIN, 0}};
  poll(waits, 2, transport.Progress() ? 0 : transport.SleepMs());
}

// The holder, a process of its own until `stop` closes: its description goes to `out`.
void Hold(int out, int stop) {
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  std::unique_ptr<UcxTransport> transport = Open({});
  uint8_t* memory = Memory(7);
  const ExportedMemory exported = transport->Export(memory, kBytes).value();
  const auto put = [out](std::string_view bytes) {
    const auto size = static_cast<uint32_t>(bytes.size());
    LS_CHECK(write(out, &size, sizeof(size)) == sizeof(size));
    LS_CHECK(write(out, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  };
  put(transport->worker_address());
  put(exported.rkey);
  put({reinterpret_cast<const char*>(&exported.address), sizeof(exported.address)});
  pollfd ended{stop, POLLIN, 0};
  while (poll(&ended, 1, 0) == 0) {
    Sleep(*transport, stop);
  }
}

struct Lane {
  std::unique_ptr<UcxTransport> transport;
  std::shared_ptr<RemoteMemory> memory;
  uint64_t address = 0;
  uint8_t* into = nullptr;
  pid_t holder = 0;
  int stop = -1;
};

Lane* lane;

std::string Take(int in) {
  uint32_t size = 0;
  LS_CHECK(read(in, &size, sizeof(size)) == sizeof(size) && size < (64 << 10));
  std::string bytes(size, 0);
  LS_CHECK(read(in, bytes.data(), size) == static_cast<ssize_t>(size));
  return bytes;
}

void Start() {
  int description[2];
  int stop[2];
  LS_CHECK(pipe(description) == 0 && pipe(stop) == 0);
  static Lane made;
  made.holder = fork();
  if (made.holder == 0) {
    close(stop[1]);
    Hold(description[1], stop[0]);
    std::_Exit(0);
  }
  close(description[1]);
  close(stop[0]);
  made.stop = stop[1];
  const std::string worker_address = Take(description[0]);
  const std::string rkey = Take(description[0]);
  std::memcpy(&made.address, Take(description[0]).data(), sizeof(made.address));
  made.transport = Open({});
  made.into = Memory(1);
  LS_CHECK(made.transport->RegisterLocal(made.into, kBytes).ok());
  made.memory = made.transport->Open(worker_address, rkey).value();
  lane = &made;
}

void Report(benchmark::State& state, uint64_t bytes, double cpu_before) {
  const double gigabytes =
      static_cast<double>(bytes) * static_cast<double>(state.iterations()) / 1e9;
  state.SetBytesProcessed(static_cast<int64_t>(bytes) * state.iterations());
  state.counters["cpu_s_per_GB"] = (CpuSeconds(RUSAGE_SELF) - cpu_before) / gigabytes;
}

void Get(benchmark::State& state) {
  const uint64_t bytes = static_cast<uint64_t>(state.range(0)) << 10;
  const double before = CpuSeconds(RUSAGE_SELF);
  for (auto _ : state) {
    uint64_t issued = 0;
    uint64_t arrived = 0;
    uint64_t outstanding = 0;
    while (arrived < bytes) {
      while (issued < bytes && outstanding < 4) {
        const uint64_t piece = std::min(kPiece, bytes - issued);
        ++outstanding;
        lane->memory->Get(lane->address + issued, lane->into + issued, piece,
                          [&, piece](GetOutcome outcome, const std::string&) {
                            LS_CHECK(outcome == GetOutcome::kDone);
                            arrived += piece;
                            --outstanding;
                          });
        issued += piece;
      }
      if (!lane->transport->Progress() && arrived < bytes) {
        Sleep(*lane->transport, -1);
      }
    }
  }
  LS_CHECK(lane->into[bytes - 1] == 7);
  Report(state, bytes, before);
}

void Memcpy(benchmark::State& state) {
  static uint8_t* const from = Memory(5);
  const uint64_t bytes = static_cast<uint64_t>(state.range(0)) << 10;
  const double before = CpuSeconds(RUSAGE_SELF);
  for (auto _ : state) {
    std::memcpy(lane->into, from, bytes);
    benchmark::ClobberMemory();
  }
  Report(state, bytes, before);
}

BENCHMARK(Memcpy)->RangeMultiplier(4)->Range(64, 256 << 10)->UseRealTime();
BENCHMARK(Get)->RangeMultiplier(4)->Range(64, 256 << 10)->UseRealTime();

}  // namespace
}  // namespace loraserve

int main(int argc, char** argv) {
  if (loraserve::ApplyUcxEnvironment({})) {
    std::fprintf(stderr, "unset UCX_* first\n");
    return 1;
  }
  benchmark::Initialize(&argc, argv);
  loraserve::Start();
  benchmark::RunSpecifiedBenchmarks();
  loraserve::lane->memory.reset();
  loraserve::lane->transport.reset();
  close(loraserve::lane->stop);
  waitpid(loraserve::lane->holder, nullptr, 0);
  std::printf("holder: %.3f s of CPU in all, its start and filling its memory included\n",
              loraserve::CpuSeconds(RUSAGE_CHILDREN));
  return 0;
}
