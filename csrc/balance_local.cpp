// Better partitions by moving cuts: annealing towards a target, and evening out at the end.
#include <algorithm>
#include <limits>

#include "balance_problem.hpp"

namespace hfpp {
namespace {

constexpr int kRounds = 6;
constexpr std::int64_t kMovesPerRound = 20'000;
constexpr int kEveningRounds = 64;

// splitmix64: the same numbers on every machine.
class Dice {
 public:
  std::uint64_t next() {
    state_ += 0x9e3779b97f4a7c15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31U);
  }
  std::int64_t below(std::int64_t limit) {
    return static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(limit));
  }
  double unit() { return static_cast<double>(next() >> 11U) * 0x1p-53; }

 private:
  std::uint64_t state_ = 0;
};

std::vector<std::size_t> ranks_of(const Problem& problem) {
  std::vector<std::size_t> ranks(static_cast<std::size_t>(problem.stages()));
  for (std::int64_t rank = 0; rank < problem.ranks(); ++rank) {
    for (std::int64_t k = 0; k < problem.per_rank(); ++k) {
      ranks[static_cast<std::size_t>(problem.layout.stage(rank, k))] =
          static_cast<std::size_t>(rank);
    }
  }
  return ranks;
}

// Moves one layer over each of the cuts `first` to `last`: forward, each to the stage before.
struct Move {
  std::int64_t first;
  std::int64_t last;
  bool forward;
};

// Whether every stage keeps a layer: of the stages between the cuts each gets one and gives one.
bool is_possible(const Move& move, const Offsets& offsets) {
  const auto giver = static_cast<std::size_t>(move.forward ? move.last : move.first - 1);
  return offsets[giver + 1] - offsets[giver] >= 2;
}

void apply(const Move& move, Offsets& offsets) {
  for (std::int64_t cut = move.first; cut <= move.last; ++cut) {
    offsets[static_cast<std::size_t>(cut)] += move.forward ? 1 : -1;
  }
}

class Annealing {
 public:
  Annealing(const Problem& problem, const Offsets& offsets)
      : problem_(problem),
        ranks_(ranks_of(problem)),
        mean_(std::max(1.0, static_cast<double>(problem.cost.least(0, problem.num_layers)) /
                                static_cast<double>(problem.stages()))),
        offsets_(offsets),
        stage_costs_(static_cast<std::size_t>(problem.stages())),
        costs_(static_cast<std::size_t>(problem.ranks())),
        held_(costs_) {}

  // Tries to bring every rank to the target: true where it did. What is best is kept.
  bool reach(Amount target, Found& best) {
    bool reached = false;
    run(target, best.offsets, 0.02, kMovesPerRound, [&] {
      const Amount most = problem_.most(problem_.cost, offsets_);
      if (most < best.most) best = Found{offsets_, most};
      reached = most <= target;
      return reached;
    });
    return reached;
  }

  // Looks for the evenest stages with no rank over the best's slowest.
  void even_out(Found& best) {
    double least = kNever;
    Found found = best;
    const std::int64_t moves =
        std::min(kMovesPerRound, 50 * (problem_.num_layers + problem_.stages()));
    run(best.most, best.offsets, 4, moves, [&] {
      if (uneven_ < least && problem_.most(problem_.cost, offsets_) <= best.most) {
        least = uneven_;
        found.offsets = offsets_;
      }
      return false;
    });
    best = std::move(found);
  }

 private:
  // Anneals from `start`; `take` is called where no rank seems over the target or the cap.
  template <class Take>
  void run(Amount target, const Offsets& start, double evenness, std::int64_t moves,
           const Take& take) {
    offsets_ = start;
    target_ = static_cast<double>(target);
    scale_ = 1 / std::max(target_, 1.0);
    evenness_ = evenness / static_cast<double>(problem_.stages());
    recount();
    if (over_ < kRounding && take()) return;
    const std::int64_t layers_per_rank =
        std::max<std::int64_t>(1, problem_.num_layers / problem_.ranks());
    const double hot = 0.5 / static_cast<double>(layers_per_rank);
    const std::int64_t cuts = problem_.stages() - 1;
    for (std::int64_t done = 0; done < moves; ++done) {
      const Move move = pick(cuts);
      if (!is_possible(move, offsets_)) continue;
      const double left = 1 - static_cast<double>(done) / static_cast<double>(moves);
      const double before = energy();
      shift(move);
      if (energy() - before > hot * left * left * dice_.unit()) {
        shift(Move{move.first, move.last, !move.forward});
        continue;
      }
      if (over_ < kRounding && problem_.allowed(offsets_)) {  // the rest is counted exactly
        if (take()) return;
      }
      if (done % 1024 == 0) recount();  // against the drift of sums
    }
  }

  double energy() const { return over_ + evenness_ * uneven_; }

  Move pick(std::int64_t cuts) {
    const std::int64_t first = 1 + dice_.below(cuts);
    std::int64_t last = first;
    if (dice_.below(2) == 0) {
      const std::int64_t most = std::min(cuts, first + problem_.ranks());
      last = first + dice_.below(most - first + 1);
    }
    return Move{first, last, dice_.below(2) == 0};
  }

  double over(std::size_t rank) const {
    double sum = std::max(0.0, costs_[rank] - target_) * scale_;
    if (problem_.limit != nullptr) {
      const auto cap = static_cast<double>(problem_.cap);
      sum += std::max(0.0, held_[rank] - cap) / std::max(cap, 1.0);
    }
    return sum;
  }
  double uneven(std::size_t stage) const {
    const double share = stage_costs_[stage] / mean_;
    return share * share;
  }

  void recount() {
    std::fill(costs_.begin(), costs_.end(), 0.0);
    std::fill(held_.begin(), held_.end(), 0.0);
    std::fill(stage_costs_.begin(), stage_costs_.end(), 0.0);
    over_ = 0;
    uneven_ = 0;
    for (std::size_t s = 0; s < ranks_.size(); ++s) {
      add(s, offsets_[s], offsets_[s + 1], 1);
      uneven_ += uneven(s);
    }
    for (std::size_t rank = 0; rank < costs_.size(); ++rank) over_ += over(rank);
  }

  void add(std::size_t stage, std::int64_t begin, std::int64_t end, double sign) {
    const auto s = static_cast<std::int64_t>(stage);
    const double cost = sign * static_cast<double>(problem_.cost.of(s, begin, end));
    stage_costs_[stage] += cost;
    costs_[ranks_[stage]] += cost;
    if (problem_.limit != nullptr) {
      held_[ranks_[stage]] += sign * static_cast<double>(problem_.limit->of(s, begin, end));
    }
  }

  void change(std::size_t stage, std::int64_t layer, double sign) {
    over_ -= over(ranks_[stage]);
    uneven_ -= uneven(stage);
    add(stage, layer, layer + 1, sign);
    over_ += over(ranks_[stage]);
    uneven_ += uneven(stage);
  }

  void shift(const Move& move) {
    for (std::int64_t cut = move.first; cut <= move.last; ++cut) {
      const auto at = static_cast<std::size_t>(cut);
      const std::int64_t layer = move.forward ? offsets_[at] : offsets_[at] - 1;
      change(at, layer, move.forward ? -1 : 1);
      change(at - 1, layer, move.forward ? 1 : -1);
    }
    apply(move, offsets_);
  }

  static constexpr double kRounding = 1e-9;
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  const Problem& problem_;
  std::vector<std::size_t> ranks_;
  double mean_;
  Offsets offsets_;
  std::vector<double> stage_costs_;
  std::vector<double> costs_;
  std::vector<double> held_;
  double target_ = 0;
  double scale_ = 1;
  double evenness_ = 0;
  double over_ = 0;    // by how much ranks are over the target and the cap
  double uneven_ = 0;  // squares of the stages' shares
  Dice dice_;
};

}  // namespace

void improve_locally(const Problem& problem, Amount bound, Found& best) {
  if (problem.stages() < 2) return;
  Annealing annealing(problem, best.offsets);
  Amount low = bound;
  for (int round = 0; round < kRounds && best.most - bound > bound / kGoodEnough; ++round) {
    const Amount target = round == 0 ? low : low + (best.most - low) / 2;
    if (target >= best.most) break;
    if (!annealing.reach(target, best)) low = target + 1;
  }
}

void even_out(const Problem& problem, Found& best) {
  if (problem.stages() < 2) return;
  Annealing(problem, best.offsets).even_out(best);
  const std::vector<std::size_t> ranks = ranks_of(problem);
  const std::int64_t cuts = problem.stages() - 1;
  const std::int64_t longest = std::min<std::int64_t>(problem.ranks() + 1, 16);
  const auto square = [&](std::int64_t stage, const Offsets& offsets) {
    const auto s = static_cast<std::size_t>(stage);
    const auto cost = static_cast<double>(problem.cost.of(stage, offsets[s], offsets[s + 1]));
    return cost * cost;
  };
  Offsets tried = best.offsets;
  for (int round = 0; round < kEveningRounds; ++round) {
    bool any = false;
    for (std::int64_t first = 1; first <= cuts; ++first) {
      for (std::int64_t last = first; last < std::min(first + longest, cuts + 1); ++last) {
        for (const bool forward : {true, false}) {
          const Move move{first, last, forward};
          if (!is_possible(move, tried)) continue;
          double before = 0;
          double after = 0;
          for (std::int64_t s = first - 1; s <= last; ++s) before += square(s, tried);
          apply(move, tried);
          for (std::int64_t s = first - 1; s <= last; ++s) after += square(s, tried);
          if (after < before * (1 - 1e-12) && problem.most(problem.cost, tried) <= best.most &&
              problem.allowed(tried)) {
            best.offsets = tried;
            any = true;
          } else {
            tried = best.offsets;
          }
        }
      }
    }
    if (!any) break;
  }
  best.most = problem.most(problem.cost, best.offsets);
}

}  // namespace hfpp
