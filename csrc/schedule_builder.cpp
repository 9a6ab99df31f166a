// Rows of actions that come column by column from a file: limits, and places in messages.
#include "schedule_builder.hpp"

#include "action_text.hpp"

namespace hfpp {

void ScheduleBuilder::add_column(const std::string& file, TextPlace place, std::string_view text) {
  try {
    parse_action(text, parts_);
  } catch (const ConfigError& error) {
    fail_at(file, place, next() + ": " + error.what());
  }
  if (schedule_.num_actions() + static_cast<std::int64_t>(parts_.size()) > kMaxFileActions) {
    fail_at(
        file, place,
        next() + ": a schedule file holds at most " + std::to_string(kMaxFileActions) + " actions");
  }
  for (const Action part : parts_) schedule_.add(part);
  if (parts_.front().kind() != Kind::Idle) rows_with_actions_ = rows() + 1;
  ++column_;
}

void ScheduleBuilder::end_row(const std::string& file, TextPlace place) {
  if (rows() == kMaxFileRanks) {
    fail_at(file, place,
            "a schedule file has rows for at most " + std::to_string(kMaxFileRanks) + " ranks");
  }
  schedule_.end_row();
  column_ = 0;
}

std::string ScheduleBuilder::next() const {
  return "rank " + std::to_string(rows()) + ", column " + std::to_string(column_);
}

Schedule ScheduleBuilder::finish(std::string name) && {
  schedule_.rename(std::move(name));
  schedule_.shrink();
  return std::move(schedule_);
}

}  // namespace hfpp
