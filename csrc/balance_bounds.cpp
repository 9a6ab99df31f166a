// What no partition can be better than.
#include <algorithm>

#include "balance_problem.hpp"

namespace hfpp {
namespace {

// So many of the layers' costs are tried as units.
constexpr std::size_t kMostUnits = 64;
// Beyond this many sums the bound would cost more than it tells.
constexpr std::size_t kMostSums = std::size_t{1} << 12;
constexpr std::size_t kMostPairs = std::size_t{1} << 21;

using Sums = std::vector<Amount>;  // ascending, each once

void sort_once(Sums& sums) {
  std::sort(sums.begin(), sums.end());
  sums.erase(std::unique(sums.begin(), sums.end()), sums.end());
}

// All sums of one of each that are at most `most`; false where they are too many.
bool add_sets(Sums& sums, const Sums& others, Amount most) {
  if (sums.size() * others.size() > kMostPairs) return false;
  Sums both;
  for (const Amount a : sums) {
    for (const Amount b : others) {
      if (a + b > most) break;
      both.push_back(a + b);
    }
  }
  sort_once(both);
  sums = std::move(both);
  return sums.size() <= kMostSums;
}

// Sums of one run of layers at most `most` that begins in [first, last] and ends by `end`.
bool run_sums(const Problem& problem, std::int64_t first, std::int64_t last, std::int64_t end,
              Amount most, Sums& sums) {
  for (std::int64_t a = first; a <= last; ++a) {
    for (std::int64_t b = a + 1; b <= end; ++b) {
      const Amount sum = problem.cost.least(a, b);
      if (sum > most) break;
      sums.push_back(sum);
    }
    if (sums.size() > kMostPairs / 8) return false;
  }
  sort_once(sums);
  return sums.size() <= kMostSums;
}

// The largest sum up to `most`, or a negative one where there is none.
Amount largest(const Sums& sums, Amount most) {
  const auto after = std::upper_bound(sums.begin(), sums.end(), most);
  return after == sums.begin() ? Amount{-1} : *std::prev(after);
}

}  // namespace

Amount simple_bound(const Problem& problem) {
  const std::int64_t n = problem.num_layers;
  const std::int64_t ranks = problem.ranks();
  Amount bound = ceil_divide(problem.cost.least(0, n), ranks);
  Sums layers;
  layers.reserve(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) layers.push_back(problem.cost.least(i, i + 1));
  std::sort(layers.begin(), layers.end());
  // Some rank has so many layers.
  Amount lightest = 0;
  for (std::int64_t i = 0; i < (n + ranks - 1) / ranks; ++i) {
    lightest += layers[static_cast<std::size_t>(i)];
  }
  bound = std::max(bound, lightest);
  // The heaviest layer's rank has a layer on each of its other stages.
  Amount company = 0;
  for (std::int64_t k = 0; k + 1 < problem.per_rank(); ++k) {
    company += layers[static_cast<std::size_t>(k)];
  }
  bound = std::max(bound, layers.back() + company);
  // In whole units, rounded down layer by layer, a rank has no more than its own cost rounded down.
  std::size_t units = 0;
  for (std::size_t i = 0; i < layers.size() && units < kMostUnits; ++i) {
    const Amount unit = layers[i];
    if (unit == 0 || (i > 0 && layers[i - 1] == unit)) continue;
    ++units;
    Amount count = 0;
    for (const Amount layer : layers) count += layer / unit;
    bound = std::max(bound, unit * ceil_divide(count, ranks));
  }
  // Each stage has a layer that leaves enough to the stages before and after.
  for (std::int64_t rank = 0; rank < ranks; ++rank) {
    Amount sum = 0;
    for (std::int64_t k = 0; k < problem.per_rank(); ++k) {
      const std::int64_t stage = problem.layout.stage(rank, k);
      const bool first = stage == 0;
      const bool last = stage == problem.stages() - 1;
      const std::int64_t from = last && !first ? n - 1 : stage;
      const std::int64_t to = first ? 0 : n - problem.stages() + stage;
      Amount least = problem.cost.least(from, from + 1);
      for (std::int64_t i = from + 1; i <= to; ++i) {
        least = std::min(least, problem.cost.least(i, i + 1));
      }
      sum += least;
    }
    bound = std::max(bound, sum);
  }
  // The v puts both ends on one rank.
  if (problem.layout.stage(0, problem.per_rank() - 1) == problem.stages() - 1 && n > 1) {
    bound = std::max(bound, problem.cost.least(0, 1) + problem.cost.least(n - 1, n));
  }
  return bound;
}

Amount sums_bound(const Problem& problem, Amount bound, Amount most) {
  const std::int64_t n = problem.num_layers;
  const std::int64_t ranks = problem.ranks();
  const std::int64_t per_rank = problem.per_rank();
  if (!problem.cost.plain() || ranks < 2 || bound >= most) return bound;
  const bool ends_meet = problem.layout.stage(0, per_rank - 1) == problem.stages() - 1;
  Sums inner;
  Sums head;
  Sums tail;
  if (!run_sums(problem, 1, n - 2, n - 1, most, inner)) return bound;
  if (!run_sums(problem, 0, 0, n - 1, most, head)) return bound;
  for (std::int64_t a = n - 1; a > 0 && problem.cost.least(a, n) <= most; --a) {
    tail.push_back(problem.cost.least(a, n));
  }
  sort_once(tail);
  if (tail.size() > kMostSums) return bound;
  Sums middle = inner;  // of a rank with neither end
  for (std::int64_t k = 1; k < per_rank; ++k) {
    const bool last = k + 1 == per_rank;
    if (!add_sets(head, last && ends_meet ? tail : inner, most)) return bound;
    if (!ends_meet && !add_sets(tail, inner, most)) return bound;
    if (!add_sets(middle, inner, most)) return bound;
  }
  const Amount total = problem.cost.least(0, n);
  const auto possible = [&](Amount limit) {
    const Amount first = largest(head, limit);
    const Amount last = ends_meet ? Amount{0} : largest(tail, limit);
    const std::int64_t others = ranks - (ends_meet ? 1 : 2);
    const Amount each = others > 0 ? largest(middle, limit) : Amount{0};
    return first >= 0 && last >= 0 && each >= 0 && first + last + others * each >= total;
  };
  Amount low = bound;
  Amount high = most;  // of a partition: possible
  while (low < high) {
    const Amount limit = low + (high - low) / 2;
    if (possible(limit)) {
      high = limit;
    } else {
      low = limit + 1;
    }
  }
  return low;
}

}  // namespace hfpp
