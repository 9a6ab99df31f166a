// Two stages of each rank at once: how far both of a rank's runs of layers have come.
//
// Rank by rank, the first stages eat one run of layers from its front and the second stages another
// run: from the back of all layers with the v placement, from a cut on with the loop. With a limit
// on each rank's cost, what is reached after some ranks is a set of pairs (x, y): layers eaten by
// the first stages and by the second. A rank's step into (x', y') is possible from some (x, y) with
// x < x' if and only if it is from the largest reached y < y', which costs least by every measure.
// What the ranks ate must leave no more than the others can take, so of each row few y count.
#include <algorithm>
#include <limits>

#include "balance_problem.hpp"

namespace hfpp {
namespace {

constexpr std::int64_t kMostSteps = 5'000'000;
constexpr std::int64_t kMostCells = std::int64_t{1} << 23;
constexpr std::int64_t kNone = -1;

// Layers [begin, end) on the consecutive stages from `stage` on, one for each rank.
struct Run {
  std::int64_t stage;
  std::int64_t begin;
  std::int64_t end;
};

// For one x: of each y in [first, first + size) the largest reached y up to it.
struct Row {
  std::int64_t first = 0;
  std::size_t start = 0;
  std::size_t size = 0;
};

class Pairs {
 public:
  // Two runs of the loop placement: in place of those of `around`, whose other stages stay.
  Pairs(const Problem& problem, const Offsets& around, const Run& first, const Run& second,
        std::int64_t& steps)
      : Pairs(problem, first, second, false, steps) {
    const std::int64_t begin = first.stage;
    for (std::int64_t step = 0; step < ranks_; ++step) {
      const auto at = static_cast<std::size_t>(step);
      for (std::int64_t stage = (begin + step) % ranks_; stage < problem.stages();
           stage += ranks_) {
        if (stage == begin + step || stage == second.stage + step) continue;
        const auto s = static_cast<std::size_t>(stage);
        cost_[at] += problem.cost.of(stage, around[s], around[s + 1]);
        if (problem.limit != nullptr) {
          held_[at] += problem.limit->of(stage, around[s], around[s + 1]);
        }
      }
      cost_before_[at + 1] = cost_before_[at] + cost_[at];
    }
  }

  // The v placement: the second stages eat from the back, until both meet.
  Pairs(const Problem& problem, std::int64_t& steps)
      : Pairs(problem, Run{0, 0, problem.num_layers}, Run{problem.ranks(), 0, problem.num_layers},
              true, steps) {}

  bool exhausted() const { return exhausted_; }

  // Cuts with every rank within the limit, put into `offsets`; and the least limit at which
  // anything would change.
  bool within(Amount limit, Amount& next, Offsets& offsets) {
    limit_ = limit;
    next_ = std::numeric_limits<Amount>::max();
    for (const Amount cost : cost_) {
      if (cost > limit) {
        next = cost;
        return false;
      }
    }
    levels_.assign(1, {Row{0, 0, 1}});
    cells_.assign(1, 0);
    bool any = true;
    for (std::int64_t rank = 0; rank < ranks_ && any; ++rank) any = advance(rank);
    next = next_;
    return any && walk_back(offsets);
  }

 private:
  Pairs(const Problem& problem, const Run& first, const Run& second, bool is_v, std::int64_t& steps)
      : problem_(problem),
        first_(first),
        second_(second),
        is_v_(is_v),
        ranks_(problem.ranks()),
        total_(problem.cost.least(first.begin, first.end) +
               (is_v ? Amount{0} : problem.cost.least(second.begin, second.end))),
        cost_(static_cast<std::size_t>(ranks_), 0),
        held_(cost_),
        cost_before_(static_cast<std::size_t>(ranks_) + 1, 0),
        steps_(steps) {}

  std::int64_t most_x(std::int64_t done) const {
    const std::int64_t left = ranks_ - done;
    return is_v_ ? first_.end - done - 2 * left : first_.end - first_.begin - left;
  }
  std::int64_t most_y(std::int64_t done, std::int64_t x) const {
    const std::int64_t left = ranks_ - done;
    return is_v_ ? first_.end - x - 2 * left : second_.end - second_.begin - left;
  }
  std::int64_t second_stage(std::int64_t rank) const {
    return is_v_ ? 2 * ranks_ - 1 - rank : second_.stage + rank;
  }
  std::int64_t second_begin(std::int64_t y, std::int64_t y_end) const {
    return is_v_ ? second_.end - y_end : second_.begin + y;
  }
  Amount first_of(const Measure& measure, std::int64_t rank, std::int64_t x,
                  std::int64_t x_end) const {
    return measure.of(first_.stage + rank, first_.begin + x, first_.begin + x_end);
  }
  Amount second_of(const Measure& measure, std::int64_t rank, std::int64_t y,
                   std::int64_t y_end) const {
    const std::int64_t begin = second_begin(y, y_end);
    return measure.of(second_stage(rank), begin, begin + (y_end - y));
  }
  Amount eaten(std::int64_t x, std::int64_t y) const {
    const std::int64_t begin = second_begin(0, y);
    return problem_.cost.least(first_.begin, first_.begin + x) +
           problem_.cost.least(begin, begin + y);
  }

  // The y of (x, y) that the ranks so far can have eaten, and that leave what the others can take.
  std::pair<std::int64_t, std::int64_t> band(std::int64_t done, std::int64_t x) {
    std::int64_t low = done;
    const std::int64_t high = most_y(done, x);
    const std::int64_t left = ranks_ - done;
    if (left == 0) return {high, high};  // everything is eaten
    if (!problem_.cost.plain()) return {low, high};
    const Amount before = cost_before_[static_cast<std::size_t>(done)];
    const Amount after = cost_before_.back() - before;
    const Amount least = total_ - (left * limit_ - after);
    const Amount most = done * limit_ - before;
    std::int64_t end = high + 1;
    while (low < end) {
      const std::int64_t middle = low + (end - low) / 2;
      if (eaten(x, middle) < least) {
        low = middle + 1;
      } else {
        end = middle;
      }
    }
    if (low > done) next_ = std::min(next_, ceil_divide(total_ - eaten(x, low - 1) + after, left));
    std::int64_t past = low;
    end = high + 1;
    while (past < end) {
      const std::int64_t middle = past + (end - past) / 2;
      if (eaten(x, middle) <= most) {
        past = middle + 1;
      } else {
        end = middle;
      }
    }
    if (past <= high) next_ = std::min(next_, ceil_divide(eaten(x, past) + before, done));
    return {low, past - 1};
  }

  bool advance(std::int64_t rank) {
    const std::int64_t done = rank + 1;
    const std::int64_t last = most_x(done);
    std::vector<Row> rows(static_cast<std::size_t>(last) + 1);
    bool any = false;
    for (std::int64_t x = done == ranks_ && !is_v_ ? last : done; x <= last; ++x) {
      const auto [low, high] = band(done, x);
      Row row{low, cells_.size(), 0};
      bool reached = false;
      std::int64_t largest = kNone;
      for (std::int64_t y = low; y <= high && !exhausted_; ++y) {
        if (origin(rank, x, y, false).first != kNone) {
          largest = y;
          reached = true;
        }
        cells_.push_back(static_cast<std::int32_t>(largest));
        ++row.size;
      }
      if (!reached) {
        cells_.resize(row.start);
        row.size = 0;
      }
      rows[static_cast<std::size_t>(x)] = row;
      any = any || reached;
      if (static_cast<std::int64_t>(cells_.size()) > kMostCells) exhausted_ = true;
      if (exhausted_) return false;
    }
    levels_.push_back(std::move(rows));
    return any;
  }

  // The largest reached y up to `most` after `done` ranks with x layers eaten by the first stages.
  std::int64_t reached(std::int64_t done, std::int64_t x, std::int64_t most) const {
    const std::vector<Row>& rows = levels_[static_cast<std::size_t>(done)];
    if (static_cast<std::size_t>(x) >= rows.size()) return kNone;
    const Row& row = rows[static_cast<std::size_t>(x)];
    if (row.size == 0 || most < row.first) return kNone;
    const auto at = std::min(static_cast<std::size_t>(most - row.first), row.size - 1);
    return cells_[row.start + at];
  }

  // From where the rank can step to (x, y): from anywhere, or so that its two stages are evenest.
  std::pair<std::int64_t, std::int64_t> origin(std::int64_t rank, std::int64_t x, std::int64_t y,
                                               bool evenest) {
    const auto at = static_cast<std::size_t>(rank);
    std::pair<std::int64_t, std::int64_t> best{kNone, kNone};
    Amount longest = std::numeric_limits<Amount>::max();
    for (std::int64_t from = x - 1; from >= rank; --from) {
      if (++steps_ > kMostSteps && !evenest) {
        exhausted_ = true;
        break;
      }
      const Amount first = first_of(problem_.cost, rank, from, x);
      if (cost_[at] + first > limit_) {
        next_ = std::min(next_, cost_[at] + first);
        break;
      }
      const std::int64_t y_from = reached(rank, from, y - 1);
      if (y_from == kNone) continue;
      if (problem_.limit != nullptr) {
        const Amount held = held_[at] + first_of(*problem_.limit, rank, from, x);
        if (held > problem_.cap) break;
        if (held + second_of(*problem_.limit, rank, y_from, y) > problem_.cap) continue;
      }
      const Amount second = second_of(problem_.cost, rank, y_from, y);
      const Amount both = cost_[at] + first + second;
      if (both > limit_) {
        next_ = std::min(next_, both);
        continue;
      }
      if (std::max(first, second) < longest) {
        longest = std::max(first, second);
        best = {from, y_from};
      }
      if (!evenest) break;
    }
    return best;
  }

  bool walk_back(Offsets& offsets) {
    std::int64_t x = kNone;
    Amount longest = std::numeric_limits<Amount>::max();
    for (std::int64_t at = ranks_; at <= most_x(ranks_); ++at) {
      if (reached(ranks_, at, problem_.num_layers) == kNone) continue;
      const Amount front = problem_.cost.least(first_.begin, first_.begin + at);
      if (std::max(front, total_ - front) < longest) {
        longest = std::max(front, total_ - front);
        x = at;
      }
    }
    if (x == kNone) return false;
    std::int64_t y = reached(ranks_, x, problem_.num_layers);
    offsets[static_cast<std::size_t>(first_.stage + ranks_)] = first_.begin + x;
    for (std::int64_t rank = ranks_; rank-- > 0;) {
      const auto [x_from, y_from] = origin(rank, x, y, true);
      offsets[static_cast<std::size_t>(first_.stage + rank)] = first_.begin + x_from;
      offsets[static_cast<std::size_t>(second_stage(rank))] = second_begin(y_from, y);
      x = x_from;
      y = y_from;
    }
    return true;
  }

  const Problem& problem_;
  Run first_;
  Run second_;
  bool is_v_;
  std::int64_t ranks_;
  Amount total_;
  std::vector<Amount> cost_;  // of each rank's other stages
  std::vector<Amount> held_;
  std::vector<Amount> cost_before_;  // sums of the ranks before, [ranks + 1]
  std::int64_t& steps_;
  bool exhausted_ = false;
  Amount limit_ = 0;
  Amount next_ = 0;
  std::vector<std::vector<Row>> levels_;  // [ranks done][x]
  std::vector<std::int32_t> cells_;
};

// Improves `best` as far as these runs allow, and raises `low` to what they cannot be better than;
// false where the effort was spent before. With few chances the search begins just below the best,
// where it mostly ends; else near `low`, where a try costs least.
bool search(const Problem& problem, Pairs pairs, bool few_chances, Amount& low, Found& best) {
  Amount limit = few_chances ? best.most - 1 : low;
  Offsets offsets = best.offsets;
  while (low < best.most) {
    Amount next = 0;
    const bool found = pairs.within(limit, next, offsets);
    if (pairs.exhausted()) return false;
    if (found) {
      best = Found{offsets, problem.most(problem.cost, offsets)};
    } else {
      low = std::min(std::max(limit + 1, next), best.most);
    }
    if (low < best.most) limit = low + (best.most - 1 - low) / 8;
  }
  return true;
}

}  // namespace

bool search_pairs(const Problem& problem, Amount& bound, Found& best) {
  std::int64_t steps = 0;
  if (problem.layout.stage(0, 1) == problem.stages() - 1) {
    return search(problem, Pairs(problem, steps), false, bound, best);
  }
  // The loop's cuts, from the middle outwards.
  const std::int64_t n = problem.num_layers;
  const std::int64_t ranks = problem.ranks();
  for (std::int64_t away = 0; away <= n && best.most > bound; ++away) {
    for (const std::int64_t cut : {n / 2 - away, n / 2 + away}) {
      if (cut < ranks || cut > n - ranks) continue;
      const Pairs pairs(problem, best.offsets, Run{0, 0, cut}, Run{ranks, cut, n}, steps);
      Amount low = bound;
      if (!search(problem, pairs, away > 0, low, best)) return false;
      if (away == 0) break;
    }
  }
  return true;
}

void improve_two_runs(const Problem& problem, Amount bound, Found& best) {
  const std::int64_t ranks = problem.ranks();
  const std::int64_t stages = problem.stages();
  std::int64_t steps = 0;
  const auto run = [&](std::int64_t stage) {
    const auto at = static_cast<std::size_t>(stage);
    return Run{stage, best.offsets[at], best.offsets[at + static_cast<std::size_t>(ranks)]};
  };
  bool any = true;
  while (any) {
    any = false;
    for (std::int64_t turn = 0; turn < ranks; ++turn) {
      for (std::int64_t a = turn; a + ranks <= stages; a += ranks) {
        for (std::int64_t b = a + ranks; b + ranks <= stages; b += ranks) {
          if (best.most - bound <= bound / kGoodEnough) return;
          const Amount before = best.most;
          const Pairs pairs(problem, best.offsets, run(a), run(b), steps);
          Amount low = bound;
          if (!search(problem, pairs, false, low, best)) return;
          any = any || best.most < before;
        }
      }
    }
  }
}

}  // namespace hfpp
