// Plain checks of the core without Python, made to run under sanitizers.
#include "core_test.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "schedule_csv.hpp"

namespace hfpp::test {

namespace {

int checks = 0;

}  // namespace

void check(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  std::fprintf(stderr, "core_test: failed: %s\n", what.c_str());
  std::exit(1);
}

Schedule csv_of(std::string_view text) {
  TextInMemory source(text);
  return read_csv(source, "a.csv");
}

Schedule odd_schedule(std::mt19937& chance) {
  const auto below = [&](std::size_t most) { return static_cast<std::int64_t>(chance() % most); };
  std::vector<Row> rows(1 + chance() % 2);
  for (std::size_t rank = 0; rank < rows.size(); ++rank) {
    const auto stage = static_cast<std::int64_t>(rank);
    for (const Kind kind : {Kind::Forward, Kind::FullBackward}) {
      for (std::int64_t m = 0; m < 2; ++m) rows[rank].push_back({kind, stage, m});
    }
  }
  for (std::int64_t edits = below(4); edits > 0; --edits) {
    Row& row = rows[chance() % rows.size()];
    const auto kind = static_cast<Kind>(below(kKinds));
    const Action action(kind, below(3), below(3), !row.empty() && below(3) == 0);
    const auto place = row.begin() + below(row.size() + 1);
    if (below(3) == 0) {
      row.insert(place, action);
    } else if (place != row.end()) {
      if (below(2) == 0) std::swap(*place, row.front());
      if (below(2) == 0) row.erase(place);
    }
  }
  Schedule schedule("table");
  for (const Row& row : rows) {
    for (const Action& a : row) schedule.add(&a == row.data() ? a.alone() : a);
    schedule.end_row();
  }
  return schedule;
}

}  // namespace hfpp::test

int main() {
  hfpp::test::test_table();
  hfpp::test::test_placement();
  hfpp::test::test_partition();
  hfpp::test::test_balance();
  hfpp::test::test_shapes();
  hfpp::test::test_schedule_files();
  hfpp::test::test_verify();
  hfpp::test::test_verify_anything();
  hfpp::test::test_orders();
  hfpp::test::test_lowering();
  hfpp::test::test_simulate();
  hfpp::test::test_simulate_anything();
  std::printf("core_test: %d checks passed\n", hfpp::test::checks);
  return 0;
}
