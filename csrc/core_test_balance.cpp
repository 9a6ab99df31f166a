// Balanced partitions against every partition there is.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "balance.hpp"
#include "core_test.hpp"

namespace hfpp::test {

namespace {

// The slowest rank's time and, with a cap, the most that a rank holds.
std::pair<double, std::int64_t> measured(const StageLayout& stages, const LayerCosts& costs,
                                         const std::vector<std::int64_t>& offsets) {
  double slowest = 0;
  std::int64_t most = 0;
  for (std::int64_t rank = 0; rank < stages.pp_size(); ++rank) {
    double seconds = 0;
    std::int64_t bytes = 0;
    for (std::int64_t k = 0; k < stages.stages_per_rank(); ++k) {
      const auto s = static_cast<std::size_t>(stages.stage(rank, k));
      for (auto i = static_cast<std::size_t>(offsets[s]);
           i < static_cast<std::size_t>(offsets[s + 1]); ++i) {
        seconds += costs.seconds[i];
        if (costs.cap) bytes += costs.static_bytes[i] + costs.live[s] * costs.activation_bytes[i];
      }
    }
    slowest = std::max(slowest, seconds);
    most = std::max(most, bytes);
  }
  return {slowest, most};
}

// The best of all partitions, by trying each; infinity where none fits.
double tried(const StageLayout& stages, const LayerCosts& costs, std::vector<std::int64_t>& offsets,
             std::size_t stage) {
  const auto n = static_cast<std::int64_t>(costs.seconds.size());
  const auto count = static_cast<std::size_t>(stages.num_stages());
  if (stage == count) {
    const auto [slowest, most] = measured(stages, costs, offsets);
    return costs.cap && most > *costs.cap ? std::numeric_limits<double>::infinity() : slowest;
  }
  double best = std::numeric_limits<double>::infinity();
  for (std::int64_t end = offsets[stage] + 1; end <= n; ++end) {
    if (stage + 1 == count && end != n) continue;
    offsets[stage + 1] = end;
    best = std::min(best, tried(stages, costs, offsets, stage + 1));
  }
  return best;
}

}  // namespace

void test_balance() {
  std::uint64_t state = 1;
  const auto dice = [&state](std::uint64_t below) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::int64_t>((state >> 33U) % below);
  };
  for (std::int64_t pp = 1; pp <= 4; ++pp) {
    for (const std::int64_t per_rank : {1, 2, 3}) {
      for (const Placement placement : {Placement::Loop, Placement::V}) {
        if ((placement == Placement::V && per_rank != 2) || pp * per_rank > 8) continue;
        const StageLayout stages(pp, pp * per_rank, placement);
        for (int round = 0; round < 12; ++round) {
          LayerCosts costs;
          for (std::int64_t i = stages.num_stages() + dice(4); i > 0; --i) {
            costs.seconds.push_back(0.25 * static_cast<double>(dice(9)));
            costs.static_bytes.push_back(dice(9));
            costs.activation_bytes.push_back(dice(4));
          }
          for (std::int64_t s = 0; s < stages.num_stages(); ++s) costs.live.push_back(dice(4));
          if (round % 2 == 1) costs.cap = 10 + dice(40);
          std::vector<std::int64_t> offsets(static_cast<std::size_t>(stages.num_stages()) + 1, 0);
          const double best = tried(stages, costs, offsets, 0);
          if (std::isinf(best)) {
            check_throws<ConfigError>([&] { balance(stages, costs); }, "is too small");
            continue;
          }
          const Balance found = balance(stages, costs);
          const auto [slowest, most] = measured(stages, costs, found.offsets);
          check(slowest == best && found.slowest == best, "the best of all partitions is found");
          check(found.optimal && found.lower_bound == best, "few layers: it is proven");
          check(!costs.cap || most <= *costs.cap, "no rank is over the cap");
        }
      }
    }
  }
  // Many layers: one stage per rank and the methods for several, under the sanitizers.
  LayerCosts many;
  for (int i = 0; i < 90; ++i) many.seconds.push_back(1 + 0.01 * static_cast<double>(dice(100)));
  many.seconds.back() += 6;
  for (const auto& [pp, per_rank, placement] :
       {std::tuple(30, 1, Placement::Loop), std::tuple(8, 2, Placement::Loop),
        std::tuple(8, 2, Placement::V), std::tuple(6, 4, Placement::Loop)}) {
    const StageLayout stages(pp, pp * per_rank, placement);
    const Balance found = balance(stages, many);
    const double slowest = measured(stages, many, found.offsets).first;
    check(std::abs(slowest - found.slowest) < 1e-9, "the time is that of the partition");
    check(found.lower_bound <= found.slowest && found.slowest < 1.03 * found.lower_bound,
          "the partition is near its bound");
  }
  const StageLayout three(3, 3, Placement::Loop);
  check_throws<ConfigError>([&] { balance(three, {{1, 1}, {}, {}, {}, {}}); }, "num_stages (3)");
  check_throws<ConfigError>([&] { balance(three, {{1, -1, 1}, {}, {}, {}, {}}); }, "seconds (-1");
  check_throws<ConfigError>(
      [&] { balance(three, {{1, 1, 1}, 4, {5, 1, 1}, {0, 0, 0}, {1, 1, 1}}); },
      "use a cap of 5 bytes or more");
  check_throws<std::overflow_error>(
      [&] {
        balance(StageLayout(1 << 19, 1 << 19, Placement::Loop),
                {std::vector<double>(1 << 19, 1.0), {}, {}, {}, {}});
      },
      "num_layers (524288) times");
}

}  // namespace hfpp::test
