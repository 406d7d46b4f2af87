// Lists of calls by a team, for the thread sanitizer; results must be those of one thread.
//
// Argument: optionally "race", to let two teams' calls write one tensor.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../src/drivetrain_cpu/native/decoder.cpp"
#include "../src/drivetrain_cpu/native/program.cpp"

using namespace drivetrain;

namespace {

constexpr int64_t kRows = 203, kDim = 40;  // no multiple of what a thread takes at once
constexpr int kRounds = 300;

// Two norms, one of them with a sum, and a gated activation of what they made.
struct Chain {
  std::vector<float> residual, delta, weight, normed, gated;
  Norm first, second;
  Gated gate;

  explicit Chain(int threads)
      : residual(kRows * kDim), delta(kRows * kDim, 0.5f), weight(kDim, 1.5f),
        normed(kRows * kDim), gated(kRows * kDim / 2) {
    for (int64_t i = 0; i < kRows * kDim; ++i) residual[i] = 0.25f + static_cast<float>(i % 97) / 9;
    first = {residual.data(), nullptr, weight.data(), delta.data(), kRows, kDim, 1e-5f, kFloat32,
             threads};
    second = {residual.data(), delta.data(), weight.data(), normed.data(), kRows, kDim, 1e-5f,
              kFloat32, threads};
    gate = {normed.data(), gated.data(), kRows, kDim / 2, kSilu, kFloat32, threads};
  }

  void run(int threads) {
    const Call calls[] = {{dt_add_rms_norm, &first}, {dt_add_rms_norm, &second},
                          {dt_gated_activation, &gate}};
    for (int round = 0; round < kRounds; ++round) {
      if (dt_run(calls, 3, threads) != 0) std::_Exit(2);
    }
  }
};

void must_equal(const Chain& one, const Chain& other, const char* what) {
  if (one.gated == other.gated && one.residual == other.residual) return;
  std::fprintf(stderr, "%s: results depend on the threads\n", what);
  std::_Exit(3);
}

}  // namespace

int main(int argc, char**) {
  Chain alone(1), by_four(4), by_two(2), beside(4);
  alone.run(1);
  by_four.run(4);
  must_equal(alone, by_four, "four");
  by_two.run(2);  // fewer than the team has by now
  must_equal(alone, by_two, "two");
  Chain again(4);
  if (argc > 1) beside.second.out = again.second.out;
  std::thread other([&] { beside.run(4); });  // one of both makes its calls alone
  again.run(4);
  other.join();
  must_equal(alone, again, "again");
  must_equal(alone, beside, "beside");
  std::puts("fine");
}
