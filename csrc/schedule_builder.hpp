// Rows of actions that come column by column from a file, within limits.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "schedule.hpp"
#include "text_source.hpp"

namespace hfpp {

// More than a plan of a real cluster has; a file that is none is told from one before it takes
// gigabytes of memory.
constexpr std::int64_t kMaxFileActions = std::int64_t{1} << 26;
constexpr std::int64_t kMaxFileRanks = std::int64_t{1} << 20;

class ScheduleBuilder {
 public:
  explicit ScheduleBuilder(std::string name) : schedule_(std::move(name)) {}

  // Throws with the file's name and the place, where the text is no action or there are too many.
  void add_column(const std::string& file, TextPlace place, std::string_view text);
  void end_row(const std::string& file, TextPlace place);
  // "rank 2, column 0": what comes next.
  std::string next() const;
  std::int64_t rows() const { return schedule_.pp_size(); }
  // Whether any row has an action that is not idle.
  bool has_actions() const { return rows_with_actions_ > 0; }
  void drop_idle_rows_at_end() { schedule_.truncate(rows_with_actions_); }
  Schedule finish(std::string name) &&;

 private:
  Schedule schedule_;
  std::vector<Action> parts_;
  std::int64_t column_ = 0;
  std::int64_t rows_with_actions_ = 0;
};

}  // namespace hfpp
