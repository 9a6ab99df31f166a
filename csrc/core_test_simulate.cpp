// The simulator and lock step: small tables by hand, and tables of any actions.
#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core_test.hpp"
#include "lock_step.hpp"
#include "simulate.hpp"
#include "verify.hpp"

namespace hfpp::test {

namespace {

ActionCosts costs_of(std::int64_t num_stages, Communication communication) {
  const auto stages = static_cast<std::size_t>(num_stages);
  const std::size_t boundaries = stages == 0 ? 0 : stages - 1;
  const auto times = [&](double time) { return std::vector<double>(stages, time); };
  const auto bytes = [&](std::size_t count) { return std::vector<std::int64_t>(count, 5); };
  const std::vector<double> seconds(boundaries, 1);
  return {times(1),
          times(2),
          times(1),
          times(1),
          bytes(stages),
          bytes(stages),
          {seconds, seconds, bytes(boundaries), communication},
          0};
}

}  // namespace

void test_simulate() {
  const Schedule schedule = csv_of("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n");
  ActionCosts costs = costs_of(2, Communication::Beside);
  const Simulation beside(schedule, costs);
  // 0F0 to 1, on the way to 2; 1F0 to 3, 1F1 and 1B0 to 6, on the way to 7, 0B0 to 9; 1B1 to 8.
  check(beside.step_time() == 11 && beside.spans(0)[2].start == 7, "transfers beside");
  check(beside.report(1).start == 2 && beside.report(1).end == 3, "the second rank's idle time");
  check(beside.report(0).gradients == 4 && beside.report(0).communication == 1, "by cause");
  check(beside.report(0).peak_live == 2 && beside.report(0).peak_activation_bytes == 10, "memory");
  check(beside.report(1).sent_bytes == 10 && beside.report(1).peak_receive_buffers == 2, "buffers");
  check(beside.sent_by(0).size() == 2 && beside.sent_by(0)[1].span.end == 3, "what is sent");
  costs.transfers.communication = Communication::Within;
  const Simulation within(schedule, costs);
  check(within.spans(0)[1].start == 2 && within.report(0).communication == 4, "transfers within");
  costs.overlap_gain = 1;
  check(Simulation(schedule, costs).spans(1)[2].end == within.spans(1)[2].end - 1, "a gain");
  costs.overlap_gain = 2;
  check_throws<ConfigError>([&] { Simulation(schedule, costs); }, "overlap_gain (2");
  costs = costs_of(3, Communication::Beside);
  check_throws<ConfigError>([&] { Simulation(schedule, costs); }, "has 3 entries");
  const Schedule circle = csv_of("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n");
  check_throws<ConfigError>(
      [&] { Simulation(circle, costs_of(2, Communication::Beside)); },
      "deadlocks: rank 0, column 1, action 0B0 waits for 1B0 of rank 1; rank 1, column 0");
  const Schedule lowered = csv_of("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n");
  LockStep lock = lock_step(lowered);
  const std::int32_t expected[] = {0, 1, 4, 5, 1, 2, 3, 4};
  check(std::equal(expected, expected + 8, lock.steps.data<std::int32_t>()) && lock.count == 6,
        "a receive with its send");
}

// Whatever is in a table, it runs to its end or is refused; what is verified runs.
void test_simulate_anything() {
  std::mt19937 chance(11);
  int ran = 0;
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const Schedule schedule = odd_schedule(chance);
    const auto communication = static_cast<Communication>(chance() % 2);
    bool verified = true;
    try {
      verify(schedule, std::nullopt);
    } catch (const ConfigError&) {
      verified = false;
    }
    try {
      const Simulation step(schedule, costs_of(schedule.num_stages(), communication));
      double idle = 0;
      for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
        idle += step.report(rank).busy + step.report(rank).idle();
      }
      check(idle == step.step_time() * static_cast<double>(schedule.pp_size()), "busy or idle");
      if (schedule.has_communication()) lock_step(schedule);
      ++ran;
    } catch (const ConfigError& error) {
      check(!verified, error.what());
      ++refused;
    }
  }
  check(ran > 1000 && refused > 1000, "some run, some do not");
}

}  // namespace hfpp::test
