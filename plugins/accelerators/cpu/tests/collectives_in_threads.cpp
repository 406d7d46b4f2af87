// The collectives with threads for ranks, so that sanitizers see all sides of the shared memory.
//
// Arguments: number of ranks, and optionally "race" to touch memory without meeting its owner.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../src/drivetrain_cpu/native/collectives.cpp"

using namespace drivetrain;

namespace {

constexpr int64_t kSlot = 8192;

struct World {
  explicit World(int size) : size(size) {
    for (int k = 0; k < size; ++k) {
      const int64_t bytes = kControlBytes + 2 * kSlot;
      segments.push_back(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
      std::memset(segments.back(), 0, bytes);
    }
  }
  ~World() {
    for (void* segment : segments) std::free(segment);
  }
  int size;
  std::vector<void*> segments;
};

void expect(bool fine, const char* what, int rank, int64_t count) {
  if (fine) return;
  std::fprintf(stderr, "%s is wrong on rank %d for %ld elements\n", what, rank, (long)count);
  std::_Exit(3);
}

Request request(uint32_t collective, uint32_t dtype, const void* input, void* output,
                int64_t count) {
  Request r{};
  r.collective = collective;
  r.dtype = dtype;
  r.input = static_cast<const char*>(input);
  r.output = static_cast<char*>(output);
  r.count = count;
  r.input_segment = r.output_segment = -1;
  return r;
}

void run(Group& group, const Request& r, const char* what) {
  int peer = -1;
  const int fault = dt_group_run(&group, &r, &peer);
  expect(fault == kNone, what, group.rank(), r.count);
}

void one_rank(World& world, int rank, std::vector<std::vector<float>>& registered, bool race) {
  std::vector<int> processes(world.size, -1);
  Group group(rank, world.size, world.segments.data(), kSlot, processes.data(), kTogether, 60);
  const float sum = world.size * (world.size + 1) / 2.0f;
  std::vector<char*> starts;
  for (auto& buffer : registered) starts.push_back(reinterpret_cast<char*>(buffer.data()));
  char* const* segment = starts.data();
  for (int64_t n : {1, 100, 5000, 20001}) {
    std::vector<float> data(n, rank + 1.0f), all(n * world.size), part(n);
    run(group, request(kAllReduce, kFloat32, data.data(), data.data(), n), "all-reduce");
    expect(data.front() == sum && data.back() == sum, "all-reduce", rank, n);

    std::vector<float> mine(n, rank + 1.0f);
    run(group, request(kAllGather, kInt8, mine.data(), all.data(), 4 * n), "all-gather");
    expect(all.front() == 1 && all.back() == world.size, "all-gather", rank, n);

    run(group, request(kReduceScatter, kFloat32, all.data(), part.data(), n), "reduce-scatter");
    expect(part.back() == world.size * (rank + 1.0f), "reduce-scatter", rank, n);

    Request broadcast = request(kBroadcast, kInt8, mine.data(), mine.data(), 4 * n);
    broadcast.source = world.size - 1;
    run(group, broadcast, "broadcast");
    expect(mine.back() == world.size, "broadcast", rank, n);

    std::vector<int64_t> sizes(world.size, 4 * n);
    std::vector<float> received(n * world.size);
    std::fill(all.begin(), all.end(), rank + 1.0f);
    Request exchange = request(kAllToAll, kInt8, all.data(), received.data(), 0);
    exchange.sent = exchange.received = sizes.data();
    run(group, exchange, "all-to-all");
    expect(received.front() == 1 && received.back() == world.size, "all-to-all", rank, n);

    std::vector<float>& own = registered[rank];
    std::fill(own.begin(), own.begin() + n, rank + 1.0f);
    Request zero_copy = request(kAllReduce, kFloat32, own.data(), own.data(), n);
    zero_copy.input_segment = zero_copy.output_segment = 0;
    zero_copy.segments = &segment;
    run(group, zero_copy, "registered all-reduce");
    expect(own[0] == sum && own[n - 1] == sum, "registered all-reduce", rank, n);

    // Rank 0 does without registered memory at one of the sizes: the others hope in vain.
    const bool registers = rank > 0 || n != 5000;
    std::fill(own.begin(), own.begin() + n * world.size, rank + 1.0f);
    Request direct = request(kAllToAll, kInt8, own.data(), received.data(), 0);
    direct.input_segment = registers ? 0 : -1;
    direct.segments = &segment;
    direct.sent = direct.received = sizes.data();
    run(group, direct, "registered all-to-all");
    // Whoever is done may use its memory again.
    std::fill(own.begin(), own.end(), 0.0f);
    expect(received.front() == 1 && received.back() == world.size, "registered all-to-all", rank, n);
  }
  // After the last meeting nothing orders the ranks any more.
  if (race) registered[0][0] += 1;
  group.leave();
}

}  // namespace

int main(int argc, char** argv) {
  World world(std::atoi(argv[1]));
  std::vector<std::vector<float>> registered(world.size, std::vector<float>(20001 * world.size));
  std::vector<std::thread> ranks;
  for (int k = 0; k < world.size; ++k) {
    ranks.emplace_back([&, k] {
      one_rank(world, k, registered, argc > 2);
    });
  }
  for (std::thread& rank : ranks) rank.join();
  std::puts("fine");
}
