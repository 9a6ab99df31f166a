// What is wrong with messages: one is never sent, or two ranks have theirs in different orders.
#include <algorithm>
#include <string>

#include "dataflow.hpp"
#include "verify.hpp"

namespace hfpp {

namespace {

// The messages from one rank to another, as the rows of both have them.
class Channel {
 public:
  Channel(const Schedule& schedule, const StageRanks& stages, std::int64_t source,
          std::int64_t target)
      : schedule_(schedule), stages_(stages), source_(source), target_(target) {}

  void check() const {
    const Action* send = next_send(schedule_.begin(source_));
    const Action* receive = next_receive(schedule_.begin(target_));
    const Action* const no_send = schedule_.end(source_);
    const Action* const no_receive = schedule_.end(target_);
    while (send != no_send && receive != no_receive && peer_action(*send) == *receive) {
      send = next_send(send + 1);
      receive = next_receive(receive + 1);
    }
    if (receive == no_receive) return;  // the rows were checked: what is sent is received
    require_send(receive);
    fail_at(schedule_, source_, send,
            "ranks " + std::to_string(source_) + " and " + std::to_string(target_) +
                " post their messages in different orders: here " + message_of(*send) + ", there " +
                message_of(peer_action(*receive)) + " (" + schedule_.place_of(target_, receive) +
                ")");
  }

 private:
  const Action* next_send(const Action* from) const {
    return next(from, schedule_.end(source_), is_send, target_);
  }
  const Action* next_receive(const Action* from) const {
    return next(from, schedule_.end(target_), is_receive, source_);
  }
  template <class IsKind>
  const Action* next(const Action* from, const Action* end, IsKind is_kind,
                     std::int64_t peer) const {
    return std::find_if(from, end, [&](Action action) {
      return is_kind(action.kind()) && stages_.rank_of(peer_stage(action)) == peer;
    });
  }
  void require_send(const Action* receive) const {
    const Action send = peer_action(*receive);
    const Action* const end = schedule_.end(source_);
    if (std::find(schedule_.begin(source_), end, send) != end) return;
    fail_at(schedule_, target_, receive,
            "rank " + std::to_string(source_) + " has no counterpart for " + message_of(send) +
                ": it lacks " + text_of(send));
  }
  static std::string message_of(Action send) {
    return std::string("the ") + (send.kind() == Kind::SendForward ? "activation" : "gradient") +
           " of stage " + std::to_string(send.stage()) + ", microbatch " +
           std::to_string(send.microbatch());
  }

  const Schedule& schedule_;
  const StageRanks& stages_;
  std::int64_t source_;
  std::int64_t target_;
};

}  // namespace

void check_messages(const Schedule& schedule, const StageRanks& stages) {
  const std::int64_t size = stages.pp_size;
  for (std::int64_t rank = 0; rank < size; ++rank) {
    // In a loop and in a v alike, neighbouring stages lie on the same or on neighbouring ranks.
    const std::int64_t before = (rank + size - 1) % size;
    const std::int64_t after = (rank + 1) % size;
    if (after != rank) Channel(schedule, stages, rank, after).check();
    if (before != rank && before != after) Channel(schedule, stages, rank, before).check();
  }
}

}  // namespace hfpp
