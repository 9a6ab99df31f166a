// Messages between neighbouring stages, and the links that carry them one after another.
#include "transfers.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace hfpp {

std::int64_t stage_microbatches(const Schedule& schedule) {
  if (schedule.num_stages() == 0) {
    throw ConfigError(schedule.name() + ": the table has no computations");
  }
  const std::int64_t pairs = checked_multiply(schedule.num_stages(), schedule.n_microbatches(),
                                              "stages and microbatches of a table");
  if (pairs > schedule.num_actions()) {
    throw ConfigError(schedule.name() + ": " + std::to_string(schedule.num_stages()) +
                      " stages and " + std::to_string(schedule.n_microbatches()) +
                      " microbatches need more than the table's " +
                      std::to_string(schedule.num_actions()) +
                      " actions: every stage has a forward for every microbatch");
  }
  return pairs;
}

Transfers::Transfers(const Schedule& schedule)
    : num_stages_(schedule.num_stages()),
      n_microbatches_(schedule.n_microbatches()),
      spelled_out_(schedule.has_communication()),
      rank_of_(schedule.stage_to_rank()) {
  const std::int64_t pairs = stage_microbatches(schedule);
  constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
  messages_.resize(static_cast<std::size_t>(2 * pairs), {unknown, {unknown, unknown}});
  find_links(schedule.pp_size());
}

void Transfers::find_links(std::int64_t pp_size) {
  std::vector<std::pair<std::int64_t, std::size_t>> rows;  // the pair of ranks, who uses the link
  for (const bool gradient : {false, true}) {
    for (std::int64_t stage = 0; stage < num_stages_; ++stage) {
      if (!has_taker(gradient, stage)) continue;
      const Route way = route(gradient, stage, 0);
      const auto row = static_cast<std::size_t>((gradient ? num_stages_ : 0) + stage);
      if (way.crosses()) rows.emplace_back(way.source * pp_size + way.target, row);
    }
  }
  std::sort(rows.begin(), rows.end());
  link_of_.resize(static_cast<std::size_t>(2 * num_stages_), 0);
  std::size_t links = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i == 0 || rows[i].first != rows[i - 1].first) ++links;
    link_of_[rows[i].second] = links - 1;
  }
  links_.resize(links);
}

void Transfers::cross(const TransferCosts& costs, const Route& route, Link& link, double ready) {
  const double start = std::max(ready, link.free);
  const double end = start + seconds(costs, route);
  messages_[route.message].span = {start, end};
  link.free = end;
}

void Transfers::send(const TransferCosts& costs, const Route& route, double time,
                     std::vector<std::size_t>& known) {
  Link& way = link(route);
  messages_[route.message].sent = time;
  way.queue.push_back(route.message);
  advance(costs, way, known);
}

void Transfers::receive(const TransferCosts& costs, const Route& route, double time,
                        std::vector<std::size_t>& known) {
  messages_[route.message].span.start = time;
  advance(costs, link(route), known);
}

void Transfers::send_to_ready(const TransferCosts& costs, const Route& route, double time) {
  messages_[route.message].sent = time;
  cross(costs, route, link(route), time);
}

void Transfers::advance(const TransferCosts& costs, Link& link, std::vector<std::size_t>& known) {
  while (link.head != link.queue.size()) {
    const std::size_t index = link.queue[link.head];
    const Message& message = messages_[index];
    if (std::isnan(message.span.start)) return;  // its receiver is not ready: the others wait
    cross(costs, route_of_message(index), link, std::max(message.sent, message.span.start));
    known.push_back(index);
    ++link.head;
  }
  link.queue.clear();
  link.head = 0;
}

}  // namespace hfpp
