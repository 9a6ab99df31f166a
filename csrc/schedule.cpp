// The actions of all ranks: their spelling, their places, and where the stages live.
#include "schedule.hpp"

#include <algorithm>
#include <array>

namespace hfpp {

namespace {

constexpr std::array<std::string_view, kKinds> kSpellings = {
    "",
    "F",
    "B",
    "I",
    "W",
    "SEND_F",
    "RECV_F",
    "SEND_B",
    "RECV_B",
    "WAIT_SEND_F",
    "WAIT_SEND_B",
    "UNSHARD",
    "RESHARD",
    "REDUCE_GRAD",
    "WAIT_REDUCE_GRAD",
};

}  // namespace

std::string_view spelling(Kind kind) {
  return kSpellings.at(static_cast<std::size_t>(kind));
}

Action Action::of_code(std::int64_t code) {
  Action action;
  action.code_ = code;
  if (code < 0 || static_cast<std::uint8_t>(action.kind()) >= kKinds) {
    throw ConfigError(named("code", code) + " is no packed action.");
  }
  return action;
}

std::string text_of(Action action) {
  std::string text = std::to_string(action.stage());
  text += spelling(action.kind());
  if (has_microbatch(action.kind())) text += std::to_string(action.microbatch());
  return text;
}

void Schedule::reserve(std::size_t ranks, std::size_t actions) {
  offsets_.reserve(ranks + 1);
  actions_.reserve(actions);
}

void Schedule::truncate(std::int64_t rows) {
  offsets_.resize(static_cast<std::size_t>(rows) + 1);
  actions_.resize(static_cast<std::size_t>(offsets_.back()));
}

void Schedule::shrink() {
  offsets_.shrink_to_fit();
  actions_.shrink_to_fit();
}

bool Schedule::has_communication() const {
  return std::any_of(actions_.begin(), actions_.end(), [](Action action) {
    return !is_compute(action.kind()) && action.kind() != Kind::Idle;
  });
}

std::uint32_t Schedule::kinds() const {
  std::uint32_t kinds = 0;
  for (const Action action : actions_) kinds |= 1U << static_cast<std::uint8_t>(action.kind());
  return kinds;
}

std::vector<std::int32_t> Schedule::stage_to_rank() const {
  // A file may name a stage of any number: the memory is bounded by what the table holds, and of
  // more stages than actions one is missing among the first.
  const std::int64_t known = std::min(num_stages_, num_actions() + 1);
  std::vector<std::int32_t> ranks(static_cast<std::size_t>(known), -1);
  std::vector<const Action*> firsts(static_cast<std::size_t>(known), nullptr);
  for (std::int64_t rank = 0; rank < pp_size(); ++rank) {
    for (const Action* action = begin(rank); action != end(rank); ++action) {
      if (!is_compute(action->kind()) || action->stage() >= known) continue;
      const auto stage = static_cast<std::size_t>(action->stage());
      if (ranks[stage] < 0) {
        ranks[stage] = static_cast<std::int32_t>(rank);
        firsts[stage] = action;
      } else if (ranks[stage] != rank) {
        throw ConfigError(name_ + ": " + place_of(rank, action) + ": stage " +
                          std::to_string(stage) + " also runs on rank " +
                          std::to_string(ranks[stage]) + " (column " +
                          std::to_string(column_of(ranks[stage], firsts[stage])) +
                          "); a stage lives on one rank");
      }
    }
  }
  const auto missing = std::find(ranks.begin(), ranks.end(), -1);
  if (missing != ranks.end()) {
    throw ConfigError(name_ + ": no rank runs stage " + std::to_string(missing - ranks.begin()) +
                      ", although the highest stage is " + std::to_string(num_stages_ - 1) + " (" +
                      place_of_stage(num_stages_ - 1) +
                      "): stages are numbered from 0 without gaps");
  }
  return ranks;
}

std::string Schedule::place_of_stage(std::int64_t stage) const {
  for (std::int64_t rank = 0; rank < pp_size(); ++rank) {
    const Action* const found = std::find_if(begin(rank), end(rank), [=](Action action) {
      return is_compute(action.kind()) && action.stage() == stage;
    });
    if (found != end(rank)) return place_of(rank, found);
  }
  throw std::logic_error("Schedule::place_of_stage: the stage computes nowhere");
}

std::int64_t Schedule::column_of(std::int64_t rank, const Action* action) const {
  const auto columns =
      std::count_if(begin(rank), action + 1, [](Action other) { return !other.joined(); });
  return static_cast<std::int64_t>(columns) - 1;
}

std::string Schedule::place_of(std::int64_t rank, const Action* action) const {
  const Action* first = action;
  while (first->joined()) --first;
  const Action* last = first + 1;
  while (last != end(rank) && last->joined()) ++last;
  std::string text = text_of(*first);
  for (const Action* part = first + 1; part != last; ++part) text += ";" + text_of(*part);
  if (last - first > 1) text = "(" + text + ")OVERLAP_F_B";
  return "rank " + std::to_string(rank) + ", column " + std::to_string(column_of(rank, action)) +
         ", action " + text;
}

}  // namespace hfpp
