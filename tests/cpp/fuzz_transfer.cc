// What the sidecar reads from others, mutated at random: requests of a node and blobs of a peer.
// Checks that the readers stay within bounds, never take more than is there and end every stream.
// Run under ASAN and UBSAN: fuzz_transfer ROUNDS.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "base/check.h"
#include "transfer/envelope.h"
#include "transfer/messages.h"
#include "transfer/remote_read.h"
#include "transfer/wire.h"

using namespace loraserve;

namespace {

std::string Frame(uint8_t type, uint64_t id, const std::string& body) {
  WireWriter head;
  head.U16(kFrameMagic);
  head.U8(kProtocolVersion);
  head.U8(type);
  head.U32(static_cast<uint32_t>(body.size()));
  head.U64(id);
  return head.Take() + body;
}

std::string Draw(std::mt19937_64& random) {
  WireWriter body;
  switch (random() % 6) {
    case 0:
      body.U64(random());
      return Frame(1, random(), body.Take());
    case 1:
      body.U64(random());
      body.U64(random());
      return Frame(2, random(), body.Take());
    case 2:
      body.U64(random());
      return Frame(3, random(), body.Take());
    case 3:
      for (int i = 0; i < 6; ++i) {
        body.U64(random() >> (random() % 64));
      }
      body.U32(random() % 2 == 0 ? 64 : static_cast<uint32_t>(random()));
      body.Bytes(WrapBlob(BlobKind::kWorkerAddress, std::string(random() % 300, 'w')));
      body.Bytes(WrapBlob(BlobKind::kRemoteKey, std::string(random() % 60, 'k')));
      return Frame(4, random(), body.Take());
    default:
      return Frame(static_cast<uint8_t>(5 + random() % 2), random(), "");
  }
}

void Mutate(std::mt19937_64& random, std::string* bytes) {
  for (uint64_t n = random() % 4; n-- > 0 && !bytes->empty();) {
    const size_t at = random() % bytes->size();
    switch (random() % 3) {
      case 0:
        (*bytes)[at] = static_cast<char>(random());
        break;
      case 1:
        bytes->erase(at, random() % 20);
        break;
      default:
        bytes->insert(at, random() % 20, static_cast<char>(random()));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  std::mt19937_64 random(7);
  uint64_t taken = 0;
  uint64_t refused = 0;
  uint64_t unwrapped = 0;
  for (uint64_t round = 0; round < rounds; ++round) {
    std::string stream;
    for (uint64_t n = 1 + random() % 3; n-- > 0;) {
      stream += Draw(random);
    }
    Mutate(random, &stream);
    stream.shrink_to_fit();
    while (true) {
      const size_t before = stream.size();
      Result<std::optional<RequestFrame>> result = TakeRequest(&stream);
      if (!result.ok()) {
        ++refused;
        break;
      }
      if (!result.value()) {
        LS_CHECK(stream.size() == before);
        break;
      }
      LS_CHECK(stream.size() + kFrameHeadBytes <= before);
      ++taken;
      if (const auto* read = std::get_if<ReadRequest>(&result.value()->request)) {
        (void)CheckReadRequest(*read, 1 << 30).ok();
        unwrapped += UnwrapBlob(BlobKind::kWorkerAddress, read->worker_address).ok();
        unwrapped += UnwrapBlob(BlobKind::kRemoteKey, read->rkey).ok();
      }
    }
  }
  std::printf("%lu requests taken, %lu streams refused, %lu blobs unwrapped\n",
              static_cast<unsigned long>(taken), static_cast<unsigned long>(refused),
              static_cast<unsigned long>(unwrapped));
  LS_CHECK(taken > rounds / 4 && refused > rounds / 20 && unwrapped > rounds / 20);
  return 0;
}
