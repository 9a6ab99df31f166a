// What the parts of the balancer share: exact amounts, a problem, and a partition that was found.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "placement.hpp"

namespace hfpp {

// Seconds in units of a power of two, or bytes: sums are exact, in any order.
__extension__ typedef __int128 Amount;

using Offsets = std::vector<std::int64_t>;

// What a run of layers costs on a stage: fixed, and moving for each of the stage's live
// microbatches.
class Measure {
 public:
  // `live` is empty where a layer costs the same on every stage.
  Measure(const std::vector<Amount>& fixed, const std::vector<Amount>& moving,
          std::vector<std::int64_t> live);

  // Whether a layer costs the same on every stage.
  bool plain() const { return live_.empty(); }

  // Layers [begin, end) on a stage.
  Amount of(std::int64_t stage, std::int64_t begin, std::int64_t end) const {
    const auto a = static_cast<std::size_t>(begin);
    const auto b = static_cast<std::size_t>(end);
    const Amount fixed = fixed_[b] - fixed_[a];
    if (live_.empty()) return fixed;
    return fixed + live_[static_cast<std::size_t>(stage)] * (moving_[b] - moving_[a]);
  }

  // The same on whichever stage it is least.
  Amount least(std::int64_t begin, std::int64_t end) const {
    const auto a = static_cast<std::size_t>(begin);
    const auto b = static_cast<std::size_t>(end);
    return fixed_[b] - fixed_[a] + least_live_ * (moving_[b] - moving_[a]);
  }

 private:
  std::vector<Amount> fixed_;   // sums of the layers before, [num_layers + 1]
  std::vector<Amount> moving_;  // likewise
  std::vector<std::int64_t> live_;
  std::int64_t least_live_ = 0;
};

// Make the rank that costs most cost least, with no rank over the cap of another measure.
struct Problem {
  const StageLayout& layout;
  std::int64_t num_layers;
  const Measure& cost;
  const Measure* limit = nullptr;  // nullptr: no cap
  Amount cap = 0;

  std::int64_t ranks() const { return layout.pp_size(); }
  std::int64_t stages() const { return layout.num_stages(); }
  std::int64_t per_rank() const { return layout.stages_per_rank(); }

  bool fits(std::int64_t stage, std::int64_t begin, std::int64_t end) const {
    return limit == nullptr || limit->of(stage, begin, end) <= cap;
  }
  // The largest sum of a rank's stages by a measure.
  Amount most(const Measure& measure, const Offsets& offsets) const;
  bool allowed(const Offsets& offsets) const {
    return limit == nullptr || most(*limit, offsets) <= cap;
  }
};

// A gap of one part in so many is not worth more effort, where there is no proof to be had.
constexpr std::int64_t kGoodEnough = 1000;

struct Found {
  Offsets offsets;
  Amount most;  // of the rank that costs most
};

inline Amount ceil_divide(Amount a, std::int64_t b) {
  return a <= 0 ? a / b : (a + b - 1) / b;
}

// ---- the methods

// One stage per rank: the optimum, evenest first; nothing where no partition fits the cap.
std::optional<Found> balance_chain(const Problem& problem);

// A bound from sums, counts and the heaviest layers.
Amount simple_bound(const Problem& problem);
// A bound from the sums that a rank's stages can have at all, at least `bound` and at most `most`;
// `bound` itself where there are too many sums, or stages differ in cost.
Amount sums_bound(const Problem& problem, Amount bound, Amount most);

// A bound from packing layers of few kinds in any order, at least `bound` and at most `most`.
Amount kinds_bound(const Problem& problem, Amount bound, Amount most);

// Improves a partition that fits the cap by moving cuts, until it costs `bound` or effort is spent.
void improve_locally(const Problem& problem, Amount bound, Found& best);
// Makes the stages even, where no rank comes to cost more than before.
void even_out(const Problem& problem, Found& best);

// Two stages per rank. True: `best` is optimal; false: the effort was spent before that was known,
// but `bound` may be higher.
bool search_pairs(const Problem& problem, Amount& bound, Found& best);
// More stages per rank, dealt round: optimal for any two runs of as many stages as there are ranks,
// while the others stay, until no two runs can be improved or `bound` is near.
void improve_two_runs(const Problem& problem, Amount bound, Found& best);
// Any number of stages per rank, for few layers. As above.
bool search_tree(const Problem& problem, Amount bound, Found& best);

}  // namespace hfpp
