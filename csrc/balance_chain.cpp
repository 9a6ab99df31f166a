// One stage per rank: bisection over the slowest stage's time, then the evenest of the optima.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "balance_problem.hpp"

namespace hfpp {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

class Chain {
 public:
  explicit Chain(const Problem& problem)
      : problem_(problem), n_(problem.num_layers), stages_(problem.stages()) {}

  std::optional<Found> solve() {
    Amount low = simple_bound(problem_);
    Amount high = 0;
    for (std::int64_t s = 0; s < stages_; ++s) {
      high = std::max(high, problem_.cost.of(s, 0, n_));
    }
    low = std::min(low, high);
    Amount next = 0;
    std::optional<Offsets> best = pack(high, next);
    if (!best) return std::nullopt;
    high = problem_.most(problem_.cost, *best);
    while (low < high) {
      const Amount limit = low + (high - low) / 2;
      if (const std::optional<Offsets> packed = pack(limit, next)) {
        best = packed;
        high = problem_.most(problem_.cost, *best);
      } else {
        low = std::max(limit + 1, next);
      }
    }
    return Found{evenest(high), high};
  }

 private:
  // A partition with every stage within the limit, or none, and the least limit at which anything
  // would change.
  std::optional<Offsets> pack(Amount limit, Amount& next) {
    next = std::numeric_limits<Amount>::max();
    return free() ? pack_greedily(limit, next) : pack_by_reach(limit, next);
  }

  // Whether a shorter run always fits where a longer one does, on whichever stage: then the first
  // stages may take all that they can, as every single layer fits at every limit tried.
  bool free() const { return problem_.limit == nullptr && problem_.cost.plain(); }

  bool within(std::int64_t stage, std::int64_t begin, std::int64_t end, Amount limit) const {
    return problem_.cost.of(stage, begin, end) <= limit && problem_.fits(stage, begin, end);
  }

  // The end of the longest run from `begin` within the limit, up to `most`: it is looked for near
  // `guess`, the length of the run before.
  std::int64_t longest(std::int64_t begin, std::int64_t most, std::int64_t guess,
                       Amount limit) const {
    std::int64_t low = begin + 1;  // always within
    std::int64_t high = most + 1;
    std::int64_t step = 1;
    std::int64_t at = std::min(std::max(begin + guess, low), most);
    if (problem_.cost.of(0, begin, at) <= limit) {
      low = at;
      while (at < most) {
        at = std::min(at + step, most);
        step *= 2;
        if (problem_.cost.of(0, begin, at) > limit) {
          high = at;
          break;
        }
        low = at;
      }
    } else {
      high = at;
      while (at > low) {
        at = std::max(at - step, low);
        step *= 2;
        if (problem_.cost.of(0, begin, at) <= limit) {
          low = at;
          break;
        }
        high = at;
      }
    }
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (problem_.cost.of(0, begin, middle) <= limit ? low : high) = middle;
    }
    return low;
  }

  std::optional<Offsets> pack_greedily(Amount limit, Amount& next) const {
    Offsets offsets{0};
    offsets.reserve(static_cast<std::size_t>(stages_) + 1);
    std::int64_t guess = n_ / stages_;
    for (std::int64_t s = 0; s < stages_; ++s) {
      const std::int64_t begin = offsets.back();
      const std::int64_t most = n_ - (stages_ - 1 - s);
      const std::int64_t end = longest(begin, most, guess, limit);
      if (end < most) next = std::min(next, problem_.cost.of(s, begin, end + 1));
      guess = end - begin;
      offsets.push_back(end);
    }
    if (offsets.back() != n_) return std::nullopt;
    return offsets;
  }

  // With a cap, a layer may fit one stage and not another: which ends each stage can have.
  std::optional<Offsets> pack_by_reach(Amount limit, Amount& next) {
    const auto width = static_cast<std::size_t>(n_ + 1);
    from_.assign(static_cast<std::size_t>(stages_) * width, -1);
    std::vector<char> reached(width, 0);
    reached[0] = 1;
    for (std::int64_t s = 0; s < stages_; ++s) {
      std::vector<char> after(width, 0);
      const std::int64_t most = n_ - (stages_ - 1 - s);
      std::int64_t end = s;     // of the longest run from the begin in hand
      std::int64_t marked = s;  // ends up to here are decided
      for (std::int64_t begin = s; begin < most; ++begin) {
        if (!reached[static_cast<std::size_t>(begin)]) continue;
        end = std::max(end, begin);
        while (end < most && within(s, begin, end + 1, limit)) ++end;
        if (end < most && problem_.fits(s, begin, end + 1)) {
          next = std::min(next, problem_.cost.of(s, begin, end + 1));
        }
        for (marked = std::max(marked, begin); marked < end; ++marked) {
          const auto at = static_cast<std::size_t>(marked + 1);
          after[at] = 1;
          from_[static_cast<std::size_t>(s) * width + at] = static_cast<std::int32_t>(begin);
        }
      }
      reached = std::move(after);
    }
    if (!reached[static_cast<std::size_t>(n_)]) return std::nullopt;
    return walk_back();
  }

  Offsets walk_back() const {
    const auto width = static_cast<std::size_t>(n_ + 1);
    Offsets offsets(static_cast<std::size_t>(stages_) + 1, n_);
    for (std::int64_t s = stages_; s-- > 0;) {
      const auto end = static_cast<std::size_t>(offsets[static_cast<std::size_t>(s) + 1]);
      offsets[static_cast<std::size_t>(s)] = from_[static_cast<std::size_t>(s) * width + end];
    }
    return offsets;
  }

  // ---- the least sum of squares with every stage within the limit

  Offsets evenest(Amount limit) {
    const auto width = static_cast<std::size_t>(n_ + 1);
    from_.assign(static_cast<std::size_t>(stages_) * width, -1);
    before_.assign(width, kNever);
    before_[0] = 0;
    if (free()) {
      Amount ignored = 0;
      latest_ = *pack_greedily(limit, ignored);
      earliest_ = pack_from_the_end(limit);
    }
    for (std::int64_t s = 0; s < stages_; ++s) {
      after_.assign(width, kNever);
      if (free()) {
        const auto at = static_cast<std::size_t>(s);
        halve(s, earliest_[at + 1], latest_[at + 1], earliest_[at], latest_[at], limit);
      } else {
        for (std::int64_t end = s + 1; end <= n_ - (stages_ - 1 - s); ++end) {
          settle(s, end, s, end - 1, limit);
        }
      }
      std::swap(before_, after_);
    }
    return walk_back();
  }

  Offsets pack_from_the_end(Amount limit) const {
    Offsets offsets(static_cast<std::size_t>(stages_) + 1, n_);
    for (std::int64_t s = stages_; s-- > 0;) {
      const std::int64_t end = offsets[static_cast<std::size_t>(s) + 1];
      std::int64_t begin = end - 1;
      while (begin > s && problem_.cost.of(s, begin - 1, end) <= limit) --begin;
      offsets[static_cast<std::size_t>(s)] = begin;
    }
    return offsets;
  }

  // The best begin in [first, last] of the stage that ends at `end`; the latest of several.
  std::int64_t settle(std::int64_t stage, std::int64_t end, std::int64_t first, std::int64_t last,
                      Amount limit) {
    std::int64_t best = -1;
    double least = kNever;
    for (std::int64_t begin = std::min(last, end - 1); begin >= first; --begin) {
      if (!within(stage, begin, end, limit)) break;
      const auto time = static_cast<double>(problem_.cost.of(stage, begin, end));
      const double sum = before_[static_cast<std::size_t>(begin)] + time * time;
      if (sum < least) {
        least = sum;
        best = begin;
      }
    }
    if (best >= 0) {
      const auto at = static_cast<std::size_t>(end);
      after_[at] = least;
      from_[static_cast<std::size_t>(stage) * static_cast<std::size_t>(n_ + 1) + at] =
          static_cast<std::int32_t>(best);
    }
    return best;
  }

  // A later end never has an earlier best begin: squares of sums satisfy the quadrangle
  // inequality. So the best begin of the middle end halves the others' choice.
  void halve(std::int64_t stage, std::int64_t first_end, std::int64_t last_end, std::int64_t first,
             std::int64_t last, Amount limit) {
    if (first_end > last_end) return;
    const std::int64_t middle = first_end + (last_end - first_end) / 2;
    const std::int64_t best = settle(stage, middle, first, last, limit);
    if (best < 0) throw std::logic_error("Chain::halve: every end in between has a begin");
    halve(stage, first_end, middle - 1, first, best, limit);
    halve(stage, middle + 1, last_end, best, last, limit);
  }

  const Problem& problem_;
  std::int64_t n_;
  std::int64_t stages_;
  std::vector<std::int32_t> from_;  // [stages, n + 1]: where the stage that ends there begins
  std::vector<double> before_;
  std::vector<double> after_;
  Offsets latest_;
  Offsets earliest_;
};

}  // namespace

std::optional<Found> balance_chain(const Problem& problem) {
  return Chain(problem).solve();
}

}  // namespace hfpp
