// Schedule files.
#include <string>

#include "core_test.hpp"
#include "schedule_csv.hpp"
#include "schedule_json.hpp"

namespace hfpp::test {

namespace {

ScheduleFile json_of(const std::string& pp_size, const std::string& rest) {
  const std::string text = R"({"format": "hfpp schedule", "version": 1, "name": "n", "pp_size": )" +
                           pp_size + ", " + rest + "}";
  TextInMemory source(text);
  return read_json(source, "a.json");
}

}  // namespace

void test_schedule_files() {
  const std::string text = "0F0,,(0F1;1B0)OVERLAP_F_B,1UNSHARD\r\n2W3\r\n";
  const Schedule schedule = csv_of(text + ",,\r\n\r\n");
  check(schedule.pp_size() == 2 && schedule.num_actions() == 6, "rows and actions of a CSV");
  check(schedule.begin(0)[3].joined() && !schedule.begin(0)[2].joined(), "the parts of a group");
  check(schedule.column_of(0, schedule.end(0) - 1) == 3, "a group is one column");
  check(csv_line(schedule, 0) + csv_line(schedule, 1) == text, "a CSV written back");
  check(schedule.kinds() == (1U | 1U << 1 | 1U << 2 | 1U << 4 | 1U << 11), "the kinds that occur");
  const ScheduleFile file = json_of(
      "2", R"("rows": [[], ["\u0030F0", "", "(0F1;1B0)OVERLAP_F_B"]], "metadata": {"a": [1]})");
  check(json_row(file.schedule, 1) == R"(["0F0","","(0F1;1B0)OVERLAP_F_B"])", "a JSON row");
  check(file.metadata == R"({"a": [1]})" && file.schedule.name() == "n", "what else JSON has");
  check_throws<ConfigError>([] { csv_of("0F0\n1F0,1X0"); },
                            "a.csv, line 2, character 5: rank 1, column 1: '1X0' is not");
  check_throws<ConfigError>([] { csv_of("0F268435456"); }, "numbered from 0 to 268435455");
  check_throws<ConfigError>([] { csv_of("0F0,\"1F0"); },
                            "character 5: rank 0, column 1: the quotes");
  check_throws<ConfigError>([] { csv_of(std::string(5000, 'F')); }, "is longer than any action");
  check_throws<ConfigError>([] { csv_of("0F0\xff"); }, "character 4: byte 0xff");
  check_throws<ConfigError>([] { csv_of(std::string((1 << 20) + 1, '\n')); }, "1048576 ranks");
  check_throws<ConfigError>([] { csv_of(""); }, "holds no actions");
  check_throws<ConfigError>([] { json_of("3", R"("rows": [["0F0"]])"); }, "pp_size (3) is not");
  check_throws<ConfigError>([] { json_of("1", R"("rows": [["0F0"])"); }, "or ']', not '}'");
  check_throws<ConfigError>([] { json_of("1", R"("metadata": {"a": )" + std::string(99, '[')); },
                            "nested deeper than 32 levels");
}

}  // namespace hfpp::test
