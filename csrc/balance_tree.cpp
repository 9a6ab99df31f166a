// Few layers: every partition that can still be better, stage by stage.
#include <algorithm>

#include "balance_problem.hpp"

namespace hfpp {
namespace {

constexpr std::int64_t kMostNodes = 2'000'000;
constexpr double kMostPartitions = 1e12;  // of more, too few could be ruled out

class Tree {
 public:
  Tree(const Problem& problem, Amount bound, Found& best)
      : problem_(problem),
        bound_(bound),
        best_(best),
        n_(problem.num_layers),
        stages_(problem.stages()),
        costs_(static_cast<std::size_t>(problem.ranks()), 0),
        held_(costs_),
        offsets_(static_cast<std::size_t>(stages_) + 1, 0),
        rank_of_(static_cast<std::size_t>(stages_)),
        is_last_(static_cast<std::size_t>(stages_), 0) {
    for (std::int64_t rank = 0; rank < problem.ranks(); ++rank) {
      for (std::int64_t k = 0; k < problem.per_rank(); ++k) {
        rank_of_[static_cast<std::size_t>(problem.layout.stage(rank, k))] =
            static_cast<std::size_t>(rank);
      }
      const std::int64_t last = problem.layout.stage(rank, problem.per_rank() - 1);
      is_last_[static_cast<std::size_t>(last)] = 1;
    }
  }

  bool search() {
    place(0, problem_.ranks(), 0);
    return nodes_ <= kMostNodes;
  }

 private:
  // Places a stage and all after it. `open` ranks still get stages; they cost `open_cost` so far.
  void place(std::int64_t stage, std::int64_t open, Amount open_cost) {
    const std::int64_t begin = offsets_[static_cast<std::size_t>(stage)];
    const auto at = static_cast<std::size_t>(stage);
    const std::size_t rank = rank_of_[at];
    const bool last_stage = stage + 1 == stages_;
    const std::int64_t most = n_ - (stages_ - 1 - stage);
    for (std::int64_t end = last_stage ? n_ : begin + 1; end <= most; ++end) {
      if (best_.most <= bound_ || ++nodes_ > kMostNodes) return;
      const Amount cost = problem_.cost.of(stage, begin, end);
      if (costs_[rank] + cost >= best_.most) return;
      const Amount holds =
          problem_.limit == nullptr ? Amount{0} : problem_.limit->of(stage, begin, end);
      if (problem_.limit != nullptr && held_[rank] + holds > problem_.cap) return;
      const std::int64_t still = open - is_last_[at];
      const Amount still_cost = is_last_[at] != 0 ? open_cost - costs_[rank] : open_cost + cost;
      // What is left must fit the ranks that are left, each below the best.
      if (problem_.cost.least(end, n_) > still * (best_.most - 1) - still_cost) continue;
      offsets_[at + 1] = end;
      costs_[rank] += cost;
      held_[rank] += holds;
      if (last_stage) {
        best_.offsets = offsets_;
        best_.most = *std::max_element(costs_.begin(), costs_.end());
      } else {
        place(stage + 1, still, still_cost);
      }
      costs_[rank] -= cost;
      held_[rank] -= holds;
    }
  }

  const Problem& problem_;
  Amount bound_;
  Found& best_;
  std::int64_t n_;
  std::int64_t stages_;
  std::int64_t nodes_ = 0;
  std::vector<Amount> costs_;
  std::vector<Amount> held_;
  Offsets offsets_;
  std::vector<std::size_t> rank_of_;
  std::vector<std::int64_t> is_last_;
};

}  // namespace

bool search_tree(const Problem& problem, Amount bound, Found& best) {
  if (best.most <= bound) return true;
  double partitions = 1;
  for (std::int64_t k = 1; k < problem.stages() && partitions < kMostPartitions; ++k) {
    partitions *= static_cast<double>(problem.num_layers - k) / static_cast<double>(k);
  }
  if (partitions >= kMostPartitions) return false;
  return Tree(problem, bound, best).search();
}

}  // namespace hfpp
