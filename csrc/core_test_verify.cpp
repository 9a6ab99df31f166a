// The verifier: planted faults, and tables of any actions.
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core_test.hpp"
#include "verify.hpp"

namespace hfpp::test {

namespace {

Schedule schedule_of(std::initializer_list<Row> rows) {
  Schedule schedule("table");
  for (const Row& row : rows) {
    for (const Action action : row) schedule.add(action);
    schedule.end_row();
  }
  return schedule;
}

}  // namespace

void test_verify() {
  using K = Kind;
  const auto refused = [](const Schedule& schedule, const std::string& part) {
    check_throws<ConfigError>([&] { verify(schedule, std::nullopt); }, part);
  };
  const Row first{{K::Forward, 0, 0},
                  {K::SendForward, 0, 0},
                  {K::ReceiveBackward, 0, 0},
                  {K::FullBackward, 0, 0}};
  const Row second{{K::ReceiveForward, 1, 0},
                   {K::Forward, 1, 0},
                   {K::BackwardInput, 1, 0},
                   {K::SendBackward, 1, 0},
                   {K::BackwardWeight, 1, 0}};
  const Schedule good = schedule_of({first, second});
  check(verify(good, 1) == std::vector<std::int64_t>({1, 1}), "one activation each");
  check(verify(schedule_of({{{K::Forward, 0, 0}, {K::FullBackward, 0, 0}}}), 1).size() == 1,
        "a single rank");
  check_throws<ConfigError>([&] { verify(good, 0); }, "activation_limit (0)");

  Row late = second;
  std::swap(late[3], late[4]);
  check(verify(schedule_of({first, late}), 1).size() == 2, "W may come before the send");
  std::swap(late[0], late[1]);
  refused(schedule_of({first, late}), "rank 1, column 0, action 1F0: 1F0 comes without 1RECV_F0");
  refused(schedule_of({first, {second.begin(), second.end() - 1}}), "action 1W0 is missing");
  refused(schedule_of({{first[0], first[2], first[3]}, second}), "rank 0 has no counterpart");
  refused(schedule_of({{first[0], first[2], first[3], first[1]}, second}), "deadlocks: rank 0");
  refused(schedule_of({}), "no compute actions");

  // Sends first on both ranks: only buffers save it.
  const Row sends{{K::Forward, 0, 0},         {K::SendForward, 0, 0},     {K::Forward, 0, 1},
                  {K::SendForward, 0, 1},     {K::ReceiveBackward, 0, 0}, {K::FullBackward, 0, 0},
                  {K::ReceiveBackward, 0, 1}, {K::FullBackward, 0, 1}};
  const Row crossing{{K::ReceiveForward, 1, 0}, {K::Forward, 1, 0},        {K::FullBackward, 1, 0},
                     {K::SendBackward, 1, 0},   {K::ReceiveForward, 1, 1}, {K::Forward, 1, 1},
                     {K::FullBackward, 1, 1},   {K::SendBackward, 1, 1}};
  refused(schedule_of({sends, crossing}), "rank 0, column 3, action 0SEND_F1 waits for 1RECV_F1");

  // Indices at the edge of what an action can have: an error, and no gigabytes.
  const std::int64_t most = Action::kMaxIndex;
  refused(schedule_of({{{K::Forward, 0, most}, {K::FullBackward, 0, most}}}), "0F0 is missing");
  refused(schedule_of({{{K::Forward, most, 0}, {K::FullBackward, most, 0}}}), "runs stage 0");
  refused(schedule_of({{{K::Forward, 0, 0}, {K::Unshard, most, 0}}}), "does not live on this rank");
}

// Whatever the actions are, there is a verdict.
void test_verify_anything() {
  std::mt19937 chance(7);
  int passed = 0;
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const Schedule schedule = odd_schedule(chance);
    try {
      verify(schedule, 1 + static_cast<std::int64_t>(chance() % 2));
      ++passed;
    } catch (const ConfigError&) {
      ++refused;
    }
  }
  check(passed > 1000 && refused > 1000, "some pass, some do not");
}

}  // namespace hfpp::test
