// From computations to all that torch runs: gathered parameters, reduced gradients, messages.
#pragma once

#include "schedule.hpp"

namespace hfpp {

// What is added; every combination gives what torch's own passes give, in time proportional to the
// table.
struct Lowering {
  bool communication = true;  // a send after each result that another rank needs, and its receive
  bool unshard = true;        // parameters of up to three stages at a time are gathered
  bool reduce_grad = true;    // after a stage's last weights' gradients
  bool wait_send = false;     // torch 2.15: one wait per send
  bool wait_reduce_grad = false;  // torch 2.15: right after each reduction
  // Stages give their parameters back in the order in which they got them (torch 2.15); else in the
  // order in which a Python set has them (torch 2.11 to 2.14).
  bool ordered_reshard = false;
};

// The table must have computations only; nothing but waits for sends may be added to a table that
// has more, but no waits. Idle columns are dropped. Throws where the table deadlocks, naming rank,
// column and action, or is incomplete.
Schedule lowered(const Schedule& table, const Lowering& wanted);

}  // namespace hfpp
