// Runs the rows of a schedule side by side, until each has come to its end or none can go on.
#include "simulation_run.hpp"

#include <algorithm>
#include <cmath>

#include "dataflow.hpp"

namespace hfpp {

namespace {

constexpr std::size_t kMostShown = 8;  // ranks in a message

// What has been done of a stage and microbatch.
constexpr std::uint8_t kForward = 1;
constexpr std::uint8_t kGradient = 2;  // of the inputs
constexpr std::uint8_t kWeight = 4;

constexpr std::uint8_t done_by(Kind kind) {
  return kind == Kind::Forward          ? kForward
         : kind == Kind::BackwardInput  ? kGradient
         : kind == Kind::BackwardWeight ? kWeight
                                        : kGradient | kWeight;
}

}  // namespace

SimulationRun::SimulationRun(Simulation& result, const ActionCosts& costs)
    : result_(result),
      schedule_(result.schedule_),
      transfers_(result.transfers_),
      costs_(costs),
      communication_(costs.transfers.communication),
      rows_(static_cast<std::size_t>(schedule_.pp_size())),
      done_(static_cast<std::size_t>(transfers_.num_stages() * transfers_.n_microbatches()), 0) {}

void SimulationRun::run() {
  for (std::int64_t rank = schedule_.pp_size(); rank-- > 0;) {
    rows_[static_cast<std::size_t>(rank)].next = schedule_.begin(rank);
    rows_[static_cast<std::size_t>(rank)].end = schedule_.end(rank);
    ready_.push_back(rank);
  }
  while (!ready_.empty()) {
    rank_ = ready_.back();
    ready_.pop_back();
    Row& row = rows_[static_cast<std::size_t>(rank_)];
    while (row.next != row.end && step(row)) {
    }
  }
  double step_time = 0;
  for (const Row& row : rows_) {
    if (row.next != row.end) throw ConfigError(stuck());
    step_time = std::max(step_time, row.ledger.clock());
  }
  result_.step_time_ = step_time;
  for (std::size_t rank = 0; rank < rows_.size(); ++rank) {
    rows_[rank].ledger.finish(step_time, result_.reports_[rank]);
  }
}

bool SimulationRun::step(Row& row) {
  const Action* const first = row.next;
  // The rank comes back to its row after many others: what follows is on its way by then.
  __builtin_prefetch(first + 8);
  __builtin_prefetch(&span(first) + 4, 1);
  const Action* const last = group_end(first, row.end);
  for (const Action* part = first; last - first > 1 && part != last; ++part) {
    if (!is_compute(part->kind())) fail(part, "an overlapped group holds computations only");
  }
  if (is_compute(first->kind())) {
    if (!compute(row, first, last)) return false;
  } else if (has_microbatch(first->kind())) {
    if (!communicate(row, first)) return false;
  } else {  // idle columns and sharding are not in the costs
    span(first) = {row.ledger.clock(), row.ledger.clock()};
  }
  row.next = last;
  return true;
}

// ---- computations

bool SimulationRun::compute(Row& row, const Action* first, const Action* last) {
  inputs_.clear();
  for (const Action* part = first; part != last; ++part) {
    check_order(part);
    if (!find_input(row, part)) return false;
  }
  wait_for_inputs(row.ledger);
  const double seconds = run_parts(row.ledger.clock(), first, last);
  row.ledger.compute(seconds, report());
  keep_and_free(row.ledger, first, last);
  for (const Action* part = first; part != last; ++part) {
    std::uint8_t& now = done(part->stage(), part->microbatch());
    if ((now & done_by(part->kind())) != 0) fail_repeated(part);  // by another part of the group
    now = static_cast<std::uint8_t>(now | done_by(part->kind()));
  }
  for (const Action* part = first; part != last && !transfers_.spelled_out(); ++part) {
    hand_over(row.ledger, *part);
  }
  return true;
}

// What a computation takes of its own stage has to come before it in its own row.
void SimulationRun::check_order(const Action* part) {
  const Kind kind = part->kind();
  const std::uint8_t before = done(part->stage(), part->microbatch());
  if ((before & done_by(kind)) != 0) fail_repeated(part);
  if (kind == Kind::BackwardWeight && (before & kGradient) == 0) {
    fail(part, text_of(*part) + " comes without " + text_of(part->as(Kind::BackwardInput)) +
                   " before it on this rank");
  }
  if (is_gradient(kind) && (before & kForward) == 0) {
    fail(part, text_of(*part) + " comes without " + text_of(part->as(Kind::Forward)) +
                   " before it on this rank");
  }
}

// Notes what a computation takes from another rank; false where it is not there yet.
bool SimulationRun::find_input(Row& row, const Action* part) {
  if (!transfers_.takes(*part)) return true;
  inputs_.push_back(transfers_.input(*part));
  const Route& route = inputs_.back();
  if (!route.crosses()) {
    const std::uint8_t wanted = route.gradient ? kGradient : kForward;
    const bool there = (done(route.producer, part->microbatch()) & wanted) != 0;
    if (!there) row.waits_for = route.message;
    inputs_.pop_back();
    return there;
  }
  const Message& message = transfers_[route];
  if (transfers_.spelled_out() && std::isnan(message.span.start)) {
    const Kind receive = route.gradient ? Kind::ReceiveBackward : Kind::ReceiveForward;
    fail(part, text_of(*part) + " comes without " + text_of(part->as(receive)) +
                   " before it on this rank");
  }
  if (std::isnan(receives_on_demand() ? message.sent : message.span.end)) {
    row.waits_for = route.message;
    return false;
  }
  return true;
}

void SimulationRun::wait_for_inputs(RankLedger& ledger) {
  if (receives_on_demand()) {
    for (const Route& route : inputs_) {
      if (!transfers_.spelled_out()) hold_buffer(ledger, route);
      receive_now(ledger, route);
    }
    return;
  }
  const Route* latest = nullptr;
  for (const Route& route : inputs_) {
    if (times_tell_buffers()) count_received(route);
    const double here = transfers_[route].span.end;
    if (here > (latest == nullptr ? ledger.clock() : transfers_[*latest].span.end)) latest = &route;
  }
  if (latest == nullptr) return;
  const Message& message = transfers_[*latest];
  ledger.wait(message.span.end, message.sent, latest->gradient);
}

// Sets the spans of a group's parts, one after another within its time, which it returns.
double SimulationRun::run_parts(double start, const Action* first, const Action* last) {
  if (last - first == 1) {
    const double seconds = seconds_of(*first);
    span(first) = {start, start + seconds};
    return seconds;
  }
  double sum = 0;
  double longest = 0;
  for (const Action* part = first; part != last; ++part) {
    sum += seconds_of(*part);
    longest = std::max(longest, seconds_of(*part));
  }
  const double whole = sum - costs_.overlap_gain * (sum - longest);
  const double scale = sum > 0 ? whole / sum : 1;
  double before = 0;
  double at = start;
  for (const Action* part = first; part != last; ++part) {
    before += seconds_of(*part);
    const double end = start + (part + 1 == last ? whole : before * scale);
    span(part) = {at, end};
    at = end;
  }
  return whole;
}

double SimulationRun::seconds_of(Action action) const {
  const auto stage = static_cast<std::size_t>(action.stage());
  switch (action.kind()) {
    case Kind::Forward:
      return costs_.forward[stage];
    case Kind::BackwardInput:
      return costs_.backward_input[stage];
    case Kind::BackwardWeight:
      return costs_.backward_weight[stage];
    default:
      return costs_.backward[stage];
  }
}

// A group holds what all its forwards keep before its backwards free anything.
void SimulationRun::keep_and_free(RankLedger& ledger, const Action* first, const Action* last) {
  RankReport& mine = report();
  for (const Action* part = first; part != last; ++part) {
    const auto stage = static_cast<std::size_t>(part->stage());
    if (part->kind() != Kind::Forward) continue;
    ledger.begin_activation(mine);
    ledger.keep(costs_.activation_bytes[stage], mine);
  }
  for (const Action* part = first; part != last; ++part) {
    const auto stage = static_cast<std::size_t>(part->stage());
    if (is_gradient(part->kind())) ledger.free(costs_.activation_bytes[stage]);
    if (part->kind() == Kind::BackwardInput) ledger.keep(costs_.weight_bytes[stage], mine);
    if (part->kind() == Kind::BackwardWeight) ledger.free(costs_.weight_bytes[stage]);
    if (ends_backward(part->kind())) ledger.end_activation();
  }
  if (times_tell_buffers()) return;
  for (const Route& route : inputs_) {
    ledger.free_buffer(transfers_.bytes(costs_.transfers, route));
  }
}

// Without sends in the table, what a computation gives to another rank leaves when it is made.
void SimulationRun::hand_over(RankLedger& ledger, Action action) {
  const bool gradient = is_gradient(action.kind());
  if (action.kind() == Kind::BackwardWeight || !transfers_.has_taker(gradient, action.stage())) {
    return;
  }
  const Route route = transfers_.route(gradient, action.stage(), action.microbatch());
  if (route.crosses()) send(ledger, route);
}

// ---- communication

bool SimulationRun::communicate(Row& row, const Action* action) {
  const Kind kind = action->kind();
  const bool gradient = is_gradient(kind);
  const bool receives = kind == Kind::ReceiveForward || kind == Kind::ReceiveBackward;
  const bool sends = kind == Kind::SendForward || kind == Kind::SendBackward;
  const std::int64_t producer = action->stage() + (!receives ? 0 : gradient ? 1 : -1);
  if (!transfers_.has_taker(gradient, producer)) {
    fail(action, text_of(*action) + " has no stage at the other end");
  }
  const Route route = transfers_.route(gradient, producer, action->microbatch());
  const std::int64_t home = receives ? route.target : route.source;
  if (home != rank_) {
    fail(action,
         "stage " + std::to_string(action->stage()) + " lives on rank " + std::to_string(home));
  }
  if (!route.crosses()) {
    fail(action, "the stages at both ends of " + text_of(*action) +
                     " live on the same rank, which hands values over without messages");
  }
  if (receives) {
    receive(row, action, route);
    return true;
  }
  if (!sends) return wait_for_send(row, action, route);
  if (!std::isnan(transfers_[route].sent)) fail(action, text_of(*action) + " ran already");
  if ((done(producer, action->microbatch()) & (gradient ? kGradient : kForward)) == 0) {
    const Kind maker = gradient ? Kind::FullBackward : Kind::Forward;
    fail(action, text_of(*action) + " comes without " + text_of(action->as(maker)) +
                     " before it on this rank");
  }
  const double start = row.ledger.clock();
  send(row.ledger, route);
  span(action) = {start, row.ledger.clock()};
  return true;
}

void SimulationRun::send(RankLedger& ledger, const Route& route) {
  std::int64_t& sent = report().sent_bytes;
  sent = checked_add(sent, transfers_.bytes(costs_.transfers, route), "bytes sent");
  const double now = ledger.clock();
  if (communication_ != Communication::Beside) {
    transfers_[route].sent = now;
    ledger.communicate_until(now + transfers_.seconds(costs_.transfers, route));
    wake(route);
  } else if (transfers_.spelled_out()) {
    transfers_.send(costs_.transfers, route, now, known_);
    wake_known();
  } else {
    transfers_.send_to_ready(costs_.transfers, route, now);
    wake(route);
  }
}

void SimulationRun::receive(Row& row, const Action* action, const Route& route) {
  Message& message = transfers_[route];
  if (!std::isnan(message.span.start)) fail(action, text_of(*action) + " ran already");
  const double now = row.ledger.clock();
  span(action) = {now, now};
  hold_buffer(row.ledger, route);
  if (receives_on_demand()) {
    message.span.start = now;
    return;
  }
  count_received(route);
  transfers_.receive(costs_.transfers, route, now, known_);
  wake_known();
}

// In the rank's own time: what is sent already, no sooner than its sender began.
void SimulationRun::receive_now(RankLedger& ledger, const Route& route) {
  count_received(route);
  Message& message = transfers_[route];
  const double start = std::max(ledger.clock(), message.sent);
  ledger.wait(start, message.sent, route.gradient);
  ledger.communicate_until(start + transfers_.seconds(costs_.transfers, route));
  message.span = {message.sent, ledger.clock()};
}

void SimulationRun::hold_buffer(RankLedger& ledger, const Route& route) {
  ledger.hold_buffer(transfers_.bytes(costs_.transfers, route), report());
}

bool SimulationRun::wait_for_send(Row& row, const Action* action, const Route& route) {
  const Message& message = transfers_[route];
  if (std::isnan(message.sent)) {
    fail(action, text_of(*action) + " comes without its send before it on this rank");
  }
  if (communication_ == Communication::Beside) {
    if (std::isnan(message.span.end)) {
      row.waits_for = route.message;
      return false;
    }
    row.ledger.communicate_until(std::max(row.ledger.clock(), message.span.end));
  }
  span(action) = {row.ledger.clock(), row.ledger.clock()};
  return true;
}

void SimulationRun::count_received(const Route& route) {
  std::int64_t& received = report().received_bytes;
  received = checked_add(received, transfers_.bytes(costs_.transfers, route), "bytes received");
}

// Those that wait for a message may look again.
void SimulationRun::wake(const Route& route) {
  for (const std::int64_t rank : {route.source, route.target}) {
    Row& row = rows_[static_cast<std::size_t>(rank)];
    if (row.waits_for != route.message) continue;
    row.waits_for = kNothing;
    ready_.push_back(rank);
  }
}

void SimulationRun::wake_known() {
  for (const std::size_t message : known_) wake(transfers_.route_of_message(message));
  known_.clear();
}

// ---- errors

void SimulationRun::fail(const Action* action, const std::string& what) const {
  throw ConfigError(schedule_.name() + ": " + schedule_.place_of(rank_, action) + ": " + what);
}

void SimulationRun::fail_repeated(const Action* part) const {
  fail(part, text_of(*part) + " comes after it ran already, whole or in part");
}

// Who waits for whom: the circle from its lowest rank on, or the way to a rank that has ended.
std::string SimulationRun::stuck() const {
  std::vector<std::size_t> way;
  std::vector<std::int64_t> position(rows_.size(), -1);
  const auto waits = [](const Row& row) { return row.next != row.end; };
  auto rank =
      static_cast<std::size_t>(std::find_if(rows_.begin(), rows_.end(), waits) - rows_.begin());
  const auto blamed = [this](std::size_t waiting) {
    const Route route = transfers_.route_of_message(rows_[waiting].waits_for);
    return static_cast<std::size_t>(std::isnan(transfers_[route].sent) ? route.source
                                                                       : route.target);
  };
  while (position[rank] < 0 && waits(rows_[rank])) {
    position[rank] = static_cast<std::int64_t>(way.size());
    way.push_back(rank);
    rank = blamed(rank);
  }
  const bool circle = position[rank] >= 0;
  if (circle) {
    way.erase(way.begin(), way.begin() + position[rank]);
    std::rotate(way.begin(), std::min_element(way.begin(), way.end()), way.end());
  }
  std::string text = schedule_.name() + ": the schedule " +
                     (circle ? "deadlocks" : "does not run to its end") + ": ";
  // The circle's first ranks, or those nearest to the one that has ended; there may be thousands.
  const std::size_t shown = std::min(way.size(), kMostShown);
  const std::size_t others = way.size() - shown;
  const std::size_t first = circle ? 0 : others;
  if (!circle && others > 0) {
    text += std::to_string(others) + " more ranks wait in a line for rank " +
            std::to_string(way[first]) + "; ";
  }
  for (std::size_t i = first; i < first + shown; ++i) {
    const std::size_t waiting = way[i];
    const Row& row = rows_[waiting];
    const Route route = transfers_.route_of_message(row.waits_for);
    const Action maker(route.gradient ? Kind::FullBackward : Kind::Forward, route.producer,
                       static_cast<std::int64_t>(route.message) % transfers_.n_microbatches());
    text += schedule_.place_of(static_cast<std::int64_t>(waiting), row.next) + " waits for " +
            text_of(maker) + " of rank " + std::to_string(route.source) + "; ";
  }
  if (!circle) return text + "rank " + std::to_string(rank) + " comes to its end without it";
  if (others > 0) return text + "and " + std::to_string(others) + " more ranks of the circle";
  return text.substr(0, text.size() - 2);
}

}  // namespace hfpp
