// Schedules as comma-separated files: one line per rank, one action per column, as torch has them.
#pragma once

#include <cstdint>
#include <string>

#include "schedule.hpp"
#include "text_source.hpp"

namespace hfpp {

// Nothing but the spelling is checked. Blank columns are kept as idle actions, lines at the end
// without actions are not. `name` is the schedule's and the file's.
Schedule read_csv(TextSource& source, const std::string& name);

// One rank's line, its end included.
std::string csv_line(const Schedule& schedule, std::int64_t rank);

}  // namespace hfpp
