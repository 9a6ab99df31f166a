// What no partition can be better than, where the layers are of few kinds: packing them into ranks
// in any order.
#include <algorithm>

#include "balance_problem.hpp"

namespace hfpp {
namespace {

constexpr std::size_t kMostKinds = 4;
constexpr std::int64_t kMostSteps = 4'000'000;
constexpr int kHalvings = 12;

struct Kind {
  Amount cost;
  std::int64_t count;
};

// The kind with most layers is packed greedily around the others, of which every choice is tried.
class Packing {
 public:
  Packing(const Problem& problem, std::vector<Kind> kinds)
      : problem_(problem), main_(kinds.back()), others_(kinds.begin(), kinds.end() - 1) {
    for (const Kind& kind : others_) {
      strides_.push_back(states_);
      states_ *= kind.count + 1;
    }
  }

  // Whether it would be exhausted before all ranks have looked at all states: time and memory for
  // nothing.
  bool hopeless() const { return states_ > kMostSteps / problem_.ranks(); }
  bool exhausted() const { return steps_ > kMostSteps; }

  // Whether the layers fit the ranks, none over the limit. False also where steps ran out.
  bool possible(Amount limit) {
    const Problem& p = problem_;
    const std::int64_t n = p.num_layers;
    packed_.assign(static_cast<std::size_t>(states_), -1);
    packed_[0] = 0;
    // The first and the last layer have their own ranks.
    const bool ends_meet = p.layout.stage(0, p.per_rank() - 1) == p.stages() - 1;
    const Amount head = p.cost.least(0, 1);
    const Amount tail = p.cost.least(n - 1, n);
    std::vector<Amount> room(static_cast<std::size_t>(p.ranks()), limit);
    room.front() -= head;
    (ends_meet ? room.front() : room.back()) -= tail;
    for (const Amount each : room) {
      if (each < 0) return false;
      add_rank(each);
      if (exhausted()) return false;
    }
    return packed_.back() >= main_.count;
  }

 private:
  void add_rank(Amount room) {
    std::vector<std::int64_t> after(packed_.size(), -1);
    for (std::int64_t state = 0; state < states_; ++state) {
      const std::int64_t packed = packed_[static_cast<std::size_t>(state)];
      if (packed >= 0) choose(0, state, state, packed, room, after);
    }
    packed_ = std::move(after);
  }

  // How many of the other kinds, from `kind` on, the rank takes; `from` counts those taken before.
  void choose(std::size_t kind, std::int64_t from, std::int64_t to, std::int64_t packed,
              Amount room, std::vector<std::int64_t>& after) {
    if (++steps_ > kMostSteps) return;
    if (kind == others_.size()) {
      const auto at = static_cast<std::size_t>(to);
      const Amount fit = main_.cost == 0 ? Amount{main_.count} : room / main_.cost;
      const Amount sum = std::min<Amount>(packed + fit, main_.count);
      after[at] = std::max(after[at], static_cast<std::int64_t>(sum));
      return;
    }
    const std::int64_t taken = from / strides_[kind] % (others_[kind].count + 1);
    for (std::int64_t more = 0; taken + more <= others_[kind].count; ++more) {
      const Amount left = room - more * others_[kind].cost;
      if (left < 0) break;
      choose(kind + 1, from, to + more * strides_[kind], packed, left, after);
    }
  }

  const Problem& problem_;
  Kind main_;
  std::vector<Kind> others_;
  std::vector<std::int64_t> strides_;
  std::int64_t states_ = 1;
  std::int64_t steps_ = 0;
  std::vector<std::int64_t> packed_;  // by layers of the other kinds: most layers of the main kind
};

}  // namespace

Amount kinds_bound(const Problem& problem, Amount bound, Amount most) {
  const std::int64_t n = problem.num_layers;
  if (!problem.cost.plain() || n < 3 || bound >= most) return bound;
  std::vector<Kind> kinds;
  for (std::int64_t i = 1; i < n - 1; ++i) {
    const Amount cost = problem.cost.least(i, i + 1);
    const auto same = std::find_if(kinds.begin(), kinds.end(),
                                   [cost](const Kind& kind) { return kind.cost == cost; });
    if (same != kinds.end()) {
      ++same->count;
    } else if (kinds.size() == kMostKinds) {
      return bound;
    } else {
      kinds.push_back(Kind{cost, 1});
    }
  }
  std::stable_sort(kinds.begin(), kinds.end(),
                   [](const Kind& a, const Kind& b) { return a.count < b.count; });
  Packing packing(problem, std::move(kinds));
  if (packing.hopeless()) return bound;
  Amount limit = most - 1;  // most often there is nothing below what was found
  Amount high = most;
  for (int halving = 0; halving < kHalvings && bound < high; ++halving) {
    const bool possible = packing.possible(limit);
    if (packing.exhausted()) break;
    if (possible) {
      high = limit;
    } else {
      bound = limit + 1;
    }
    limit = bound + (high - bound) / 2;
  }
  return bound;
}

}  // namespace hfpp
