// Any bytes as a schedule file: the readers refuse them or give a table that is written and read
// back alike. For Clang's libFuzzer, once for CSV and once for JSON.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "schedule_csv.hpp"
#include "schedule_json.hpp"

namespace {

using hfpp::Schedule;

void require(bool holds) {
  if (!holds) std::abort();
}

// Blocks of a few bytes, so that readers meet a border everywhere.
class SmallBlocks final : public hfpp::TextSource {
 public:
  explicit SmallBlocks(std::string_view text) : text_(text) {}
  std::string_view next() override {
    const std::string_view block = text_.substr(0, 3);
    text_.remove_prefix(block.size());
    return block;
  }

 private:
  std::string_view text_;
};

void require_same(const Schedule& a, const Schedule& b) {
  require(a.pp_size() == b.pp_size() && a.num_actions() == b.num_actions());
  for (std::int64_t rank = 0; rank < a.pp_size(); ++rank) {
    require(a.size(rank) == b.size(rank));
    for (std::int64_t i = 0; i < a.size(rank); ++i) require(a.begin(rank)[i] == b.begin(rank)[i]);
  }
}

// A table has no more actions than its file has bytes, and its places and stages can be named.
void use(const Schedule& schedule, std::size_t bytes) {
  require(schedule.num_actions() <= static_cast<std::int64_t>(bytes));
  require(schedule.pp_size() <= static_cast<std::int64_t>(bytes));
  for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
    if (schedule.size(rank) > 0) (void)schedule.place_of(rank, schedule.end(rank) - 1);
  }
  try {
    (void)schedule.stage_to_rank();
  } catch (const hfpp::ConfigError&) {
  }
}

void fuzz_csv(std::string_view text) {
  hfpp::TextInMemory whole(text);
  const Schedule schedule = hfpp::read_csv(whole, "fuzz");
  use(schedule, text.size());
  SmallBlocks small(text);
  require_same(schedule, hfpp::read_csv(small, "fuzz"));
  std::string written;
  for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
    written += hfpp::csv_line(schedule, rank);
  }
  hfpp::TextInMemory again(written);
  require_same(schedule, hfpp::read_csv(again, "again"));
}

void fuzz_json(std::string_view text) {
  hfpp::TextInMemory whole(text);
  const hfpp::ScheduleFile file = hfpp::read_json(whole, "fuzz");
  use(file.schedule, text.size());
  require(file.metadata.size() <= text.size());
  SmallBlocks small(text);
  require_same(file.schedule, hfpp::read_json(small, "fuzz").schedule);
  std::string written = R"({"format": "hfpp schedule", "version": 1, "name": "again", "pp_size": )";
  written += std::to_string(file.schedule.pp_size()) + R"(, "rows": [)";
  for (std::int64_t rank = 0; rank < file.schedule.pp_size(); ++rank) {
    written += (rank == 0 ? "" : ",") + hfpp::json_row(file.schedule, rank);
  }
  written += R"(], "metadata": )" + file.metadata + "}";
  hfpp::TextInMemory again(written);
  const hfpp::ScheduleFile reread = hfpp::read_json(again, "again");
  require_same(file.schedule, reread.schedule);
  require(file.metadata == reread.metadata);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    (HFPP_FUZZ_JSON ? fuzz_json : fuzz_csv)(text);
  } catch (const hfpp::ConfigError&) {  // refused
  }
  return 0;
}
