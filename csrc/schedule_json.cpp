// Schedules as JSON: keys and rows, in one pass.
#include "schedule_json.hpp"

#include <array>
#include <string_view>
#include <utility>

#include "action_text.hpp"
#include "json_reader.hpp"
#include "schedule_builder.hpp"

namespace hfpp {

namespace {

constexpr std::string_view kFormat = "hfpp schedule";
constexpr std::int64_t kVersion = 1;
constexpr std::size_t kMaxName = 4096;

enum Key : std::size_t { kFormatKey, kVersionKey, kNameKey, kSizeKey, kRowsKey, kMetadataKey };
constexpr std::array<std::string_view, 6> kKeys = {"format",  "version", "name",
                                                   "pp_size", "rows",    "metadata"};

class ScheduleReader {
 public:
  ScheduleReader(TextSource& source, const std::string& name) : json_(source, name), rows_(name) {}

  ScheduleFile read() && {
    json_.read_items('{', '}', "'{', with which a schedule as JSON begins", [&] { read_pair(); });
    json_.expect_end();
    for (std::size_t key = 0; key < kKeys.size(); ++key) {
      if (key != kMetadataKey && !seen_[key]) {
        json_.fail("the file ends without the key \"" + std::string(kKeys[key]) + "\"");
      }
    }
    if (rows_.rows() != pp_size_) {
      fail_at(json_.name(), size_place_,
              named("pp_size", pp_size_) + " is not the number of rows (" +
                  std::to_string(rows_.rows()) + ")");
    }
    if (!rows_.has_actions()) {
      json_.fail("rows holds no actions: it has a list per rank, of actions such as \"0F0\"");
    }
    return {std::move(rows_).finish(std::move(name_)), std::move(metadata_)};
  }

 private:
  void read_pair() {
    json_.skip_space();
    const TextPlace start = json_.place();
    const std::string word = json_.read_string("a key in quotes", kMaxName);
    std::size_t key = 0;
    while (key < kKeys.size() && kKeys[key] != word) ++key;
    if (key == kKeys.size()) {
      std::string known;
      for (const std::string_view one : kKeys) {
        known += (known.empty() ? "" : ", ") + std::string(one);
      }
      fail_at(json_.name(), start, "unknown key " + quoted(word) + ": known are " + known);
    }
    if (seen_[key]) fail_at(json_.name(), start, "the key " + quoted(word) + " comes twice");
    seen_[key] = true;
    json_.expect(':', "':'");
    json_.skip_space();
    read_value(static_cast<Key>(key));
  }

  void read_value(Key key) {
    const TextPlace start = json_.place();
    switch (key) {
      case kFormatKey:
        if (json_.read_string("the format in quotes", kMaxName) != kFormat) {
          fail_at(json_.name(), start, "format is not \"" + std::string(kFormat) + "\"");
        }
        return;
      case kVersionKey:
        if (json_.read_count("a version number", kMaxFileRanks) != kVersion) {
          fail_at(json_.name(), start,
                  "the version is unknown: known is " + std::to_string(kVersion));
        }
        return;
      case kNameKey:
        name_ = json_.read_string("the schedule's name in quotes", kMaxName);
        return;
      case kSizeKey:
        size_place_ = start;
        pp_size_ = json_.read_count("the number of ranks", kMaxFileRanks);
        return;
      case kRowsKey:
        json_.read_items('[', ']', "a list with a list per rank", [&] { read_row(); });
        return;
      case kMetadataKey:
        metadata_ = json_.read_object("metadata", kMaxMetadata);
        return;
    }
  }

  void read_row() {
    json_.skip_space();
    const TextPlace start = json_.place();
    json_.read_items('[', ']', "a list of the actions of a rank", [&] {
      json_.skip_space();
      const TextPlace place = json_.place();
      rows_.add_column(json_.name(), place,
                       json_.read_string("an action in quotes, such as \"0F0\"", kMaxActionText));
    });
    rows_.end_row(json_.name(), start);
  }

  JsonReader json_;
  ScheduleBuilder rows_;
  std::array<bool, kKeys.size()> seen_{};
  std::string name_;
  std::string metadata_ = "{}";
  std::int64_t pp_size_ = 0;
  TextPlace size_place_;
};

}  // namespace

ScheduleFile read_json(TextSource& source, const std::string& name) {
  return ScheduleReader(source, name).read();
}

void check_metadata(TextSource& source, const std::string& name) {
  JsonReader reader(source, name);
  reader.read_object("metadata", kMaxMetadata);
  reader.expect_end();
}

std::string json_row(const Schedule& schedule, std::int64_t rank) {
  std::string row = "[";
  const Action* const end = schedule.end(rank);
  for (const Action* first = schedule.begin(rank); first != end;) {
    const Action* const last = group_end(first, end);
    row += row.size() == 1 ? "\"" : ",\"";
    append_column(row, first, last);
    row += '"';
    first = last;
  }
  return row + "]";
}

}  // namespace hfpp
