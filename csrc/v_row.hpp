// One row of a schedule whose ranks have two stages each, in a v.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "schedule.hpp"

namespace hfpp {

struct Part {
  Kind kind;
  std::size_t chunk;  // 0 on the way to the last rank, 1 on the way back
};

// Appends actions of the two stages of a v, counting microbatches per chunk and kind. A full
// backward counts with the input backwards.
class VRow {
 public:
  VRow(Schedule& schedule, std::int64_t rank, std::int64_t pp_size, std::int64_t n_microbatches)
      : schedule_(schedule),
        stages_{rank, 2 * pp_size - 1 - rank},
        n_microbatches_(n_microbatches) {}

  // Repeats different parts; microbatches beyond the last are counted and left out.
  void repeat(std::int64_t times, std::initializer_list<Part> parts) {
    times = std::max<std::int64_t>(times, 0);
    std::int64_t least = n_microbatches_;
    for (const Part part : parts) least = std::min(least, count(part));
    const std::int64_t written = std::min(times, n_microbatches_ - least);
    for (std::int64_t i = 0; i < written; ++i) {
      for (const Part part : parts) {
        const Action action = next(part);
        if (action.microbatch() < n_microbatches_) schedule_.add(action);
      }
    }
    for (const Part part : parts) count(part) += times - written;
  }

  // A forward and a full backward as one.
  void overlap(std::size_t forward_chunk, std::size_t backward_chunk) {
    schedule_.add(next({Kind::Forward, forward_chunk}));
    const Action backward = next({Kind::FullBackward, backward_chunk});
    schedule_.add({Kind::FullBackward, backward.stage(), backward.microbatch(), true});
  }

  // The input's part of a backward, whose weights' part is put off.
  void split(std::size_t chunk) {
    put_off_.push_back(next({Kind::BackwardInput, chunk}));
    schedule_.add(put_off_.back());
  }
  // The weights' part of the earliest backward that lacks it; nothing where none does.
  void weight() {
    if (late_ < put_off_.size()) schedule_.add(put_off_[late_++].as(Kind::BackwardWeight));
  }
  bool has_put_off() const { return late_ < put_off_.size(); }

  std::int64_t& count(Part part) { return counts_[part.chunk][slot(part.kind)]; }

 private:
  static std::size_t slot(Kind kind) {
    return kind == Kind::Forward ? 0 : kind == Kind::BackwardWeight ? 2 : 1;
  }
  Action next(Part part) { return {part.kind, stages_[part.chunk], count(part)++}; }

  Schedule& schedule_;
  std::array<std::int64_t, 2> stages_;
  std::int64_t n_microbatches_;
  std::array<std::array<std::int64_t, 3>, 2> counts_{};
  std::vector<Action> put_off_;
  std::size_t late_ = 0;  // how many of these have come
};

}  // namespace hfpp
