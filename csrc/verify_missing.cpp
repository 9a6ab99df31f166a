// Which action a rank's row lacks.
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "verify.hpp"

namespace hfpp {

namespace {

// Where the table says that there is such a microbatch: nearest first.
std::string witness(const Schedule& schedule, std::int64_t of_rank, std::int64_t stage,
                    std::int64_t microbatch) {
  struct Place {
    std::int64_t rank = 0;
    const Action* action = nullptr;
  };
  Place same_stage;
  Place same;
  Place highest;
  for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
    for (const Action* a = schedule.begin(rank); a != schedule.end(rank); ++a) {
      if (!has_microbatch(a->kind())) continue;
      if (highest.action == nullptr || a->microbatch() > highest.action->microbatch()) {
        highest = {rank, a};
      }
      if (a->microbatch() != microbatch) continue;
      if (same.action == nullptr) same = {rank, a};
      if (same_stage.action == nullptr && a->stage() == stage && rank == of_rank) {
        same_stage = {rank, a};
      }
    }
  }
  const Place place = same_stage.action != nullptr ? same_stage
                      : same.action != nullptr     ? same
                                                   : highest;
  return schedule.place_of(place.rank, place.action) + " has microbatch " +
         std::to_string(place.action->microbatch());
}

}  // namespace

void fail_missing(const Schedule& schedule, const StageRanks& stages, std::int64_t rank) {
  const std::int64_t microbatches = schedule.n_microbatches();
  std::vector<std::int64_t> codes;
  for (const Action* action = schedule.begin(rank); action != schedule.end(rank); ++action) {
    if (is_compute(action->kind())) codes.push_back(action->alone().code());
  }
  std::sort(codes.begin(), codes.end());
  for (std::int64_t k = 0; k < stages.per_rank(); ++k) {
    const std::int64_t stage = stages.stage_on_rank(rank, k);
    for (std::int64_t microbatch = 0; microbatch < microbatches; ++microbatch) {
      const auto has = [&](Kind kind) {
        return std::binary_search(codes.begin(), codes.end(),
                                  Action(kind, stage, microbatch).code());
      };
      std::string missing;
      if (!has(Kind::Forward)) {
        missing = text_of({Kind::Forward, stage, microbatch});
      } else if (has(Kind::BackwardInput) && !has(Kind::BackwardWeight)) {
        missing = text_of({Kind::BackwardWeight, stage, microbatch});
      } else if (!has(Kind::BackwardInput) && !has(Kind::FullBackward)) {
        missing = text_of({Kind::FullBackward, stage, microbatch}) + " (or I and W)";
      } else {
        continue;
      }
      throw ConfigError(schedule.name() + ": rank " + std::to_string(rank) + ": action " + missing +
                        " is missing in its " +
                        std::to_string(schedule.column_of(rank, schedule.end(rank) - 1) + 1) +
                        " columns: every stage has a forward and a backward for each of the " +
                        std::to_string(microbatches) + " microbatches (" +
                        witness(schedule, rank, stage, microbatch) + ")");
    }
  }
  throw std::logic_error("fail_missing: nothing is missing");
}

}  // namespace hfpp
