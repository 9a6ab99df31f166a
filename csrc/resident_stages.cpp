// Which stages have their parameters gathered while one row runs.
#include "resident_stages.hpp"

#include <algorithm>
#include <iterator>

#include "error.hpp"

namespace hfpp {

namespace {

constexpr std::size_t kLeastSlots = 8;
constexpr std::size_t kLinearProbes = 9;

}  // namespace

PythonSet::PythonSet() : slots_(kLeastSlots, kEmpty) {}

std::size_t PythonSet::free_slot(std::int64_t value) const {
  const std::size_t mask = slots_.size() - 1;
  auto perturbation = static_cast<std::size_t>(value);  // small integers are their own hash
  std::size_t slot = perturbation & mask;
  for (;;) {
    const std::size_t probes = slot + kLinearProbes <= mask ? kLinearProbes : 0;
    for (std::size_t probe = 0; probe <= probes; ++probe) {
      if (slots_[slot + probe] == kEmpty) return slot + probe;
    }
    perturbation >>= 5;
    slot = (slot * 5 + 1 + perturbation) & mask;
  }
}

void PythonSet::add(std::int64_t value) {
  slots_[free_slot(value)] = value;
  ++used_;
  ++filled_;
  if (filled_ * 5 >= (slots_.size() - 1) * 3) lay_out_anew();
}

void PythonSet::remove(std::int64_t value) {
  *std::find(slots_.begin(), slots_.end(), value) = kRemoved;
  --used_;
}

void PythonSet::lay_out_anew() {
  std::size_t size = kLeastSlots;
  while (size <= used_ * 4) size *= 2;
  std::vector<std::int64_t> values;
  append_to(values);
  slots_.assign(size, kEmpty);
  for (const std::int64_t value : values) slots_[free_slot(value)] = value;
  filled_ = used_;
}

void PythonSet::append_to(std::vector<std::int64_t>& values) const {
  std::copy_if(slots_.begin(), slots_.end(), std::back_inserter(values),
               [](std::int64_t value) { return value >= 0; });
}

bool ResidentStages::Ahead::has(std::int64_t stage) const {
  return std::any_of(stages.begin(), stages.begin() + size,
                     [stage](Stage other) { return other.stage == stage; });
}

void ResidentStages::Ahead::add(std::int64_t stage, std::size_t group) {
  stages[size++] = {stage, group};
}

void ResidentStages::look_ahead(const Schedule& table, std::int64_t rank) {
  const Action* const begin = table.begin(rank);
  std::size_t group = static_cast<std::size_t>(
      std::count_if(begin, table.end(rank), [](Action action) { return !action.joined(); }));
  ahead_.assign(group, Ahead());
  Ahead next;
  for (const Action* last = table.end(rank); last != begin;) {
    const Action* first = last - 1;
    while (first->joined()) --first;
    --group;
    if (first->kind() != Kind::Idle) {
      Ahead& here = ahead_[group];
      for (const Action* action = first; action != last; ++action) {
        if (here.has(action->stage())) continue;
        if (here.size == kMost) {
          throw ConfigError(table.name() + ": " + table.place_of(rank, first) +
                            " needs the parameters of more than " + std::to_string(kMost) +
                            " stages at once");
        }
        here.add(action->stage(), group);
      }
      for (std::size_t i = 0; i < next.size; ++i) {
        const Ahead::Stage stage = next.stages[i];
        // A group comes whole.
        if (here.size >= kMost && here.stages[here.size - 1].group != stage.group) break;
        if (!here.has(stage.stage)) here.add(stage.stage, stage.group);
      }
      next = here;
    }
    last = first;
  }
}

void ResidentStages::read_active() {
  if (ordered_) return;
  active_.clear();
  set_.append_to(active_);
}

void ResidentStages::before(std::size_t group, Schedule& out) {
  const Ahead& ahead = ahead_[group];
  const auto leaves = [&](std::int64_t stage) { return !ahead.has(stage); };
  for (const std::int64_t stage : active_) {
    if (!leaves(stage)) continue;
    out.add({Kind::Reshard, stage});
    if (!ordered_) set_.remove(stage);
  }
  active_.erase(std::remove_if(active_.begin(), active_.end(), leaves), active_.end());
  bool came = false;
  for (std::size_t i = 0; i < ahead.size; ++i) {
    const std::int64_t stage = ahead.stages[i].stage;
    if (std::find(active_.begin(), active_.end(), stage) != active_.end()) continue;
    out.add({Kind::Unshard, stage});
    active_.push_back(stage);
    if (!ordered_) set_.add(stage);
    came = true;
  }
  if (came) read_active();
}

void ResidentStages::release(Schedule& out) {
  for (const std::int64_t stage : active_) out.add({Kind::Reshard, stage});
  active_.clear();
  set_ = PythonSet();
}

}  // namespace hfpp
