// Proof that a schedule can run: complete, in order, free of deadlock, within memory.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "placement.hpp"
#include "schedule.hpp"

namespace hfpp {

// Throws a ConfigError that names rank, column and action where the schedule cannot run, or where a
// rank holds more than `activation_limit` activations. Gives the most that each rank holds at once:
// an activation is one stage's of one microbatch, and lives from its forward to the end of its full
// backward or of its weight gradient. Time and memory are linear in the actions.
std::vector<std::int64_t> verify(const Schedule& schedule,
                                 std::optional<std::int64_t> activation_limit);

// How the stages of these ranks lie. A single rank, or one stage on each, counts as a loop. Throws
// a ConfigError where it is neither a loop nor a v, or not as many on each rank.
Placement placement_of(const Schedule& schedule, const std::vector<std::int32_t>& stage_to_rank);

// ---- its parts

// Where the stages are.
struct StageRanks {
  std::vector<std::int32_t> ranks;  // by stage
  Placement placement;
  std::int64_t pp_size;
  std::int64_t num_stages;

  explicit StageRanks(const Schedule& schedule);

  std::int64_t rank_of(std::int64_t stage) const { return ranks[static_cast<std::size_t>(stage)]; }
  bool lives_on(std::int64_t stage, std::int64_t rank) const {
    return stage < num_stages && rank_of(stage) == rank;
  }
  std::int64_t per_rank() const { return num_stages / pp_size; }
  // Which of its rank's stages it is, ascending.
  std::int64_t index_on_rank(std::int64_t stage) const {
    if (placement == Placement::Loop) return stage / pp_size;
    return stage < pp_size ? 0 : 1;
  }
  std::int64_t stage_on_rank(std::int64_t rank, std::int64_t k) const {
    if (placement == Placement::Loop) return rank + k * pp_size;
    return k == 0 ? rank : num_stages - 1 - rank;
  }
};

// What the rows hold in memory.
struct LiveActivations {
  std::vector<std::int64_t> peaks;  // by rank
  std::int64_t first_rank = -1;     // that exceeds the limit, and where
  const Action* first_action = nullptr;
};

// Every rank's actions by themselves: complete, once each, in order.
LiveActivations check_rows(const Schedule& schedule, const StageRanks& stages,
                           std::optional<std::int64_t> activation_limit);

// Names the first action that a rank lacks, where it lacks one; in time proportional to the table,
// however many stages and microbatches it names.
[[noreturn]] void fail_missing(const Schedule& schedule, const StageRanks& stages,
                               std::int64_t rank);

// Both ends of every message exist, and between two ranks they are in the same order. `run` finds
// that something is wrong with them; this says what.
void check_messages(const Schedule& schedule, const StageRanks& stages);

// How a rank gets what another one makes.
enum class Transport : std::uint8_t {
  Results,     // the table spells no messages out: a result is there once it is computed
  Buffered,    // a send never waits, and its value arrives by itself, as with gloo
  Rendezvous,  // each rank handles its messages one after another, both ends together, as NCCL does
};

// Runs all checked rows together; an error names the circle of ranks that wait for one another.
// Rendezvous says whether buffers would help.
void check_deadlock(const Schedule& schedule, const StageRanks& stages, Transport transport);

[[noreturn]] void fail_at(const Schedule& schedule, std::int64_t rank, const Action* action,
                          const std::string& problem);

}  // namespace hfpp
