// A schedule run step by step: every action takes one, whatever it costs.
#pragma once

#include "schedule.hpp"
#include "table.hpp"

namespace hfpp {

struct LockStep {
  Table steps;         // int32 [actions], row after row: the step of each action, from 0
  std::int64_t count;  // of steps, until the last rank ends
};

// Sends, receives and overlapped groups take one step each, and a receive may take the same step as
// its send; idle columns, sharding, reduction and waits take none, and have the step of what
// follows. Throws where a row cannot run to its end, or where what crosses between ranks is not
// sent and received in the table.
LockStep lock_step(const Schedule& schedule);

}  // namespace hfpp
