// All rows run together: whether they come to their end, and who waits for whom where they do not.
#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "dataflow.hpp"
#include "verify.hpp"

namespace hfpp {

namespace {

// What there is of one stage and microbatch.
using Cell = std::uint8_t;
constexpr Cell kForwardDone = 1;
constexpr Cell kBackwardDone = 2;
constexpr Cell kForwardArrived = 4;  // the stage's input, from another rank
constexpr Cell kBackwardArrived = 8;

class Run {
 public:
  Run(const Schedule& schedule, const StageRanks& stages, Transport transport)
      : schedule_(schedule),
        stages_(stages),
        transport_(transport),
        microbatches_(schedule.n_microbatches()),
        cells_(static_cast<std::size_t>(stages.num_stages * microbatches_)),
        ranks_(static_cast<std::size_t>(stages.pp_size)) {}

  // Whether all rows come to their end.
  bool finish();
  // "rank 0, column 1, action 0B0 waits for 1B0 of rank 1; ...", where they do not.
  std::string circle();

 private:
  // A rank does its actions in order and pauses at what is not there yet. Under rendezvous its
  // messages wait in line from `message` to `next`: they are posted, but not over.
  struct Rank {
    const Action* next;
    const Action* message;
    const Action* end;
    bool queued;
  };
  // What a rank waits for.
  struct Wait {
    const Action* here;
    Action awaited;
    std::int64_t rank;
  };

  Rank& rank_state(std::int64_t rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  Cell& cell(std::int64_t stage, std::int64_t microbatch) {
    return cells_[static_cast<std::size_t>(stage * microbatches_ + microbatch)];
  }
  void wake(std::int64_t rank) {
    Rank& state = rank_state(rank);
    if (state.queued) return;
    state.queued = true;
    queue_.push_back(static_cast<std::int32_t>(rank));
  }
  bool takes_from_this_rank(Action action, std::int64_t rank) const {
    const std::int64_t source = source_stage(action, stages_.num_stages);
    return source >= 0 && stages_.rank_of(source) == rank;
  }

  void advance(std::int64_t rank);
  bool can_run(Action action, std::int64_t rank);
  void give_results(const Action* last, std::int64_t rank);
  void post(Action message);
  bool exchange(std::int64_t rank);
  bool has_message(Rank& state) const;
  Wait wait_of(std::int64_t rank);
  std::string text_of_wait(std::int64_t rank);

  const Schedule& schedule_;
  const StageRanks& stages_;
  const Transport transport_;
  const std::int64_t microbatches_;
  std::vector<Cell> cells_;
  std::vector<Rank> ranks_;
  std::vector<std::int32_t> queue_;  // ranks that may go on
};

bool Run::finish() {
  queue_.reserve(ranks_.size());
  for (std::int64_t rank = stages_.pp_size - 1; rank >= 0; --rank) {
    const Action* const begin = schedule_.begin(rank);
    rank_state(rank) = {begin, begin, schedule_.end(rank), false};
    wake(rank);
  }
  while (!queue_.empty()) {
    const std::int64_t rank = queue_.back();
    queue_.pop_back();
    rank_state(rank).queued = false;
    advance(rank);
  }
  return std::all_of(ranks_.begin(), ranks_.end(), [this](Rank& state) {
    return state.next == state.end && !has_message(state);
  });
}

void Run::advance(std::int64_t rank) {
  Rank& state = rank_state(rank);
  do {
    for (; state.next != state.end && can_run(*state.next, rank); ++state.next) {
      const Kind kind = state.next->kind();
      if (is_compute(kind)) {
        // The parts of a group run at once: they begin when all can, and end together.
        const bool ends = state.next + 1 == state.end || !state.next[1].joined();
        if (ends) give_results(state.next, rank);
      } else if (is_send(kind) && transport_ == Transport::Buffered) {
        post(*state.next);
      }
    }
  } while (transport_ == Transport::Rendezvous && exchange(rank));
}

bool Run::can_run(Action action, std::int64_t rank) {
  const Kind kind = action.kind();
  // Waits for sends hold nobody up for good: whatever the rank posts later stands behind the send
  // in its line anyway.
  if (kind != Kind::Forward && !is_backward(kind)) return true;
  const std::int64_t source = source_stage(action, stages_.num_stages);
  if (source < 0) return true;
  const bool forward = kind == Kind::Forward;
  if (transport_ == Transport::Results || stages_.rank_of(source) == rank) {
    const Cell done = forward ? kForwardDone : kBackwardDone;
    return (cell(source, action.microbatch()) & done) != 0;
  }
  const Cell arrived = forward ? kForwardArrived : kBackwardArrived;
  return (cell(action.stage(), action.microbatch()) & arrived) != 0;
}

void Run::give_results(const Action* last, std::int64_t rank) {
  for (const Action* action = last;; --action) {
    const std::int64_t stage = action->stage();
    const bool forward = action->kind() == Kind::Forward;
    if (forward || is_backward(action->kind())) {
      Cell& mine = cell(stage, action->microbatch());
      mine = static_cast<Cell>(mine | (forward ? kForwardDone : kBackwardDone));
      const std::int64_t taker = forward ? stage + 1 : stage - 1;
      if (transport_ == Transport::Results && taker >= 0 && taker < stages_.num_stages &&
          stages_.rank_of(taker) != rank) {
        wake(stages_.rank_of(taker));
      }
    }
    if (!action->joined()) return;
  }
}

void Run::post(Action message) {
  const bool forward = message.kind() == Kind::SendForward;
  const std::int64_t peer = peer_stage(message);
  Cell& there = cell(peer, message.microbatch());
  there = static_cast<Cell>(there | (forward ? kForwardArrived : kBackwardArrived));
  wake(stages_.rank_of(peer));
}

// Moves on to the first message that is posted and not over.
bool Run::has_message(Rank& state) const {
  if (transport_ != Transport::Rendezvous) return false;
  while (state.message != state.next && !is_message(state.message->kind())) ++state.message;
  return state.message != state.next;
}

// Ends the messages at the head of the rank's line whose other end is at the head of its own.
bool Run::exchange(std::int64_t rank) {
  Rank& state = rank_state(rank);
  bool any = false;
  while (has_message(state)) {
    const Action mine = *state.message;
    const Action other = peer_action(mine);
    const std::int64_t peer = stages_.rank_of(other.stage());
    Rank& there = rank_state(peer);
    if (!has_message(there) || *there.message != other) break;
    const bool forward = mine.kind() == Kind::SendForward || mine.kind() == Kind::ReceiveForward;
    const Action receive = is_send(mine.kind()) ? other : mine;
    Cell& arrived = cell(receive.stage(), receive.microbatch());
    arrived = static_cast<Cell>(arrived | (forward ? kForwardArrived : kBackwardArrived));
    ++state.message;
    ++there.message;
    wake(peer);
    any = true;
  }
  return any;
}

// Of a rank that is not at its end. What it waits for is of a rank that is not either.
Run::Wait Run::wait_of(std::int64_t rank) {
  Rank& state = rank_state(rank);
  const bool paused = state.next != state.end;
  if (!(paused && takes_from_this_rank(*state.next, rank)) && has_message(state)) {
    const Action other = peer_action(*state.message);
    return {state.message, other, stages_.rank_of(other.stage())};
  }
  const std::int64_t source = source_stage(*state.next, stages_.num_stages);
  const std::int64_t there = stages_.rank_of(source);
  const bool forward = state.next->kind() == Kind::Forward;
  const bool message = transport_ == Transport::Buffered && there != rank;
  const Kind made = forward ? Kind::Forward : Kind::FullBackward;
  const Kind sent = forward ? Kind::SendForward : Kind::SendBackward;
  return {state.next, {message ? sent : made, source, state.next->microbatch()}, there};
}

std::string Run::text_of_wait(std::int64_t rank) {
  const Wait wait = wait_of(rank);
  const Action* const begin = schedule_.begin(wait.rank);
  const Action* const end = schedule_.end(wait.rank);
  const Action* found = std::find_if(begin, end, [&](Action action) {
    return action.alone() == wait.awaited ||
           (wait.awaited.kind() == Kind::FullBackward &&
            action.alone() == wait.awaited.as(Kind::BackwardInput));
  });
  return schedule_.place_of(rank, wait.here) + " waits for " + text_of(*found) + " of rank " +
         std::to_string(wait.rank) + " (column " +
         std::to_string(schedule_.column_of(wait.rank, found)) + ")";
}

std::string Run::circle() {
  constexpr std::int64_t kMost = 8;  // ranks named; a circle may have thousands
  std::int64_t rank = 0;
  const auto at_end = [this](Rank& state) {
    return state.next == state.end && !has_message(state);
  };
  while (at_end(rank_state(rank))) ++rank;
  std::vector<bool> seen(ranks_.size());
  while (!seen[static_cast<std::size_t>(rank)]) {
    seen[static_cast<std::size_t>(rank)] = true;
    rank = wait_of(rank).rank;
  }
  std::int64_t lowest = rank;
  std::int64_t length = 1;
  for (std::int64_t other = wait_of(rank).rank; other != rank; other = wait_of(other).rank) {
    lowest = std::min(lowest, other);
    ++length;
  }
  std::string text;
  rank = lowest;
  for (std::int64_t i = 0; i < std::min(length, kMost); ++i) {
    text += (i == 0 ? "" : "; ") + text_of_wait(rank);
    rank = wait_of(rank).rank;
  }
  if (length > kMost) {
    text += "; and " + std::to_string(length - kMost) + " more ranks of the circle";
  }
  return text;
}

}  // namespace

void check_deadlock(const Schedule& schedule, const StageRanks& stages, Transport transport) {
  Run run(schedule, stages, transport);
  if (run.finish()) return;
  std::string how = "the schedule deadlocks: ";
  if (transport == Transport::Rendezvous) {
    check_messages(schedule, stages);
    check_deadlock(schedule, stages, Transport::Buffered);
    how =
        "the schedule deadlocks where sends wait for their receives, as NCCL's do (with buffered "
        "sends, as gloo's, it would run): ";
  }
  throw ConfigError(schedule.name() + ": " + how + run.circle());
}

}  // namespace hfpp
