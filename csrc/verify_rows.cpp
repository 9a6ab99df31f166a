// One rank's actions by themselves: complete, once each, in order.
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "dataflow.hpp"
#include "verify.hpp"

namespace hfpp {

namespace {

// What a rank has done for one stage and microbatch: a bit per kind, and two more.
using Cell = std::uint16_t;
constexpr Cell bit(Kind kind) {
  return static_cast<Cell>(1U << static_cast<unsigned>(kind));
}
// Done by a part of the group that is being read: the group's other parts run at the same time.
constexpr Cell kForwardInGroup = 1U << 11;
constexpr Cell kInputInGroup = 1U << 12;

// What a rank has done for a whole stage.
struct StageState {
  enum class Weights : std::uint8_t { Unsaid, Sharded, Fetched, Used };
  Weights weights = Weights::Unsaid;
  const Action* unshard = nullptr;        // the last
  const Action* first_compute = nullptr;  // where nothing was said about the weights before
  std::int64_t backwards = 0;
  const Action* reduction = nullptr;
  const Action* reduction_wait = nullptr;
};

class RowCheck {
 public:
  RowCheck(const Schedule& schedule, const StageRanks& stages)
      : schedule_(schedule),
        stages_(stages),
        microbatches_(schedule.n_microbatches()),
        communicates_(schedule.has_communication()),
        states_(static_cast<std::size_t>(stages.per_rank())) {}

  // The most activations at once; `over` is the first action at which they are more than the limit.
  std::int64_t check(std::int64_t rank, std::int64_t limit, const Action*& over);
  // Where any wait for a send is spelled out, every send has one.
  void check_send_waits() const;

 private:
  void check_action(const Action* action);
  void check_compute(const Action* action, Cell& cell);
  void check_message(const Action* action, Cell cell) const;
  void check_weights(const Action* action, StageState& state) const;
  void check_reduction(const Action* action, StageState& state);
  void check_end() const;
  void end_group();

  Cell& cell_of(Action action) {
    return cells_[static_cast<std::size_t>(stages_.index_on_rank(action.stage()) * microbatches_ +
                                           action.microbatch())];
  }
  bool in_group(const Action* action) const {
    return action->joined() || (action + 1 != schedule_.end(rank_) && action[1].joined());
  }
  [[noreturn]] void fail(const Action* action, const std::string& problem) const {
    fail_at(schedule_, rank_, action, problem);
  }
  [[noreturn]] void fail_without(const Action* action, const std::string& before) const {
    fail(action, text_of(*action) + " comes without " + before + " before it on this rank");
  }
  [[noreturn]] void fail_doubled(const Action* action) const {
    fail(action, text_of(*action) + " already ran at " + column_of(*action) + "; it runs once");
  }
  // Of the first action in the row that equals this one.
  std::string column_of(Action like) const {
    const Action* found = std::find_if(schedule_.begin(rank_), schedule_.end(rank_),
                                       [=](Action a) { return a.alone() == like.alone(); });
    return "column " + std::to_string(schedule_.column_of(rank_, found));
  }

  const Schedule& schedule_;
  const StageRanks& stages_;
  const std::int64_t microbatches_;
  const bool communicates_;

  std::int64_t rank_ = 0;  // and what is known of its row so far
  std::vector<Cell> cells_;
  std::vector<Cell*> group_cells_;
  std::vector<StageState> states_;
  std::int64_t forwards_ = 0;
  std::int64_t backwards_ = 0;
  std::int64_t unwaited_sends_ = 0;
  const Action* pending_reduction_ = nullptr;
  const Action* early_reduction_ = nullptr;  // begun while another one was pending
  bool waits_for_reductions_ = false;

  bool waits_for_sends_ = false;         // any rank so far
  std::int64_t rank_without_wait_ = -1;  // the first with a send that has none
};

std::int64_t RowCheck::check(std::int64_t rank, std::int64_t limit, const Action*& over) {
  rank_ = rank;
  const std::int64_t cells =
      checked_multiply(stages_.per_rank(), microbatches_, "stages of a rank * microbatches");
  // A file may name any microbatch. So many more cells than actions say that most are missing.
  if (cells / 4 > schedule_.size(rank) + 1024) fail_missing(schedule_, stages_, rank);
  cells_.assign(static_cast<std::size_t>(cells), 0);
  std::fill(states_.begin(), states_.end(), StageState{});
  group_cells_.clear();
  forwards_ = backwards_ = unwaited_sends_ = 0;
  pending_reduction_ = early_reduction_ = nullptr;
  waits_for_reductions_ = false;

  std::int64_t peak = 0;
  std::int64_t freed = 0;  // by the columns before: what a group frees is there until its end
  for (const Action* action = schedule_.begin(rank); action != schedule_.end(rank); ++action) {
    if (!action->joined()) {
      end_group();
      freed = backwards_;
    }
    check_action(action);
    const std::int64_t live = forwards_ - freed;
    if (live > peak) {
      peak = live;
      if (peak > limit && over == nullptr) over = action;
    }
  }
  if (forwards_ != cells || backwards_ != cells) fail_missing(schedule_, stages_, rank);
  check_end();
  if (unwaited_sends_ != 0 && rank_without_wait_ < 0) rank_without_wait_ = rank;
  return peak;
}

void RowCheck::check_action(const Action* action) {
  const Kind kind = action->kind();
  if (!is_compute(kind) && in_group(action)) fail(action, "only computations can be overlapped");
  if (kind == Kind::Idle) return;
  if (!stages_.lives_on(action->stage(), rank_)) {
    fail(action, "stage " + std::to_string(action->stage()) + " does not live on this rank");
  }
  StageState& state = states_[static_cast<std::size_t>(stages_.index_on_rank(action->stage()))];
  if (!has_microbatch(kind)) {
    if (kind == Kind::Unshard || kind == Kind::Reshard) return check_weights(action, state);
    return check_reduction(action, state);
  }
  Cell& cell = cell_of(*action);
  if ((cell & bit(kind)) != 0) fail_doubled(action);
  if (is_compute(kind)) {
    check_compute(action, cell);
    check_weights(action, state);
    if (kind == Kind::FullBackward || kind == Kind::BackwardWeight) ++state.backwards;
  } else {
    check_message(action, cell);
    if (is_send(kind)) ++unwaited_sends_;
    if (is_send_wait(kind)) {
      --unwaited_sends_;
      waits_for_sends_ = true;
    }
  }
  cell = static_cast<Cell>(cell | bit(kind));
}

void RowCheck::check_compute(const Action* action, Cell& cell) {
  const Kind kind = action->kind();
  if (kind != Kind::Forward) {
    const Kind before = kind == Kind::BackwardWeight ? Kind::BackwardInput : Kind::Forward;
    if ((cell & bit(before)) == 0) fail_without(action, text_of(action->as(before)));
    if ((cell & (before == Kind::Forward ? kForwardInGroup : kInputInGroup)) != 0) {
      fail(action, text_of(*action) + " needs " + text_of(action->as(before)) +
                       ", which runs at the same time");
    }
  }
  if (is_backward(kind)) {
    const Kind other = kind == Kind::FullBackward ? Kind::BackwardInput : Kind::FullBackward;
    if ((cell & bit(other)) != 0) {
      fail(action, text_of(*action) + " doubles " + text_of(action->as(other)) + " at " +
                       column_of(action->as(other)) +
                       ": a backward is either one B or one I and one W");
    }
  }
  const std::int64_t source = source_stage(*action, stages_.num_stages);
  if (communicates_ && source >= 0 && stages_.rank_of(source) != rank_) {
    const Kind receive = kind == Kind::Forward ? Kind::ReceiveForward : Kind::ReceiveBackward;
    if ((cell & bit(receive)) == 0) fail_without(action, text_of(action->as(receive)));
  }
  if (kind == Kind::Forward) {
    ++forwards_;
  } else if (kind != Kind::BackwardInput) {
    ++backwards_;
  }
  if ((kind == Kind::Forward || kind == Kind::BackwardInput) && in_group(action)) {
    cell = static_cast<Cell>(cell | (kind == Kind::Forward ? kForwardInGroup : kInputInGroup));
    group_cells_.push_back(&cell);
  }
}

void RowCheck::end_group() {
  for (Cell* const cell : group_cells_) {
    *cell = static_cast<Cell>(*cell & ~(kForwardInGroup | kInputInGroup));
  }
  group_cells_.clear();
}

void RowCheck::check_message(const Action* action, Cell cell) const {
  const Kind kind = action->kind();
  if (is_send_wait(kind)) {
    if ((cell & bit(sent_before(kind))) == 0) {
      fail_without(action, text_of(action->as(sent_before(kind))));
    }
    return;
  }
  if (kind == Kind::SendForward && (cell & bit(Kind::Forward)) == 0) {
    fail_without(action, text_of(action->as(Kind::Forward)));
  }
  if (kind == Kind::SendBackward &&
      (cell & (bit(Kind::FullBackward) | bit(Kind::BackwardInput))) == 0) {
    fail(action, text_of(*action) + " comes without a backward of it before on this rank");
  }
  const std::int64_t peer = peer_stage(*action);
  if (peer < 0 || peer >= stages_.num_stages) {
    fail(action, text_of(*action) + " has no stage at the other end");
  }
  if (stages_.rank_of(peer) == rank_) {
    fail(action, "stages " + std::to_string(action->stage()) + " and " + std::to_string(peer) +
                     " live on the same rank, which hands values over without " +
                     std::string(spelling(kind)));
  }
}

// UNSHARD, RESHARD, and the computations between them.
void RowCheck::check_weights(const Action* action, StageState& state) const {
  using Weights = StageState::Weights;
  const auto stage = [=] { return "stage " + std::to_string(action->stage()); };
  switch (action->kind()) {
    case Kind::Unshard:
      if (state.first_compute != nullptr) {
        fail(state.first_compute, stage() + " computes before it is unsharded at column " +
                                      std::to_string(schedule_.column_of(rank_, action)));
      }
      if (state.weights == Weights::Fetched || state.weights == Weights::Used) {
        fail(action, stage() + " is unsharded since column " +
                         std::to_string(schedule_.column_of(rank_, state.unshard)));
      }
      state.weights = Weights::Fetched;
      state.unshard = action;
      return;
    case Kind::Reshard:
      if (state.weights == Weights::Fetched) {
        fail(action, stage() + " does not compute since it was unsharded at column " +
                         std::to_string(schedule_.column_of(rank_, state.unshard)));
      }
      if (state.weights != Weights::Used) {
        fail_without(action, text_of(action->as(Kind::Unshard)));
      }
      state.weights = Weights::Sharded;
      return;
    default:
      if (state.weights == Weights::Sharded) fail(action, stage() + " is not unsharded");
      if (state.weights == Weights::Fetched) state.weights = Weights::Used;
      if (state.weights == Weights::Unsaid && state.first_compute == nullptr) {
        state.first_compute = action;
      }
  }
}

void RowCheck::check_reduction(const Action* action, StageState& state) {
  if (action->kind() == Kind::WaitReduceGrad) {
    waits_for_reductions_ = true;
    if (state.reduction == nullptr) fail_without(action, text_of(action->as(Kind::ReduceGrad)));
    if (state.reduction_wait != nullptr) fail_doubled(action);
    state.reduction_wait = action;
    if (pending_reduction_ == state.reduction) pending_reduction_ = nullptr;
    return;
  }
  if (state.reduction != nullptr) fail_doubled(action);
  if (state.backwards != microbatches_) {
    fail(action, "it comes after " + std::to_string(state.backwards) + " of " +
                     std::to_string(microbatches_) + " backwards of stage " +
                     std::to_string(action->stage()) +
                     ": gradients are reduced after the last one");
  }
  if (pending_reduction_ != nullptr && early_reduction_ == nullptr) early_reduction_ = action;
  pending_reduction_ = state.reduction = action;
}

void RowCheck::check_end() const {
  for (const StageState& state : states_) {
    if (state.weights == StageState::Weights::Fetched ||
        state.weights == StageState::Weights::Used) {
      fail(state.unshard, "stage " + std::to_string(state.unshard->stage()) +
                              " is never resharded, and the next step unshards it again");
    }
  }
  if (!waits_for_reductions_) return;  // torch waits by itself
  if (early_reduction_ != nullptr) {
    fail(early_reduction_, "another reduction is pending on this rank: wait for it first");
  }
  if (pending_reduction_ != nullptr) {
    fail(pending_reduction_, "no " + text_of(pending_reduction_->as(Kind::WaitReduceGrad)) +
                                 " follows, although this rank waits for reductions");
  }
}

void RowCheck::check_send_waits() const {
  if (!waits_for_sends_ || rank_without_wait_ < 0) return;
  const Action* const begin = schedule_.begin(rank_without_wait_);
  const Action* const end = schedule_.end(rank_without_wait_);
  std::vector<std::int64_t> waited;
  for (const Action* action = begin; action != end; ++action) {
    if (is_send_wait(action->kind())) {
      waited.push_back(action->as(sent_before(action->kind())).code());
    }
  }
  std::sort(waited.begin(), waited.end());
  const Action* const send = std::find_if(begin, end, [&](Action action) {
    return is_send(action.kind()) &&
           !std::binary_search(waited.begin(), waited.end(), action.code());
  });
  const Kind wait =
      send->kind() == Kind::SendForward ? Kind::WaitSendForward : Kind::WaitSendBackward;
  fail_at(schedule_, rank_without_wait_, send,
          "no " + text_of(send->as(wait)) +
              " follows, although the table waits for sends: it waits for each or for none");
}

}  // namespace

LiveActivations check_rows(const Schedule& schedule, const StageRanks& stages,
                           std::optional<std::int64_t> activation_limit) {
  const std::int64_t limit = activation_limit.value_or(schedule.num_actions());
  RowCheck check(schedule, stages);
  LiveActivations live;
  live.peaks.reserve(static_cast<std::size_t>(schedule.pp_size()));
  for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
    const Action* over = nullptr;
    live.peaks.push_back(check.check(rank, limit, over));
    if (over != nullptr && live.first_action == nullptr) {
      live.first_rank = rank;
      live.first_action = over;
    }
  }
  check.check_send_waits();
  return live;
}

}  // namespace hfpp
