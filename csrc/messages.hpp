// Sends and receives of a table, in the order in which torch places them, and the waits for them.
#pragma once

#include "schedule.hpp"

namespace hfpp {

// Adds a send after each result that another rank needs, and the receive on that rank.
//
// torch walks the ranks together, one action (or group) each per round, lowest rank first. A
// receive is placed on its rank when its send is placed: so the two ranks of every pair post their
// messages in the same order, which is what NCCL needs not to deadlock. The round of an action is
// one more than that of the action before it, or the first in which its input is there: it is
// computed without walking, and what arrives on a rank is sorted by round.
//
// `source` is the table as the caller has it, for messages. Throws where the ranks deadlock, or
// where a result is made twice.
Schedule with_messages(const Schedule& table, const Schedule& source);

// Adds one wait per send: after the backward of the same stage and microbatch for a forward send,
// else at the end of the row.
Schedule with_send_waits(const Schedule& table);

}  // namespace hfpp
