// V schedules that hold no more activations than they may: the best order that a search finds.
#include "v_limited.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace hfpp {

namespace {

constexpr std::size_t kNone = kVParts.size();
constexpr std::size_t kFirstWeights = 4;  // of the parts: the two that nothing waits for

// What a rank prefers.
struct Rule {
  std::array<std::size_t, kFirstWeights> precedence;  // of forwards and input parts
  bool weights_for_memory;  // before all others where a forward lacks nothing but memory
  // Forwards of chunk 0 leave room for those of chunk 1, which come back sooner the later the rank:
  // for `spare` activations, and `share` more per rank before this one.
  std::int64_t spare;
  std::int64_t share_above, share_below;

  std::int64_t most_of_chunk_0(std::int64_t rank, std::int64_t limit) const {
    return std::max<std::int64_t>(1, limit - spare - rank * share_above / share_below);
  }
};

std::vector<Rule> rules() {
  std::vector<Rule> all;
  for (const auto& precedence :
       {std::array<std::size_t, kFirstWeights>{3, 1, 0, 2}, {1, 0, 3, 2}, {2, 1, 0, 3}}) {
    for (const bool weights_for_memory : {true, false}) {
      for (const std::int64_t spare : {2, 1}) {
        for (const auto& [above, below] : {std::pair{1, 3}, {2, 5}, {1, 2}, {2, 3}}) {
          all.push_back({precedence, weights_for_memory, spare, above, below});
        }
      }
    }
  }
  return all;
}

// All ranks, unit by unit.
class Run {
 public:
  Run(std::int64_t pp_size, std::int64_t n_microbatches)
      : n_(n_microbatches), done_(static_cast<std::size_t>(pp_size)), order_(done_.size()) {}

  // The units that every rank idles, where they are fewer than `idle_to_beat`; else that many.
  // `next` gives the part that a rank computes next, or kNone.
  template <class Next>
  std::int64_t idle(std::int64_t idle_to_beat, bool record, const Next& next) {
    std::vector<std::size_t> chosen(done_.size());
    const std::int64_t work = static_cast<std::int64_t>(kVParts.size()) * n_;
    std::int64_t now = 0;
    for (std::size_t working = done_.size(); working > 0; ++now) {
      // All ranks choose before any computes: what ends now arrives with the next unit.
      for (std::size_t rank = 0; rank < done_.size(); ++rank) chosen[rank] = next(rank);
      bool stands = true;
      for (std::size_t rank = 0; rank < done_.size(); ++rank) {
        Rank& here = done_[rank];
        if (chosen[rank] != kNone) {
          stands = false;
          ++here.parts[chosen[rank]];
          if (++here.all == work) --working;
          if (record) order_[rank].push_back(static_cast<std::uint8_t>(chosen[rank]));
        }
        if (here.all < work && now + 1 - here.all >= idle_to_beat) return idle_to_beat;
      }
      if (stands) return idle_to_beat;
    }
    return std::min(now - work, idle_to_beat);
  }

  // How many of a part a rank has done.
  std::int64_t done(std::size_t rank, std::size_t part) const { return done_[rank].parts[part]; }

  bool has_input(std::size_t rank, std::size_t part) const {
    const std::int64_t m = done(rank, part);
    const std::size_t last = done_.size() - 1;
    if (m == n_) return false;
    switch (part) {
      case 0:
        return rank == 0 || done(rank - 1, 0) > m;
      case 1:
        return (rank == last ? done(rank, 0) : done(rank + 1, 1)) > m;
      case 2:
        return done(rank, 1) > m && (rank == 0 || done(rank - 1, 2) > m);
      case 3:
        return (rank == last ? done(rank, 2) : done(rank + 1, 3)) > m;
      default:
        return done(rank, part - 2) > m;  // the input part of the same chunk
    }
  }

  std::size_t by_rule(const Rule& rule, std::size_t rank, std::int64_t limit) const {
    const std::int64_t of_chunk_0 = done(rank, 0) - done(rank, 5);
    const std::int64_t held = of_chunk_0 + done(rank, 1) - done(rank, 4);
    const std::int64_t most = rule.most_of_chunk_0(static_cast<std::int64_t>(rank), limit);
    std::size_t found = kNone;
    bool lacks_memory = false;
    for (const std::size_t part : rule.precedence) {
      if (!has_input(rank, part)) continue;
      if (part < 2 && (held == limit || (part == 0 && of_chunk_0 >= most))) {
        lacks_memory = true;
        continue;
      }
      found = part;
      break;
    }
    if (found != kNone && !(lacks_memory && rule.weights_for_memory)) return found;
    const std::size_t behind = done(rank, 4) <= done(rank, 5) ? 4 : 5;
    for (const std::size_t part : {behind, 9 - behind}) {
      if (has_input(rank, part)) return part;
    }
    return found;
  }

  VOrder take_order() { return std::move(order_); }

 private:
  struct Rank {
    std::array<std::int64_t, kVParts.size()> parts{};
    std::int64_t all = 0;
  };

  std::int64_t n_;
  std::vector<Rank> done_;
  VOrder order_;
};

}  // namespace

std::int64_t v_min_activations(std::int64_t pp_size, std::int64_t n_microbatches) {
  return 2 * std::min(n_microbatches, (pp_size + 4) / 3);
}

std::int64_t v_half_activations(std::int64_t pp_size, std::int64_t n_microbatches) {
  return 2 * std::min(n_microbatches, pp_size / 2 + 1);
}

std::int64_t zb_v_activations(std::int64_t pp_size, std::int64_t n_microbatches) {
  return 2 * std::min(n_microbatches, pp_size);
}

bool can_search_v(std::int64_t pp_size, std::int64_t n_microbatches) {
  constexpr std::int64_t kMostSteps = std::int64_t{1} << 22;  // of ranks, under as many limits
  return 6 * n_microbatches + 4 * pp_size <= kMostSteps / pp_size / pp_size;
}

std::int64_t idle_units(const VOrder& order, std::int64_t n_microbatches) {
  std::vector<std::size_t> position(order.size());
  Run run(static_cast<std::int64_t>(order.size()), n_microbatches);
  const std::int64_t forever = 6 * static_cast<std::int64_t>(order.size()) * n_microbatches;
  return run.idle(forever, false, [&](std::size_t rank) {
    if (position[rank] == order[rank].size()) return kNone;
    const std::size_t part = order[rank][position[rank]];
    if (!run.has_input(rank, part)) return kNone;
    ++position[rank];
    return part;
  });
}

VOrder search_v_order(std::int64_t pp_size, std::int64_t n_microbatches,
                      std::int64_t activation_limit, std::int64_t idle_to_beat) {
  static const std::vector<Rule> kRules = rules();
  const auto run_by = [&](Run& run, const Rule& rule, std::int64_t limit, bool record) {
    return run.idle(idle_to_beat + (record ? 1 : 0), record,
                    [&](std::size_t rank) { return run.by_rule(rule, rank, limit); });
  };
  const Rule* best = nullptr;
  std::int64_t best_limit = 0;
  for (std::int64_t limit = activation_limit; limit >= v_min_activations(pp_size, n_microbatches);
       --limit) {
    for (const Rule& rule : kRules) {
      Run run(pp_size, n_microbatches);
      const std::int64_t idle = run_by(run, rule, limit, false);
      if (idle >= idle_to_beat) continue;
      idle_to_beat = idle;
      best_limit = limit;
      best = &rule;
    }
  }
  if (best == nullptr) return {};
  Run run(pp_size, n_microbatches);
  run_by(run, *best, best_limit, true);
  return run.take_order();
}

}  // namespace hfpp
