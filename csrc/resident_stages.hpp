// Which stages have their parameters gathered while one row runs, as torch decides it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "schedule.hpp"

namespace hfpp {

// Whole numbers in the order in which CPython (3.10 to 3.14) walks a set of them. torch 2.11
// to 2.14 walk such a set to decide which stage gives its parameters back first.
class PythonSet {
 public:
  PythonSet();
  void add(std::int64_t value);  // one that is not in the set
  void remove(std::int64_t value);
  void append_to(std::vector<std::int64_t>& values) const;

 private:
  static constexpr std::int64_t kEmpty = -1;
  static constexpr std::int64_t kRemoved = -2;  // keeps its slot until the set is laid out anew

  std::size_t free_slot(std::int64_t value) const;
  void lay_out_anew();

  std::vector<std::int64_t> slots_;
  std::size_t used_ = 0;
  std::size_t filled_ = 0;  // used or removed
};

class ResidentStages {
 public:
  // `ordered`: stages are given back in the order in which they came, else as a Python set has
  // them.
  explicit ResidentStages(bool ordered) : ordered_(ordered) {}

  // Reads a row of computations. Throws where a group needs more stages than may be gathered.
  void look_ahead(const Schedule& table, std::int64_t rank);
  // What comes before the row's group of that number: other stages out, the next stages in.
  void before(std::size_t group, Schedule& out);
  // All out, at the end of the row.
  void release(Schedule& out);

 private:
  static constexpr std::size_t kMost = 3;  // torch's: one that goes forward, one back, one to come
  // The next stages that compute, in order, as far as the group that makes them `kMost` or more:
  // two single ones and the stages of a group at most.
  struct Ahead {
    struct Stage {
      std::int64_t stage;
      std::size_t group;  // of its first action from here on
    };
    std::array<Stage, 2 * kMost - 1> stages;
    std::size_t size = 0;

    bool has(std::int64_t stage) const;
    void add(std::int64_t stage, std::size_t group);
  };

  void read_active();

  bool ordered_;
  std::vector<Ahead> ahead_;  // per group of the row
  PythonSet set_;
  std::vector<std::int64_t> active_;
};

}  // namespace hfpp
