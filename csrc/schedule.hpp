// The actions of all ranks of a pipeline: rows of packed actions, one after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.hpp"

namespace hfpp {

// What an action does. The numbers are part of the packed form that Python sees.
enum class Kind : std::uint8_t {
  Idle = 0,  // an empty column of a file: nothing to whoever runs the table
  Forward,
  FullBackward,
  BackwardInput,
  BackwardWeight,
  SendForward,
  ReceiveForward,
  SendBackward,
  ReceiveBackward,
  WaitSendForward,
  WaitSendBackward,
  Unshard,
  Reshard,
  ReduceGrad,
  WaitReduceGrad,
};
constexpr std::uint8_t kKinds = 15;

constexpr bool is_compute(Kind kind) {
  return kind >= Kind::Forward && kind <= Kind::BackwardWeight;
}
// Whether the action is about one microbatch; the others are about a whole stage.
constexpr bool has_microbatch(Kind kind) {
  return kind >= Kind::Forward && kind <= Kind::WaitSendBackward;
}
// torch's spelling in schedule files; empty for Idle.
std::string_view spelling(Kind kind);

// One action in 64 bits: microbatch (28), stage (28), kind (6), and whether it belongs to the same
// overlapped group as the action before it.
class Action {
 public:
  static constexpr int kBits = 28;
  static constexpr std::int64_t kMaxIndex = (std::int64_t{1} << kBits) - 1;

  constexpr Action() = default;
  // Indices are within [0, kMaxIndex]; the microbatch of a whole stage's action is 0.
  constexpr Action(Kind kind, std::int64_t stage, std::int64_t microbatch = 0, bool joined = false)
      : code_(static_cast<std::int64_t>(joined) << (2 * kBits + 6) |
              static_cast<std::int64_t>(kind) << (2 * kBits) | stage << kBits | microbatch) {}
  // Checked: the kind is known.
  static Action of_code(std::int64_t code);

  constexpr std::int64_t code() const { return code_; }
  constexpr Kind kind() const { return static_cast<Kind>(code_ >> (2 * kBits) & 63); }
  constexpr std::int64_t stage() const { return code_ >> kBits & kMaxIndex; }
  constexpr std::int64_t microbatch() const { return code_ & kMaxIndex; }
  constexpr bool joined() const { return (code_ >> (2 * kBits + 6) & 1) != 0; }
  constexpr Action as(Kind kind) const { return {kind, stage(), microbatch(), joined()}; }
  constexpr Action alone() const { return {kind(), stage(), microbatch()}; }

  constexpr bool operator==(Action other) const { return code_ == other.code_; }
  constexpr bool operator!=(Action other) const { return code_ != other.code_; }

 private:
  std::int64_t code_ = 0;
};

// One past the group (or the single action) that begins at `first`, in a row that ends at `end`.
inline const Action* group_end(const Action* first, const Action* end) {
  do {
    ++first;
  } while (first != end && first->joined());
  return first;
}

// "3F0", "1UNSHARD".
std::string text_of(Action action);

class Schedule {
 public:
  // Rows of a table that comes from outside. Stages are counted by what computes.
  explicit Schedule(std::string name) : name_(std::move(name)), offsets_{0} {}

  void reserve(std::size_t ranks, std::size_t actions);
  // Appends to the row that is being written; `end_row` closes it.
  void add(Action action) {
    actions_.push_back(action);
    const std::int64_t stage = is_compute(action.kind()) ? action.stage() : -1;
    if (stage >= num_stages_) num_stages_ = stage + 1;
    if (has_microbatch(action.kind()) && action.microbatch() >= n_microbatches_) {
      n_microbatches_ = action.microbatch() + 1;
    }
  }
  void end_row() { offsets_.push_back(static_cast<std::int64_t>(actions_.size())); }
  // Keeps the first `rows` rows, which have all the stages and microbatches.
  void truncate(std::int64_t rows);
  void rename(std::string name) { name_ = std::move(name); }
  void shrink();  // to the memory that the rows need

  const std::string& name() const { return name_; }
  std::int64_t pp_size() const { return static_cast<std::int64_t>(offsets_.size()) - 1; }
  // One more than the highest stage that computes, and than the highest microbatch.
  std::int64_t num_stages() const { return num_stages_; }
  std::int64_t n_microbatches() const { return n_microbatches_; }
  std::int64_t num_actions() const { return static_cast<std::int64_t>(actions_.size()); }
  std::int64_t bytes() const {
    return static_cast<std::int64_t>(actions_.capacity() * sizeof(Action) +
                                     offsets_.capacity() * sizeof(std::int64_t));
  }

  // The actions of one rank; the parts of an overlapped group follow one another.
  const Action* begin(std::int64_t rank) const { return actions_.data() + offset(rank); }
  const Action* end(std::int64_t rank) const { return actions_.data() + offset(rank + 1); }
  std::int64_t size(std::int64_t rank) const { return offset(rank + 1) - offset(rank); }

  // Whether any action is neither a computation nor idle.
  bool has_communication() const;
  // The kinds that occur, as bits.
  std::uint32_t kinds() const;
  // The rank of each stage. Throws where a stage computes on two ranks, or on none.
  std::vector<std::int32_t> stage_to_rank() const;

  // "rank 1, column 2, action 3F0": where an action stands, for messages. A group is one column.
  std::string place_of(std::int64_t rank, const Action* action) const;
  std::int64_t column_of(std::int64_t rank, const Action* action) const;
  // The same of the first computation of a stage that has one.
  std::string place_of_stage(std::int64_t stage) const;

 private:
  std::int64_t offset(std::int64_t rank) const { return offsets_[static_cast<std::size_t>(rank)]; }

  std::string name_;
  std::vector<std::int64_t> offsets_;
  std::vector<Action> actions_;
  std::int64_t num_stages_ = 0;
  std::int64_t n_microbatches_ = 0;
};

}  // namespace hfpp
