// The order of the checks, and what they share.
#include "verify.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace hfpp {

StageRanks::StageRanks(const Schedule& schedule)
    : ranks(schedule.stage_to_rank()),
      placement(schedule.placement(ranks)),
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
