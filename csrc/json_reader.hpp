// The parts of JSON (RFC 8259), read where a reader stands, strictly and within limits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "text_source.hpp"

namespace hfpp {

constexpr int kMaxJsonDepth = 32;

class JsonReader {
 public:
  JsonReader(TextSource& source, const std::string& name) : text_(source, name) {}

  const std::string& name() const { return text_.name(); }
  TextPlace place() const { return text_.place(); }
  [[noreturn]] void fail(const std::string& message) const { text_.fail(message); }
  // What stands here is none of what may.
  [[noreturn]] void fail_expected(const std::string& what);

  void skip_space();
  // Passes over `what`, spaces before it and nothing else.
  void expect(char expected, const std::string& what);
  void expect_end();
  // A list or an object, `read` reading each item of it.
  template <class Read>
  void read_items(char open, char close, const std::string& what, const Read& read) {
    expect(open, what);
    if (take_if(close)) return;
    do {
      read();
    } while (take_if(','));
    expect(close, std::string("',' or '") + close + "'");
  }

  // A string of at most so many bytes of UTF-8, its escapes resolved.
  std::string read_string(const std::string& what, std::size_t most);
  // A whole number from 0.
  std::int64_t read_count(const std::string& what, std::int64_t most);
  // An object of any content, as it is written, of at most so many bytes.
  std::string read_object(const std::string& what, std::size_t most);

 private:
  bool take_if(char expected);
  int take();
  void read_character(std::string& result);
  std::uint32_t read_utf8();
  std::uint32_t read_escape();
  std::uint32_t read_hex();
  void skip_value(int depth);
  void skip_word(std::string_view word);
  void skip_number();
  void skip_digits(TextPlace start);

  TextReader text_;
  std::string* copy_ = nullptr;  // of what is passed over
  std::size_t most_copied_ = 0;
};

}  // namespace hfpp
