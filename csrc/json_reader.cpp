// The parts of JSON: strings with their escapes, counts, and values that are only passed over.
#include "json_reader.hpp"

#include "action_text.hpp"

namespace hfpp {

namespace {

constexpr std::int64_t kMaxNumber = 64;  // characters

bool is_digit(int byte) {
  return byte >= '0' && byte <= '9';
}

void append_utf8(std::string& text, std::uint32_t point) {
  const auto put = [&text](std::uint32_t byte) { text += static_cast<char>(byte); };
  if (point < 0x80) {
    put(point);
  } else if (point < 0x800) {
    put(0xc0 | point >> 6);
    put(0x80 | (point & 63));
  } else if (point < 0x10000) {
    put(0xe0 | point >> 12);
    put(0x80 | (point >> 6 & 63));
    put(0x80 | (point & 63));
  } else {
    put(0xf0 | point >> 18);
    put(0x80 | (point >> 12 & 63));
    put(0x80 | (point >> 6 & 63));
    put(0x80 | (point & 63));
  }
}

// The bytes that may follow the first one of a character (Unicode 15, table 3-7): no character has
// two forms, and half of a surrogate pair has none.
bool may_follow(std::uint32_t first, int byte) {
  const int least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const int most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  return least <= byte && byte <= most;
}

}  // namespace

void JsonReader::fail_expected(const std::string& what) {
  const int byte = text_.peek();
  if (byte == TextReader::kEnd) {
    fail("expected " + what + ", but the file ends here: it is cut off");
  }
  if (byte < 0x20 || byte > 0x7e) text_.fail_binary();
  const char found = static_cast<char>(byte);
  fail("expected " + what + ", not " + quoted(std::string_view(&found, 1)));
}

void JsonReader::skip_space() {
  for (int byte = text_.peek(); byte == ' ' || byte == '\t' || byte == '\r' || byte == '\n';
       byte = text_.peek()) {
    take();
  }
}

void JsonReader::expect(char expected, const std::string& what) {
  if (!take_if(expected)) fail_expected(what);
}

void JsonReader::expect_end() {
  skip_space();
  if (text_.peek() != TextReader::kEnd) fail_expected("nothing behind the closing '}'");
}

std::string JsonReader::read_string(const std::string& what, std::size_t most) {
  expect('"', what);
  std::string result;
  while (text_.peek() != '"') {
    if (text_.peek() == TextReader::kEnd) fail_expected("the closing quotes of " + what);
    read_character(result);
    if (result.size() > most) {
      fail(what + " is longer than " + std::to_string(most) + " bytes: " + quoted(result));
    }
  }
  take();
  return result;
}

std::int64_t JsonReader::read_count(const std::string& what, std::int64_t most) {
  skip_space();
  const TextPlace start = place();
  const int first = text_.peek();
  if (!is_digit(first)) fail_expected(what);
  std::int64_t number = 0;
  while (is_digit(text_.peek())) {
    number = number * 10 + (take() - '0');
    if (number > most || (first == '0' && is_digit(text_.peek()))) {
      fail_at(name(), start, "expected " + what + ", from 0 to " + std::to_string(most));
    }
  }
  return number;
}

std::string JsonReader::read_object(const std::string& what, std::size_t most) {
  skip_space();
  if (text_.peek() != '{') fail_expected(what + " as an object, which begins with '{'");
  std::string copy;
  copy_ = &copy;
  most_copied_ = most;
  skip_value(kMaxJsonDepth);
  copy_ = nullptr;
  return copy;
}

bool JsonReader::take_if(char expected) {
  skip_space();
  if (text_.peek() != expected) return false;
  take();
  return true;
}

int JsonReader::take() {
  const int byte = text_.take();
  if (copy_ != nullptr) {
    if (copy_->size() == most_copied_) {
      fail("the object is longer than " + std::to_string(most_copied_) + " bytes");
    }
    *copy_ += static_cast<char>(byte);
  }
  return byte;
}

void JsonReader::read_character(std::string& result) {
  const int byte = text_.peek();
  if (byte < 0x20 || byte == 0x7f) text_.fail_binary();
  if (byte >= 0x80) {
    append_utf8(result, read_utf8());
  } else if (byte == '\\') {
    append_utf8(result, read_escape());
  } else {
    result += static_cast<char>(take());
  }
}

std::uint32_t JsonReader::read_utf8() {
  const auto first = static_cast<std::uint32_t>(text_.peek());
  if (first < 0xc2 || first > 0xf4) text_.fail_binary();
  const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
  take();
  std::uint32_t point = first & (0x3fU >> more);
  for (int left = more; left > 0; --left) {
    const int byte = text_.peek();
    if (!may_follow(left == more ? first : 0, byte)) text_.fail_binary();
    point = point << 6 | (static_cast<std::uint32_t>(byte) & 63);
    take();
  }
  return point;
}

std::uint32_t JsonReader::read_escape() {
  constexpr std::string_view kLetters = "\"\\/bfnrt";
  constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
  take();
  const int letter = text_.peek();
  if (letter != 'u') {
    const std::size_t position = letter == TextReader::kEnd
                                     ? std::string_view::npos
                                     : kLetters.find(static_cast<char>(letter));
    if (position == std::string_view::npos) fail_expected("an escape such as \\n");
    take();
    return static_cast<std::uint32_t>(kMeanings[position]);
  }
  take();
  const std::uint32_t unit = read_hex();
  if (unit < 0xd800 || unit > 0xdfff) return unit;
  for (const char next : {'\\', 'u'}) {
    if (unit > 0xdbff || text_.peek() != next) fail_expected("both halves of a surrogate pair");
    take();
  }
  const std::uint32_t low = read_hex();
  if (low < 0xdc00 || low > 0xdfff) fail("a surrogate pair without its second half");
  return 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
}

std::uint32_t JsonReader::read_hex() {
  std::uint32_t unit = 0;
  for (int digit = 0; digit < 4; ++digit) {
    const int byte = text_.peek();
    const int value = is_digit(byte)               ? byte - '0'
                      : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
                      : byte >= 'A' && byte <= 'F' ? byte - 'A' + 10
                                                   : -1;
    if (value < 0) fail_expected("four hexadecimal digits");
    unit = unit << 4 | static_cast<std::uint32_t>(value);
    take();
  }
  return unit;
}

void JsonReader::skip_value(int depth) {
  if (depth == 0) fail("nested deeper than " + std::to_string(kMaxJsonDepth) + " levels");
  skip_space();
  const int byte = text_.peek();
  if (byte == '{') {
    read_items('{', '}', "an object", [&] {
      read_string("a key in quotes", most_copied_);
      expect(':', "':'");
      skip_value(depth - 1);
    });
  } else if (byte == '[') {
    read_items('[', ']', "a list", [&] { skip_value(depth - 1); });
  } else if (byte == '"') {
    read_string("a string", most_copied_);
  } else if (byte == '-' || is_digit(byte)) {
    skip_number();
  } else {
    skip_word(byte == 't' ? "true" : byte == 'f' ? "false" : "null");
  }
}

void JsonReader::skip_word(std::string_view word) {
  for (const char letter : word) {
    if (text_.peek() != letter) fail_expected("a JSON value");
    take();
  }
}

void JsonReader::skip_number() {
  const TextPlace start = place();
  if (text_.peek() == '-') take();
  if (text_.peek() == '0') {
    take();
  } else {
    skip_digits(start);
  }
  if (text_.peek() == '.') {
    take();
    skip_digits(start);
  }
  if (text_.peek() == 'e' || text_.peek() == 'E') {
    take();
    if (text_.peek() == '+' || text_.peek() == '-') take();
    skip_digits(start);
  }
}

void JsonReader::skip_digits(TextPlace start) {
  if (!is_digit(text_.peek())) fail_expected("a digit");
  while (is_digit(text_.peek())) {
    take();
    if (place().character - start.character > kMaxNumber) {
      fail_at(name(), start, "a number of more than " + std::to_string(kMaxNumber) + " characters");
    }
  }
}

}  // namespace hfpp
