// Errors of the core, and integer arithmetic that reports overflow instead of wrapping.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace hfpp {

// A configuration that cannot work. Python sees it as hfpp.PipelineConfigError.
class ConfigError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// "num_stages (6)": how every message names an argument and its value.
inline std::string named(const char* name, std::int64_t value) {
  return std::string(name) + " (" + std::to_string(value) + ")";
}

inline std::string named(const char* name, double value) {
  std::ostringstream text;  // std::to_string has no exponents: 1e-9 would be 0.000000
  text << name << " (" << value << ")";
  return text.str();
}

inline void require_at_least(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least) {
    const std::string bound = std::to_string(least);
    throw ConfigError(named(name, value) + " must be at least " + bound + ": use " + name + "=" +
                      bound + " or more.");
  }
}

inline void require_at_most(const char* name, std::int64_t value, std::int64_t most) {
  if (value > most) {
    throw std::overflow_error(named(name, value) + " must be at most " + std::to_string(most) +
                              ": use a smaller " + name + ".");
  }
}

// `what` names the arguments that are multiplied or added, for the message.
inline std::int64_t checked_multiply(std::int64_t a, std::int64_t b, const char* what) {
  std::int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) {
    throw std::overflow_error(std::string(what) + " (" + std::to_string(a) + " * " +
                              std::to_string(b) + ") does not fit in 64 bits: use smaller sizes.");
  }
  return result;
}

inline std::int64_t checked_add(std::int64_t a, std::int64_t b, const char* what) {
  std::int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) {
    throw std::overflow_error(std::string(what) + " (" + std::to_string(a) + " + " +
                              std::to_string(b) + ") does not fit in 64 bits: use smaller sizes.");
  }
  return result;
}

}  // namespace hfpp
