// What a computation takes from a neighbouring stage, and which actions belong to one message.
#pragma once

#include <cstdint>

#include "schedule.hpp"

namespace hfpp {

constexpr bool is_backward(Kind kind) {  // makes the gradient of the stage's inputs
  return kind == Kind::FullBackward || kind == Kind::BackwardInput;
}
constexpr bool ends_backward(Kind kind) {  // makes the gradients of the stage's weights
  return kind == Kind::FullBackward || kind == Kind::BackwardWeight;
}
constexpr bool is_send(Kind kind) {
  return kind == Kind::SendForward || kind == Kind::SendBackward;
}
constexpr bool is_receive(Kind kind) {
  return kind == Kind::ReceiveForward || kind == Kind::ReceiveBackward;
}
constexpr bool is_message(Kind kind) {
  return kind >= Kind::SendForward && kind <= Kind::ReceiveBackward;
}
constexpr bool is_send_wait(Kind kind) {
  return kind == Kind::WaitSendForward || kind == Kind::WaitSendBackward;
}

// The stage whose result a computation takes; -1 where it takes none.
constexpr std::int64_t source_stage(Action action, std::int64_t num_stages) {
  if (action.kind() == Kind::Forward) return action.stage() - 1;
  if (is_backward(action.kind()) && action.stage() + 1 < num_stages) return action.stage() + 1;
  return -1;
}

// The action at the other end of a send or a receive. Its stage may be -1 or one too many.
constexpr std::int64_t peer_stage(Action message) {
  const bool up = message.kind() == Kind::SendForward || message.kind() == Kind::ReceiveBackward;
  return message.stage() + (up ? 1 : -1);
}
constexpr Kind peer_kind(Kind kind) {
  switch (kind) {
    case Kind::SendForward:
      return Kind::ReceiveForward;
    case Kind::ReceiveForward:
      return Kind::SendForward;
    case Kind::SendBackward:
      return Kind::ReceiveBackward;
    default:
      return Kind::SendBackward;
  }
}
constexpr Action peer_action(Action message) {  // both stages exist
  return {peer_kind(message.kind()), peer_stage(message), message.microbatch()};
}

// The send that a wait waits for.
constexpr Kind sent_before(Kind wait) {
  return wait == Kind::WaitSendForward ? Kind::SendForward : Kind::SendBackward;
}

}  // namespace hfpp
