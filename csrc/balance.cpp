// Which method finds the partition, and what is said where none fits the cap.
#include "balance.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "balance_problem.hpp"

namespace hfpp {

Measure::Measure(const std::vector<Amount>& fixed, const std::vector<Amount>& moving,
                 std::vector<std::int64_t> live)
    : fixed_(fixed.size() + 1, 0), moving_(fixed.size() + 1, 0), live_(std::move(live)) {
  for (std::size_t i = 0; i < fixed.size(); ++i) {
    fixed_[i + 1] = fixed_[i] + fixed[i];
    moving_[i + 1] = moving_[i] + (moving.empty() ? Amount{0} : moving[i]);
  }
  if (!live_.empty()) least_live_ = *std::min_element(live_.begin(), live_.end());
}

Amount Problem::most(const Measure& measure, const Offsets& offsets) const {
  Amount most = 0;
  for (std::int64_t rank = 0; rank < ranks(); ++rank) {
    Amount sum = 0;
    for (std::int64_t k = 0; k < per_rank(); ++k) {
      const std::int64_t stage = layout.stage(rank, k);
      const auto s = static_cast<std::size_t>(stage);
      sum += measure.of(stage, offsets[s], offsets[s + 1]);
    }
    most = std::max(most, sum);
  }
  return most;
}

namespace {

constexpr std::int64_t kMostLayers = 1 << 20;
constexpr std::int64_t kMostCells = std::int64_t{1} << 24;  // layers times stages
constexpr std::int64_t kMostLive = std::numeric_limits<std::int32_t>::max();
// Seconds are counted in units so small that the largest layer has so many bits: every double
// within 2^-47 of the largest is exact, and sums of a million layers fit.
constexpr int kBits = 100;

struct Solved {
  Found best;
  Amount bound;
  bool optimal;
};

// The optimum, or the best that is found and a bound. Without a start, there must be no limit.
std::optional<Solved> solve(const Problem& problem, const Found* start) {
  if (problem.per_rank() == 1) {
    std::optional<Found> best = balance_chain(problem);
    if (!best) return std::nullopt;
    const Amount most = best->most;
    return Solved{std::move(*best), most, true};
  }
  Found best{};
  if (start != nullptr) {
    best = *start;
  } else {  // begin with even stages
    const StageLayout single(problem.stages(), problem.stages(), Placement::Loop);
    const std::optional<Found> even =
        balance_chain(Problem{single, problem.num_layers, problem.cost});
    best.offsets = even->offsets;
  }
  best.most = problem.most(problem.cost, best.offsets);
  Amount bound = std::min(simple_bound(problem), best.most);
  bool optimal = best.most == bound;
  if (!optimal) {
    bound = sums_bound(problem, bound, best.most);
    improve_locally(problem, bound, best);
    bound = kinds_bound(problem, bound, best.most);
    if (best.most == bound) {
      optimal = true;
    } else if (problem.per_rank() == 2) {
      optimal = search_pairs(problem, bound, best);
    } else {
      improve_two_runs(problem, bound, best);
    }
    optimal = optimal || search_tree(problem, bound, best);
    if (problem.cost.plain()) even_out(problem, best);
  }
  optimal = optimal || best.most == bound;
  if (optimal) bound = best.most;
  return Solved{std::move(best), bound, optimal};
}

std::string bytes(Amount amount) {
  return std::to_string(static_cast<std::int64_t>(
      std::min<Amount>(amount, std::numeric_limits<std::int64_t>::max())));
}

[[noreturn]] void refuse_cap(const StageLayout& layout, std::int64_t cap, const Solved& smallest) {
  std::string message =
      "memory cap (" + std::to_string(cap) + " bytes per rank) is too small for " +
      named("num_stages", layout.num_stages()) + " on " + named("pp_size", layout.pp_size()) + ": ";
  if (!smallest.optimal && smallest.bound <= cap) {
    message += "no partition was found that fits, and the best needs " + bytes(smallest.best.most) +
               " bytes on a rank: use a cap of " + bytes(smallest.best.most) + " bytes or more";
  } else {
    message += "every partition needs " + bytes(smallest.bound) +
               " bytes or more on some rank: use a cap of " + bytes(smallest.best.most) +
               " bytes or more";
  }
  throw ConfigError(message + ", more ranks, or fewer live microbatches.");
}

void require_sizes(const StageLayout& layout, const LayerCosts& costs) {
  const auto n = static_cast<std::int64_t>(costs.seconds.size());
  const std::int64_t stages = layout.num_stages();
  if (stages > n) {
    throw ConfigError(
        named("num_stages", stages) + " must not be larger than " + named("num_layers", n) +
        ", as every stage needs a layer: use num_stages=" + std::to_string(n) + " or less.");
  }
  require_at_most("num_layers", n, kMostLayers);
  if (checked_multiply(n, stages, "num_layers") > kMostCells) {
    throw std::overflow_error(named("num_layers", n) + " times " + named("num_stages", stages) +
                              " must be at most " + std::to_string(kMostCells) +
                              ": use fewer layers or stages.");
  }
  for (const double seconds : costs.seconds) {
    if (!(std::isfinite(seconds) && seconds >= 0)) {
      throw ConfigError(named("seconds", seconds) +
                        " must be finite and not negative: use 0 where a layer costs nothing.");
    }
  }
  if (!costs.cap) return;
  for (const auto* values : {&costs.static_bytes, &costs.activation_bytes}) {
    if (values->size() != costs.seconds.size()) {
      throw ConfigError("static_bytes and activation_bytes must have one entry per layer (" +
                        std::to_string(n) + "), not " + std::to_string(values->size()) + ".");
    }
    for (const std::int64_t value : *values) {
      require_at_least(values == &costs.static_bytes ? "static_bytes" : "activation_bytes", value,
                       0);
    }
  }
  if (static_cast<std::int64_t>(costs.live.size()) != stages) {
    throw ConfigError("live must have one entry per stage (" + std::to_string(stages) + "), not " +
                      std::to_string(costs.live.size()) + ".");
  }
  for (const std::int64_t live : costs.live) {
    require_at_least("live", live, 0);
    require_at_most("live", live, kMostLive);
  }
  require_at_least("cap", *costs.cap, 0);
}

}  // namespace

Balance balance(const StageLayout& layout, const LayerCosts& costs) {
  require_sizes(layout, costs);
  const auto n = static_cast<std::int64_t>(costs.seconds.size());
  const double heaviest = *std::max_element(costs.seconds.begin(), costs.seconds.end());
  const int unit = heaviest > 0 ? std::ilogb(heaviest) - kBits : 0;
  std::vector<Amount> amounts;
  amounts.reserve(costs.seconds.size());
  for (const double seconds : costs.seconds) {
    amounts.push_back(static_cast<Amount>(std::nearbyint(std::scalbn(seconds, -unit))));
  }
  const Measure time(amounts, {}, {});
  const auto result = [&](Solved solved) {
    const auto in_seconds = [unit](Amount amount) {
      return std::scalbn(static_cast<double>(amount), unit);
    };
    return Balance{std::move(solved.best.offsets), in_seconds(solved.best.most),
                   in_seconds(solved.bound), solved.optimal};
  };
  const Problem fastest{layout, n, time};
  Solved solved = *solve(fastest, nullptr);
  if (!costs.cap) return result(std::move(solved));

  const Measure memory({costs.static_bytes.begin(), costs.static_bytes.end()},
                       {costs.activation_bytes.begin(), costs.activation_bytes.end()}, costs.live);
  const Problem capped{layout, n, time, &memory, *costs.cap};
  if (capped.allowed(solved.best.offsets)) return result(std::move(solved));
  const Solved smallest = *solve(Problem{layout, n, memory}, nullptr);
  if (smallest.best.most > capped.cap) refuse_cap(layout, *costs.cap, smallest);
  const Amount bound = solved.bound;
  solved = *solve(capped, &smallest.best);
  solved.bound = std::max(solved.bound, bound);  // a cap makes nothing faster
  return result(std::move(solved));
}

}  // namespace hfpp
