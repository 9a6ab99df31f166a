// What a simulation takes and gives; the run itself is in simulation_run.cpp.
#include "simulate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "simulation_run.hpp"

namespace hfpp {

namespace {

template <class T>
void check_values(const char* name, const std::vector<T>& values, std::int64_t count) {
  if (static_cast<std::int64_t>(values.size()) != count) {
    throw ConfigError(std::string(name) + " has " + std::to_string(values.size()) +
                      " entries, but the table needs " + std::to_string(count) +
                      ": one per stage, or per boundary between two");
  }
  for (const T value : values) {
    if (!(value >= 0 && std::isfinite(static_cast<double>(value)))) {
      throw ConfigError(named(name, value) + " must be a finite number that is not negative");
    }
  }
}

}  // namespace

void ActionCosts::check(const Schedule& schedule) const {
  const std::int64_t num_stages = schedule.num_stages();
  check_values("forward", forward, num_stages);
  check_values("backward", backward, num_stages);
  check_values("backward_input", backward_input, num_stages);
  check_values("backward_weight", backward_weight, num_stages);
  check_values("activation_bytes", activation_bytes, num_stages);
  check_values("weight_bytes", weight_bytes, num_stages);
  check_values("boundary_bytes", transfers.bytes, num_stages - 1);
  check_values("activation_seconds", transfers.activation_seconds, num_stages - 1);
  check_values("gradient_seconds", transfers.gradient_seconds, num_stages - 1);
  if (!(overlap_gain >= 0 && overlap_gain <= 1)) {
    throw ConfigError(named("overlap_gain", overlap_gain) +
                      " must be from 0 to 1: use overlap_gain=0 where the parts of a group run "
                      "one after another");
  }
  // No sum of times has more terms than this: one per action, a message's time at both its ends,
  // and the idle time of all ranks.
  double longest = 0;
  for (const auto* seconds : {&forward, &backward, &backward_input, &backward_weight,
                              &transfers.activation_seconds, &transfers.gradient_seconds}) {
    for (const double one : *seconds) longest = std::max(longest, one);
  }
  const double terms =
      4.0 * static_cast<double>(schedule.num_actions()) * static_cast<double>(schedule.pp_size());
  if (!std::isfinite(longest * terms)) {
    throw std::overflow_error(named("seconds", longest) + " times " +
                              named("actions", schedule.num_actions()) +
                              " are more than a float holds: use smaller times.");
  }
}

Simulation::Simulation(const Schedule& schedule, const ActionCosts& costs)
    : schedule_(schedule),
      transfers_(schedule),
      spans_(new Span[static_cast<std::size_t>(schedule.num_actions())]),
      reports_(static_cast<std::size_t>(schedule.pp_size())) {
  costs.check(schedule);
  SimulationRun(*this, costs).run();
  if (costs.transfers.communication == Communication::Beside && !transfers_.spelled_out()) {
    count_receive_buffers(costs.transfers);
  }
}

double Simulation::idle_share() const {
  double idle = 0;
  for (const RankReport& report : reports_) idle += report.idle();
  const double all = step_time_ * static_cast<double>(reports_.size());
  return all > 0 ? idle / all : 0;
}

std::vector<Simulation::Sent> Simulation::sent_by(std::int64_t rank) const {
  std::vector<Sent> sent;
  for (const Action* action = schedule_.begin(rank); action != schedule_.end(rank); ++action) {
    const Kind kind = action->kind();
    if (!is_compute(kind) || kind == Kind::BackwardWeight ||
        !transfers_.has_taker(is_gradient(kind), action->stage())) {
      continue;
    }
    const Route route = transfers_.route(is_gradient(kind), action->stage(), action->microbatch());
    const Message& message = transfers_[route];
    if (route.crosses() && !std::isnan(message.span.end)) {
      sent.push_back({*action, route, message.span});
    }
  }
  return sent;
}

// With overlap and without receives in the table, a buffer is held from the begin of its transfer
// to the end of the computation that takes it. What is freed at a time is free for what begins
// then.
void Simulation::count_receive_buffers(const TransferCosts& costs) {
  using Event = std::pair<double, std::int64_t>;  // when, and the bytes
  // A rank takes its activations about in the order in which they come, and so its gradients.
  std::array<std::vector<Event>, 2> begins;
  std::vector<Event> in_order;
  std::vector<Event> ends;
  for (std::int64_t rank = 0; rank < schedule_.pp_size(); ++rank) {
    for (std::vector<Event>& some : begins) some.clear();
    ends.clear();
    const Action* const row_end = schedule_.end(rank);
    for (const Action* part = schedule_.begin(rank); part != row_end; ++part) {
      if (!is_compute(part->kind()) || !transfers_.takes(*part)) continue;
      const Route route = transfers_.input(*part);
      if (!route.crosses()) continue;
      const Action* const last = group_end(part, row_end) - 1;
      const std::int64_t bytes = transfers_.bytes(costs, route);
      begins[route.gradient ? 1 : 0].emplace_back(transfers_[route].span.start, bytes);
      ends.emplace_back((spans(rank) + (last - schedule_.begin(rank)))->end, bytes);
    }
    for (std::vector<Event>& some : begins) {
      if (!std::is_sorted(some.begin(), some.end())) std::sort(some.begin(), some.end());
    }
    in_order.resize(ends.size());
    std::merge(begins[0].begin(), begins[0].end(), begins[1].begin(), begins[1].end(),
               in_order.begin());
    RankLedger ledger;
    std::size_t ended = 0;
    for (const auto& [begin, bytes] : in_order) {
      for (; ended < ends.size() && ends[ended].first <= begin; ++ended) {
        ledger.free_buffer(ends[ended].second);
      }
      ledger.hold_buffer(bytes, reports_[static_cast<std::size_t>(rank)]);
    }
  }
}

}  // namespace hfpp
