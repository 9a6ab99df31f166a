// The spelling of actions in schedule files: reading and writing one column.
#include "action_text.hpp"

#include <cstdint>

namespace hfpp {

namespace {

constexpr std::string_view kGroup = ")OVERLAP_F_B";

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

std::string_view stripped(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

[[noreturn]] void fail(std::string_view text) {
  std::string kinds;
  for (std::uint8_t kind = 1; kind < kKinds; ++kind) {
    kinds += (kind == 1 ? "" : ", ") + std::string(spelling(static_cast<Kind>(kind)));
  }
  throw ConfigError(quoted(text) +
                    " is not a schedule action: expected stage, kind and microbatch such as 3F0 "
                    "(kinds: " +
                    kinds +
                    "; UNSHARD, RESHARD and REDUCE_GRAD without a microbatch), a group such as "
                    "(2F4;5B1)OVERLAP_F_B, or nothing");
}

// The number at the front of `rest`, which is passed over; -1 where there is none.
std::int64_t take_number(std::string_view text, std::string_view& rest) {
  std::int64_t number = rest.empty() || !is_digit(rest.front()) ? -1 : 0;
  while (!rest.empty() && is_digit(rest.front())) {
    number = number * 10 + (rest.front() - '0');
    if (number > Action::kMaxIndex) {
      throw ConfigError(quoted(text) + ": stages and microbatches are numbered from 0 to " +
                        std::to_string(Action::kMaxIndex));
    }
    rest.remove_prefix(1);
  }
  return number;
}

Kind kind_of(std::string_view text) {
  for (std::uint8_t kind = 1; kind < kKinds; ++kind) {
    if (spelling(static_cast<Kind>(kind)) == text) return static_cast<Kind>(kind);
  }
  return Kind::Idle;
}

// `whole` is the column that `text` is from, for messages.
Action parse_single(std::string_view text, std::string_view whole) {
  std::string_view rest = text;
  const std::int64_t stage = take_number(whole, rest);
  std::size_t letters = 0;
  while (letters < rest.size() && !is_digit(rest[letters])) ++letters;
  const Kind kind = kind_of(rest.substr(0, letters));
  rest.remove_prefix(letters);
  const std::int64_t microbatch = take_number(whole, rest);
  if (stage < 0 || kind == Kind::Idle || !rest.empty() ||
      has_microbatch(kind) != (microbatch >= 0)) {
    fail(whole);
  }
  return Action(kind, stage, microbatch < 0 ? 0 : microbatch);
}

}  // namespace

std::string quoted(std::string_view text) {
  constexpr std::size_t kShown = 60;
  constexpr const char* kDigits = "0123456789abcdef";
  std::string result = "'";
  for (const char c : text.substr(0, kShown)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      result += c;
    } else {
      result += std::string("\\x") + kDigits[byte >> 4] + kDigits[byte & 15];
    }
  }
  return result + (text.size() > kShown ? "...'" : "'");
}

void parse_action(std::string_view text, std::vector<Action>& parts) {
  parts.clear();
  const std::string_view column = stripped(text);
  if (column.empty() || column == "None") {
    parts.emplace_back();
    return;
  }
  if (column.front() != '(') {
    parts.push_back(parse_single(column, column));
    return;
  }
  if (column.size() < kGroup.size() + 1 || column.substr(column.size() - kGroup.size()) != kGroup) {
    fail(column);
  }
  std::string_view rest = column.substr(1, column.size() - kGroup.size() - 1);
  for (bool more = true; more;) {
    const std::size_t end = rest.find(';');
    const Action part = parse_single(stripped(rest.substr(0, end)), column);
    if (!is_compute(part.kind())) fail(column);
    parts.emplace_back(part.kind(), part.stage(), part.microbatch(), !parts.empty());
    more = end != std::string_view::npos;
    if (more) rest.remove_prefix(end + 1);
  }
}

void append_column(std::string& text, const Action* first, const Action* last) {
  const bool group = last - first > 1;
  if (group) text += '(';
  for (const Action* part = first; part != last; ++part) {
    if (part != first) text += ';';
    if (part->kind() != Kind::Idle) text += text_of(*part);
  }
  if (group) text += kGroup;
}

}  // namespace hfpp
