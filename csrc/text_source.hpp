// Text that comes block by block, and where in it a reader stands.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "error.hpp"

namespace hfpp {

// Where text comes from.
class TextSource {
 public:
  virtual ~TextSource() = default;
  // The next bytes, valid until the next call; empty at the end.
  virtual std::string_view next() = 0;
};

class TextInMemory final : public TextSource {
 public:
  explicit TextInMemory(std::string_view text) : text_(text) {}
  std::string_view next() override { return std::exchange(text_, std::string_view()); }

 private:
  std::string_view text_;
};

// A place in a text: line and character, both counted from 1, a character being one byte.
struct TextPlace {
  std::int64_t line = 1;
  std::int64_t character = 1;
};

// "plans/a.csv, line 2, character 5: ...".
[[noreturn]] inline void fail_at(const std::string& name, TextPlace place,
                                 const std::string& message) {
  throw ConfigError(name + ", line " + std::to_string(place.line) + ", character " +
                    std::to_string(place.character) + ": " + message);
}

// Reads bytes one after another. Lines end with \n, \r\n or \r.
class TextReader {
 public:
  static constexpr int kEnd = -1;

  // `name` is what messages call the text. A byte order mark of UTF-8 is passed over.
  TextReader(TextSource& source, std::string name) : source_(source), name_(std::move(name)) {
    if (peek() != 0xef) return;
    for (const int expected : {0xef, 0xbb, 0xbf}) {
      if (peek() != expected) fail_binary();
      take();
    }
    place_.character = 1;
  }

  // The next byte, or kEnd.
  int peek() {
    if (at_ == block_.size() && !refill()) return kEnd;
    return static_cast<unsigned char>(block_[at_]);
  }

  // The next byte, passed over. Not to be called at the end.
  int take() {
    const int byte = peek();
    ++at_;
    if (byte == '\r' || byte == '\n') {
      if (byte == '\r' || !after_return_) ++place_.line;
      place_.character = 1;
    } else {
      ++place_.character;
    }
    after_return_ = byte == '\r';
    return byte;
  }

  // Passes over a line's end, if the reader stands at one.
  bool take_line_end() {
    const int byte = peek();
    if (byte != '\r' && byte != '\n') return false;
    take();
    if (byte == '\r' && peek() == '\n') take();
    return true;
  }

  const std::string& name() const { return name_; }
  TextPlace place() const { return place_; }
  [[noreturn]] void fail(const std::string& message) const { fail_at(name_, place_, message); }

  // The next byte is none that a schedule has.
  [[noreturn]] void fail_binary() {
    constexpr const char* kDigits = "0123456789abcdef";
    const int byte = peek();
    if (byte == kEnd) fail("the file ends within a character: it is cut off");
    fail(std::string("byte 0x") + kDigits[byte >> 4] + kDigits[byte & 15] +
         ": this is not a schedule file, which is plain text");
  }

 private:
  bool refill() {
    if (ended_) return false;
    block_ = source_.next();
    at_ = 0;
    ended_ = block_.empty();
    return !ended_;
  }

  TextSource& source_;
  std::string name_;
  std::string_view block_;
  std::size_t at_ = 0;
  TextPlace place_;
  bool after_return_ = false;
  bool ended_ = false;
};

}  // namespace hfpp
