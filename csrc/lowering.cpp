// The passes from computations to all that torch runs.
#include "lowering.hpp"

#include <algorithm>
#include <vector>

#include "dataflow.hpp"
#include "messages.hpp"
#include "resident_stages.hpp"

namespace hfpp {

namespace {

// Adds UNSHARD and RESHARD before computations, and REDUCE_GRAD after the last of a stage.
class WholeStages {
 public:
  WholeStages(const Schedule& table, const Lowering& wanted)
      : table_(table), wanted_(wanted), resident_(wanted.ordered_reshard) {
    if (wanted.reduce_grad) {
      // No more stages than actions can have a gradient to reduce.
      const std::int64_t stages = std::min(table.num_stages(), table.num_actions() + 1);
      done_.assign(static_cast<std::size_t>(stages), 0);
    }
  }

  Schedule run() {
    Schedule out(table_.name());
    out.reserve(static_cast<std::size_t>(table_.pp_size()),
                static_cast<std::size_t>(table_.num_actions()));
    for (std::int64_t rank = 0; rank < table_.pp_size(); ++rank) {
      if (wanted_.unshard) resident_.look_ahead(table_, rank);
      const Action* const end = table_.end(rank);
      std::size_t group = 0;
      for (const Action* first = table_.begin(rank); first != end;) {
        const Action* const last = group_end(first, end);
        if (first->kind() != Kind::Idle) {
          if (wanted_.unshard) resident_.before(group, out);
          std::for_each(first, last, [&](Action action) { out.add(action); });
          if (wanted_.reduce_grad) reduce_after(first, last, out);
        }
        ++group;
        first = last;
      }
      if (wanted_.unshard) resident_.release(out);
      out.end_row();
    }
    return out;
  }

 private:
  void reduce_after(const Action* first, const Action* last, Schedule& out) {
    for (const Action* action = first; action != last; ++action) {
      if (!ends_backward(action->kind())) continue;
      const auto stage = static_cast<std::size_t>(action->stage());
      if (stage >= done_.size() || ++done_[stage] != table_.n_microbatches()) continue;
      out.add({Kind::ReduceGrad, action->stage()});
      if (wanted_.wait_reduce_grad) out.add({Kind::WaitReduceGrad, action->stage()});
    }
  }

  const Schedule& table_;
  const Lowering& wanted_;
  ResidentStages resident_;
  std::vector<std::int64_t> done_;  // weights' gradients per stage
};

}  // namespace

Schedule lowered(const Schedule& table, const Lowering& wanted) {
  const bool only_waits = !wanted.communication && !wanted.unshard && !wanted.reduce_grad;
  if (!only_waits && table.has_communication()) {
    throw ConfigError(table.name() + ": the table has communication already");
  }
  constexpr std::uint32_t kWaits = 1U << static_cast<unsigned>(Kind::WaitSendForward) |
                                   1U << static_cast<unsigned>(Kind::WaitSendBackward);
  if (wanted.wait_send && (table.kinds() & kWaits) != 0) {
    throw ConfigError(table.name() + ": the table has waits for sends already");
  }
  Schedule out = WholeStages(table, wanted).run();
  if (wanted.communication) out = with_messages(out, table);
  if (wanted.wait_send) out = with_send_waits(out);
  return out;
}

}  // namespace hfpp
