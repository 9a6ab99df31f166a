// The step of each action: one after the one before it, or that of the send it waits for.
#include "lock_step.hpp"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "dataflow.hpp"
#include "transfers.hpp"

namespace hfpp {

namespace {

constexpr std::int32_t kNever = -1;

class Walk {
 public:
  explicit Walk(const Schedule& schedule)
      : schedule_(schedule),
        stages_(schedule.num_stages()),
        microbatches_(schedule.n_microbatches()),
        ranks_(schedule.stage_to_rank()),
        steps_(Table::make<std::int32_t>({schedule.num_actions()}, "the actions of a schedule")),
        rows_(static_cast<std::size_t>(schedule.pp_size())) {
    const auto pairs = static_cast<std::size_t>(stage_microbatches(schedule));
    there_.resize(pairs, 0);
    sent_.resize(2 * pairs, kNever);
  }

  LockStep run() {
    for (std::int64_t rank = schedule_.pp_size(); rank-- > 0;) {
      rows_[static_cast<std::size_t>(rank)].next = schedule_.begin(rank);
      ready_.push_back(rank);
    }
    while (!ready_.empty()) {
      const std::int64_t rank = ready_.back();
      ready_.pop_back();
      walk(rank);
    }
    std::int64_t count = 0;
    for (std::int64_t rank = 0; rank < schedule_.pp_size(); ++rank) {
      const Row& row = rows_[static_cast<std::size_t>(rank)];
      const Action* const next = row.next;
      count = std::max(count, std::int64_t{row.step});
      if (next != schedule_.end(rank)) {
        fail(rank, next, "waits for " + text_of(peer_action(*next)) + ", which never comes");
      }
    }
    return {std::move(steps_), count};
  }

 private:
  struct Row {
    const Action* next = nullptr;
    std::int64_t waits_for = -1;  // the index of a message
    std::int32_t step = 0;
  };

  // What is on a stage's rank of a microbatch.
  static constexpr std::uint8_t kOutput = 1;    // of the stage itself
  static constexpr std::uint8_t kGradient = 2;  // of its inputs
  static constexpr std::uint8_t kReceivedInput = 4;
  static constexpr std::uint8_t kReceivedGradient = 8;

  void walk(std::int64_t rank) {
    Row& row = rows_[static_cast<std::size_t>(rank)];
    const Action* const end = schedule_.end(rank);
    std::int32_t* steps = steps_.data<std::int32_t>() + (row.next - schedule_.begin(0));
    while (row.next != end) {
      const Action* const first = row.next;
      // The rank comes back to its row after many others: what follows is on its way by then.
      __builtin_prefetch(first + 8);
      __builtin_prefetch(steps + 16, 1);
      const Action* const last = group_end(first, end);
      const Kind kind = first->kind();
      const bool takes_a_step = is_compute(kind) || is_message(kind);
      if (is_compute(kind)) {
        for (const Action* part = first; part != last; ++part) check_inputs(rank, part);
        for (const Action* part = first; part != last; ++part) note_result(*part);
      } else if (is_message(kind)) {
        if (last - first > 1) fail(rank, first, "an overlapped group holds computations only");
        if (!pass_on(rank, row, first)) return;
      }
      for (const Action* part = first; part != last; ++part) *steps++ = row.step;
      if (takes_a_step) ++row.step;
      row.next = last;
    }
  }

  std::uint8_t& there(std::int64_t stage, std::int64_t microbatch) {
    return there_[static_cast<std::size_t>(stage * microbatches_ + microbatch)];
  }

  // What a computation takes is on its rank by the order of the row, or never.
  void check_inputs(std::int64_t rank, const Action* part) {
    if (!is_compute(part->kind())) fail(rank, part, "an overlapped group holds computations only");
    const std::int64_t source = source_stage(*part, stages_);
    if (source < 0) return;
    const bool gradient = is_backward(part->kind());
    const bool here = ranks_[static_cast<std::size_t>(source)] == rank;
    const std::uint8_t found =
        here ? there(source, part->microbatch()) : there(part->stage(), part->microbatch());
    const std::uint8_t wanted =
        here ? (gradient ? kGradient : kOutput) : (gradient ? kReceivedGradient : kReceivedInput);
    if ((found & wanted) != 0) return;
    const Kind giver = here ? (gradient ? Kind::FullBackward : Kind::Forward)
                            : (gradient ? Kind::ReceiveBackward : Kind::ReceiveForward);
    const Action before(giver, here ? source : part->stage(), part->microbatch());
    fail(rank, part, text_of(part->alone()) + " comes without " + text_of(before) + " before it");
  }

  void note_result(Action part) {
    std::uint8_t& now = there(part.stage(), part.microbatch());
    if (part.kind() == Kind::Forward) now |= kOutput;
    if (is_backward(part.kind())) now |= kGradient;
  }

  // A send, which is ready when its value is made, or a receive; false where it has to wait.
  bool pass_on(std::int64_t rank, Row& row, const Action* action) {
    const std::int64_t peer = peer_stage(*action);
    if (action->stage() >= stages_ || peer < 0 || peer >= stages_) {
      fail(rank, action, "there is no stage at the other end");
    }
    if (ranks_[static_cast<std::size_t>(action->stage())] != rank) {
      fail(rank, action, "stage " + std::to_string(action->stage()) + " lives on another rank");
    }
    const bool sends = is_send(action->kind());
    const bool gradient = is_gradient(action->kind());
    const std::int64_t index =
        ((gradient ? stages_ : 0) + (sends ? action->stage() : peer)) * microbatches_ +
        action->microbatch();
    std::int32_t& sent = sent_[static_cast<std::size_t>(index)];
    std::uint8_t& now = there(action->stage(), action->microbatch());
    if (sends) {
      if ((now & (gradient ? kGradient : kOutput)) == 0) {
        fail(rank, action, "it comes before what it sends");
      }
      sent = row.step;
      const std::int64_t taker = ranks_[static_cast<std::size_t>(peer)];
      Row& other = rows_[static_cast<std::size_t>(taker)];
      if (other.waits_for == index) {
        other.waits_for = -1;
        ready_.push_back(taker);
      }
      return true;
    }
    if (sent == kNever) {
      row.waits_for = index;
      return false;
    }
    row.step = std::max(row.step, sent);
    now |= gradient ? kReceivedGradient : kReceivedInput;
    return true;
  }

  [[noreturn]] void fail(std::int64_t rank, const Action* action, const std::string& what) const {
    throw ConfigError(schedule_.name() + ": " + schedule_.place_of(rank, action) + ": " + what);
  }

  const Schedule& schedule_;
  const std::int64_t stages_;
  const std::int64_t microbatches_;
  const std::vector<std::int32_t> ranks_;
  Table steps_;
  std::vector<Row> rows_;
  std::vector<std::int64_t> ready_;  // ranks that may go on
  std::vector<std::uint8_t> there_;  // by stage and microbatch
  std::vector<std::int32_t> sent_;   // the step of each message's send
};

}  // namespace

LockStep lock_step(const Schedule& schedule) {
  return Walk(schedule).run();
}

}  // namespace hfpp
