// Sends and receives, placed by rounds.
#include "messages.hpp"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "dataflow.hpp"
#include "error.hpp"
#include "table.hpp"

namespace hfpp {

namespace {

using Round = std::uint32_t;  // no table has more actions than 32 bits can count
using Index = std::uint32_t;  // of an action in the table

// Inputs of computations, one place for each stage, microbatch and direction.
class Inputs {
 public:
  explicit Inputs(const Schedule& table)
      : stages_(table.num_stages()), microbatches_(table.n_microbatches()) {
    const std::int64_t each = checked_multiply(stages_, microbatches_, "stages * microbatches");
    if (each > table.num_actions()) {
      throw ConfigError(table.name() + ": " + std::to_string(table.num_actions()) +
                        " actions are fewer than its " + std::to_string(stages_) + " stages * " +
                        std::to_string(microbatches_) + " microbatches: the table is incomplete");
    }
    places_ = static_cast<std::size_t>(2 * each);
  }

  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  std::size_t count() const { return places_; }

  // What the computation takes from another stage.
  std::size_t taken_by(Action action) const {
    if (action.kind() == Kind::Forward && action.stage() > 0) return place(0, action, 0);
    if (is_backward(action.kind()) && action.stage() < stages_ - 1) return place(1, action, 0);
    return kNone;
  }
  // Whose input the computation makes, by its stage; -1: nobody's.
  std::int64_t taker(Action action) const {
    if (action.kind() == Kind::Forward && action.stage() < stages_ - 1) return action.stage() + 1;
    return is_backward(action.kind()) ? action.stage() - 1 : -1;
  }
  std::size_t made_by(Action action) const {
    return action.kind() == Kind::Forward ? place(0, action, 1) : place(1, action, -1);
  }

 private:
  std::size_t place(std::int64_t direction, Action action, std::int64_t hop) const {
    const std::int64_t stage = direction * stages_ + action.stage() + hop;
    return static_cast<std::size_t>(stage * microbatches_ + action.microbatch());
  }

  std::int64_t stages_;
  std::int64_t microbatches_;
  std::size_t places_ = 0;
};

class Messages {
 public:
  Messages(const Schedule& table, const Schedule& source)
      : table_(table),
        source_(source),
        ranks_(table.stage_to_rank()),
        inputs_(source),
        first_(table.pp_size() > 0 ? table.begin(0) : nullptr) {}

  Schedule run() {
    find_rounds();
    sort_sends();
    return write();
  }

 private:
  std::int64_t rank_of(std::int64_t stage) const { return ranks_[static_cast<std::size_t>(stage)]; }
  std::size_t index(const Action* action) const {
    return static_cast<std::size_t>(action - first_);
  }
  // The rank that the action sends to; -1: none.
  std::int64_t receiver(Action action) const {
    const std::int64_t taker = inputs_.taker(action);
    if (taker < 0 || rank_of(taker) == rank_of(action.stage())) return -1;
    return rank_of(taker);
  }

  void find_rounds() {
    rounds_.assign(static_cast<std::size_t>(table_.num_actions()), 0);
    earliest_.assign(inputs_.count(), 0);
    const auto ranks = static_cast<std::size_t>(table_.pp_size());
    next_.resize(ranks);
    waits_for_.assign(ranks, Inputs::kNone);
    std::vector<std::int64_t> able(ranks);
    std::iota(able.rbegin(), able.rend(), 0);
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      next_[rank] = table_.begin(static_cast<std::int64_t>(rank));
    }
    while (!able.empty()) {
      const std::int64_t rank = able.back();
      able.pop_back();
      advance(rank, able);
    }
    for (std::int64_t rank = 0; rank < table_.pp_size(); ++rank) {
      if (next_[static_cast<std::size_t>(rank)] != table_.end(rank)) deadlock(rank);
    }
  }

  // Runs a rank as far as its inputs allow; ranks whose input that makes go to `able`.
  void advance(std::int64_t rank, std::vector<std::int64_t>& able) {
    const auto r = static_cast<std::size_t>(rank);
    const Action* const end = table_.end(rank);
    const Action* first = next_[r];
    Round before = first == table_.begin(rank) ? 0 : rounds_[index(first - 1)];
    while (first != end) {
      Round round = before + 1;
      const Action* const last = group_end(first, end);
      for (const Action* action = first; action != last; ++action) {
        const std::size_t input = inputs_.taken_by(*action);
        if (input == Inputs::kNone) continue;
        if (earliest_[input] == 0) {
          next_[r] = first;
          waits_for_[r] = input;
          return;
        }
        round = std::max(round, earliest_[input]);
      }
      for (const Action* action = first; action != last; ++action) {
        rounds_[index(action)] = round;
        hand_on(action, rank, round, able);
      }
      before = round;
      first = last;
    }
    next_[r] = end;
  }

  void hand_on(const Action* action, std::int64_t rank, Round round,
               std::vector<std::int64_t>& able) {
    const std::int64_t taker = inputs_.taker(*action);
    if (taker < 0) return;
    const std::size_t made = inputs_.made_by(*action);
    if (earliest_[made] != 0) {
      throw ConfigError(table_.name() + ": " + source_place(rank, action) +
                        ": its result is there already; it is made once");
    }
    const std::int64_t peer = rank_of(taker);
    earliest_[made] = peer > rank ? round : round + 1;  // lower ranks had their turn in this round
    const auto p = static_cast<std::size_t>(peer);
    if (waits_for_[p] == made) {
      waits_for_[p] = Inputs::kNone;
      able.push_back(peer);
    }
  }

  [[noreturn]] void deadlock(std::int64_t rank) const {
    throw ConfigError(table_.name() + ": the schedule deadlocks: " +
                      source_place(rank, next_[static_cast<std::size_t>(rank)]) +
                      " never gets its input");
  }

  // Where a computation stands in the caller's table: found by its number among those of the rank.
  std::string source_place(std::int64_t rank, const Action* action) const {
    const auto computes = [](Action other) { return is_compute(other.kind()); };
    auto before = std::count_if(table_.begin(rank), action, computes);
    const Action* place = source_.begin(rank);
    while (!computes(*place) || before-- > 0) ++place;
    return source_.place_of(rank, place);
  }

  // Sends by round, then rank, then place: the order in which torch comes to them.
  void sort_sends() {
    const Round last = rounds_.empty() ? 0 : *std::max_element(rounds_.begin(), rounds_.end());
    std::vector<Index> begins(static_cast<std::size_t>(last) + 2, 0);
    receives_.assign(static_cast<std::size_t>(table_.pp_size()) + 1, 0);
    std::size_t sends = 0;
    for (std::size_t i = 0; i < rounds_.size(); ++i) {
      const std::int64_t peer = receiver(first_[i]);
      if (peer < 0) continue;
      ++sends;
      ++begins[rounds_[i] + 1];
      ++receives_[static_cast<std::size_t>(peer) + 1];
    }
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::partial_sum(receives_.begin(), receives_.end(), receives_.begin());
    std::vector<Index> sorted(sends);
    for (std::size_t i = 0; i < rounds_.size(); ++i) {
      if (receiver(first_[i]) >= 0) sorted[begins[rounds_[i]]++] = static_cast<Index>(i);
    }
    arrivals_.resize(sends);
    std::vector<Index> next(receives_.begin(), receives_.end() - 1);
    for (const Index i : sorted) {
      arrivals_[next[static_cast<std::size_t>(receiver(first_[i]))]++] = i;
    }
  }

  Schedule write() const {
    const std::int64_t total =
        table_.num_actions() + 2 * static_cast<std::int64_t>(arrivals_.size());
    if (total > Table::kMaxBytes / static_cast<std::int64_t>(sizeof(Action))) {
      throw std::overflow_error(table_.name() + ": a schedule of " + std::to_string(total) +
                                " actions is over the limit: use smaller sizes.");
    }
    Schedule out(table_.name());
    out.reserve(static_cast<std::size_t>(table_.pp_size()), static_cast<std::size_t>(total));
    for (std::int64_t rank = 0; rank < table_.pp_size(); ++rank) {
      const Index* arrival = arrivals_.data() + receives_[static_cast<std::size_t>(rank)];
      const Index* const last = arrivals_.data() + receives_[static_cast<std::size_t>(rank) + 1];
      const Action* const end = table_.end(rank);
      for (const Action* action = table_.begin(rank); action != end;) {
        const Round round = rounds_[index(action)];
        for (; arrival != last && arrives_before(*arrival, round, rank); ++arrival) {
          receive(*arrival, out);
        }
        const Action* const last_part = group_end(action, end);
        std::for_each(action, last_part, [&](Action part) { out.add(part); });
        std::for_each(action, last_part, [&](Action part) { send(part, out); });
        action = last_part;
      }
      for (; arrival != last; ++arrival) receive(*arrival, out);
      out.end_row();
    }
    return out;
  }

  bool arrives_before(Index sender, Round round, std::int64_t rank) const {
    if (rounds_[sender] != round) return rounds_[sender] < round;
    return rank_of(first_[sender].stage()) < rank;
  }
  void receive(Index sender, Schedule& out) const {
    const Action action = first_[sender];
    const Kind kind = action.kind() == Kind::Forward ? Kind::ReceiveForward : Kind::ReceiveBackward;
    out.add({kind, inputs_.taker(action), action.microbatch()});
  }
  void send(Action action, Schedule& out) const {
    if (receiver(action) < 0) return;
    const Kind kind = action.kind() == Kind::Forward ? Kind::SendForward : Kind::SendBackward;
    out.add({kind, action.stage(), action.microbatch()});
  }

  const Schedule& table_;
  const Schedule& source_;
  std::vector<std::int32_t> ranks_;  // by stage
  Inputs inputs_;
  const Action* first_;
  std::vector<Round> rounds_;    // by action
  std::vector<Round> earliest_;  // by input: the first round in which it can be used; 0: not yet
  std::vector<const Action*> next_;     // by rank
  std::vector<std::size_t> waits_for_;  // by rank
  std::vector<std::size_t> receives_;   // by rank: where its arrivals begin
  std::vector<Index> arrivals_;         // sending actions, by receiving rank
};

}  // namespace

Schedule with_messages(const Schedule& table, const Schedule& source) {
  return Messages(table, source).run();
}

Schedule with_send_waits(const Schedule& table) {
  Schedule out(table.name());
  out.reserve(static_cast<std::size_t>(table.pp_size()),
              static_cast<std::size_t>(table.num_actions()));
  const Inputs inputs(table);
  std::vector<bool> pending(inputs.count(), false);
  const auto place = [&](Action action) {
    return static_cast<std::size_t>(action.stage() * table.n_microbatches() + action.microbatch());
  };
  const auto wait = [&](Kind kind, Action action) {
    out.add({kind, action.stage(), action.microbatch()});
  };
  for (std::int64_t rank = 0; rank < table.pp_size(); ++rank) {
    const Action* const end = table.end(rank);
    for (const Action* action = table.begin(rank); action != end;) {
      const Action* const group = action;
      action = group_end(group, end);
      std::for_each(group, action, [&](Action part) { out.add(part); });
      for (const Action* part = group; part != action; ++part) {
        if (part->kind() == Kind::SendForward) {
          if (part->stage() >= table.num_stages() || pending[place(*part)]) {
            throw ConfigError(table.name() + ": " + table.place_of(rank, part) +
                              " sends what its stage does not have, or sends it again");
          }
          pending[place(*part)] = true;
        } else if (is_backward(part->kind()) && pending[place(*part)]) {
          pending[place(*part)] = false;
          wait(Kind::WaitSendForward, *part);
        }
      }
    }
    for (const Action* action = table.begin(rank); action != end; ++action) {
      if (action->kind() == Kind::SendBackward) wait(Kind::WaitSendBackward, *action);
      if (action->kind() == Kind::SendForward && pending[place(*action)]) {
        pending[place(*action)] = false;
        wait(Kind::WaitSendForward, *action);
      }
    }
    out.end_row();
  }
  return out;
}

}  // namespace hfpp
