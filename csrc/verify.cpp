// The order of the checks, and what they share.
#include "verify.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace hfpp {

Placement placement_of(const Schedule& schedule, const std::vector<std::int32_t>& stage_to_rank) {
  const std::int64_t size = schedule.pp_size();
  const auto stages = static_cast<std::int64_t>(stage_to_rank.size());
  std::int64_t off_loop = -1;  // the first stage that is not where a loop has it
  bool v = stages == 2 * size;
  for (std::int64_t stage = 0; stage < stages; ++stage) {
    const std::int64_t rank = stage_to_rank[static_cast<std::size_t>(stage)];
    if (off_loop < 0 && rank != stage % size) off_loop = stage;
    if (rank != std::min(stage, stages - 1 - stage)) v = false;
  }
  if (stages == 0) {
    throw ConfigError(schedule.name() +
                      ": no row has a forward or a backward, so that no stage has a rank: write "
                      "the compute actions, with or without the communication");
  }
  if (off_loop < 0 && stages % size == 0) return Placement::Loop;
  if (v) return Placement::V;
  if (off_loop < 0) {
    throw ConfigError(schedule.name() + ": " + schedule.place_of_stage(stages - 1) + ": " +
                      std::to_string(stages) + " stages do not lie evenly on " +
                      std::to_string(size) + " ranks: every rank needs as many");
  }
  throw ConfigError(schedule.name() + ": " + schedule.place_of_stage(off_loop) + ": stage " +
                    std::to_string(off_loop) + " runs on rank " +
                    std::to_string(stage_to_rank[static_cast<std::size_t>(off_loop)]) +
                    ", where a loop (stage s on rank s % " + std::to_string(size) + ") has rank " +
                    std::to_string(off_loop % size) +
                    ", and the table is no v (two stages per rank, s and the one as far from the "
                    "end) either: lay the stages as one");
}

StageRanks::StageRanks(const Schedule& schedule)
    : ranks(schedule.stage_to_rank()),
      placement(placement_of(schedule, ranks)),
      pp_size(schedule.pp_size()),
      num_stages(static_cast<std::int64_t>(ranks.size())) {}

void fail_at(const Schedule& schedule, std::int64_t rank, const Action* action,
             const std::string& problem) {
  throw ConfigError(schedule.name() + ": " + schedule.place_of(rank, action) + ": " + problem);
}

std::vector<std::int64_t> verify(const Schedule& schedule,
                                 std::optional<std::int64_t> activation_limit) {
  if (activation_limit) require_at_least("activation_limit", *activation_limit, 1);
  if (schedule.num_stages() == 0) {
    throw ConfigError(schedule.name() + ": the table holds no compute actions");
  }
  const StageRanks stages(schedule);
  LiveActivations live = check_rows(schedule, stages, activation_limit);
  check_deadlock(schedule, stages,
                 schedule.has_communication() ? Transport::Rendezvous : Transport::Results);
  if (live.first_action != nullptr) {
    const std::int64_t most = *std::max_element(live.peaks.begin(), live.peaks.end());
    fail_at(schedule, live.first_rank, live.first_action,
            "the rank then holds " + std::to_string(*activation_limit + 1) +
                " activations, over activation_limit (" + std::to_string(*activation_limit) +
                "): use a schedule whose backwards come earlier, or activation_limit=" +
                std::to_string(most));
  }
  return std::move(live.peaks);
}

}  // namespace hfpp
