// Several threads read and write several files through one engine; built with sanitizers.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "engine.h"

using namespace drivetrain;

namespace {

constexpr int kCallers = 4, kRounds = 6;
constexpr int64_t kBytes = 5 * 4096 + 123;

// One request from begin to end; answers its error.
int move(Engine& engine, File& file, char* memory, int64_t offset, bool writes, int fault) {
  Request request{&file, memory, offset, kBytes, writes, {fault}};
  engine.submit(&request);
  while (!engine.wait(&request, 0.01)) {
  }
  return request.error;
}

void use(Engine& engine, File& file, int number, bool& fine) {
  std::vector<char> out(kBytes), in(kBytes);
  for (int round = 0; round < kRounds; ++round) {
    std::memset(out.data(), number * kRounds + round, kBytes);
    const int64_t offset = number * (kBytes + 7);
    const int fault = round == 2 ? -1 : 0;  // short
    fine &= move(engine, file, out.data(), offset, true, fault) == 0;
    fine &= move(engine, file, in.data(), offset, false, fault) == 0;
    fine &= in == out;
  }
  fine &= move(engine, file, in.data(), 1 << 30, false, 0) == kEndOfFile;
}

bool run(Kind kind, const char* path) {
  const Options options{8192, kind, 3, 2, 0, 1};
  std::string why;
  const std::unique_ptr<Engine> engine = Engine::make(options, why);
  if (engine == nullptr) {
    std::fprintf(stderr, "skipped: %s\n", why.c_str());
    return true;
  }
  const int buffered = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
  const int direct = open(path, O_RDWR | O_DIRECT);
  File file{direct, buffered};
  bool fine[kCallers] = {true, true, true, true};
  std::vector<std::thread> threads;
  for (int number = 0; number < kCallers; ++number) {
    threads.emplace_back(use, std::ref(*engine), std::ref(file), number, std::ref(fine[number]));
  }
  for (std::thread& each : threads) each.join();
  close(buffered);
  if (direct >= 0) close(direct);
  return fine[0] && fine[1] && fine[2] && fine[3] && engine->latencies().blocks > 0;
}

}  // namespace

int main(int, char** arguments) {
  bool fine = true;
  for (const Kind kind : {kUring, kAio, Kind::kThreads}) fine &= run(kind, arguments[1]);
  std::puts(fine ? "fine" : "wrong");
  return fine ? 0 : 1;
}
