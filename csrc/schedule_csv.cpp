// Schedules as comma-separated files: read byte by byte, written line by line.
#include "schedule_csv.hpp"

#include <utility>

#include "action_text.hpp"
#include "schedule_builder.hpp"

namespace hfpp {

namespace {

class CsvReader {
 public:
  CsvReader(TextSource& source, const std::string& name) : reader_(source, name), rows_(name) {}

  Schedule read() && {
    while (reader_.peek() != TextReader::kEnd) read_row();
    if (!rows_.has_actions()) {
      throw ConfigError(reader_.name() +
                        " holds no actions: a schedule file has a row per rank and actions such "
                        "as 0F0");
    }
    rows_.drop_idle_rows_at_end();
    return std::move(rows_).finish(reader_.name());
  }

 private:
  void read_row() {
    const TextPlace start = reader_.place();
    if (!reader_.take_line_end()) {  // else it is a line without columns
      do {
        read_column();
      } while (take_comma());
      if (!reader_.take_line_end() && reader_.peek() != TextReader::kEnd) {
        reader_.fail(rows_.next() + ": text after a column in quotes");
      }
    }
    rows_.end_row(reader_.name(), start);
  }

  bool take_comma() {
    if (reader_.peek() != ',') return false;
    reader_.take();
    return true;
  }

  void read_column() {
    const TextPlace start = reader_.place();
    text_.clear();
    if (reader_.peek() == '"') {
      read_quoted(start);
    } else {
      while (!at_column_end(reader_.peek())) take_into_text();
    }
    rows_.add_column(reader_.name(), start, text_);
  }

  void read_quoted(TextPlace start) {
    reader_.take();
    while (true) {
      const int byte = reader_.peek();
      if (byte == TextReader::kEnd || byte == '\r' || byte == '\n') {
        fail_at(reader_.name(), start,
                rows_.next() + ": the quotes are not closed: the file is cut off or broken");
      }
      if (byte == '"') {
        reader_.take();
        if (reader_.peek() != '"') return;
      }
      take_into_text();
    }
  }

  static bool at_column_end(int byte) {
    return byte == ',' || byte == '\r' || byte == '\n' || byte == TextReader::kEnd;
  }

  void take_into_text() {
    const int byte = reader_.peek();
    if (byte != '\t' && (byte < 0x20 || byte > 0x7e)) reader_.fail_binary();
    if (text_.size() == kMaxActionText) {
      reader_.fail(rows_.next() + ": " + quoted(text_) + " is longer than any action");
    }
    text_ += static_cast<char>(reader_.take());
  }

  TextReader reader_;
  ScheduleBuilder rows_;
  std::string text_;
};

}  // namespace

Schedule read_csv(TextSource& source, const std::string& name) {
  return CsvReader(source, name).read();
}

std::string csv_line(const Schedule& schedule, std::int64_t rank) {
  std::string line;
  const Action* const end = schedule.end(rank);
  for (const Action* first = schedule.begin(rank); first != end;) {
    const Action* const last = group_end(first, end);
    if (first != schedule.begin(rank)) line += ',';
    append_column(line, first, last);
    first = last;
  }
  // A line that is empty has no columns: one blank column has to be in quotes.
  if (line.empty() && schedule.size(rank) == 1) line = "\"\"";
  return line + "\r\n";
}

}  // namespace hfpp
