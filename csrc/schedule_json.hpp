// Schedules as JSON: {"format": "hfpp schedule", "version": 1, "name": "1F1B", "pp_size": 2,
// "rows": [["0F0", ...], ...], "metadata": {...}}, the last optional, the keys in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "schedule.hpp"
#include "text_source.hpp"

namespace hfpp {

// Of the optional object that says more about a schedule, such as the plan it is from.
constexpr std::size_t kMaxMetadata = std::size_t{1} << 20;

struct ScheduleFile {
  Schedule schedule;
  std::string metadata;  // as the file has it, "{}" where it has none
};

// Strict: no other keys, none twice, nothing behind the end. Nothing but the spelling of actions is
// checked. `name` is what messages call the file.
ScheduleFile read_json(TextSource& source, const std::string& name);

// Throws where a text is not what a file can have as its metadata.
void check_metadata(TextSource& source, const std::string& name);

// One rank's actions as a JSON list.
std::string json_row(const Schedule& schedule, std::int64_t rank);

}  // namespace hfpp
