// What stages hand to their neighbours, and when it crosses from rank to rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "schedule.hpp"

namespace hfpp {

// Whether an action makes, sends or receives the gradient of a stage's inputs.
constexpr bool is_gradient(Kind kind) {
  return kind == Kind::FullBackward || kind == Kind::BackwardInput || kind == Kind::SendBackward ||
         kind == Kind::ReceiveBackward || kind == Kind::WaitSendBackward;
}

// When something begins and ends, in seconds.
struct Span {
  double start;
  double end;
};

// How transfers go with the computations of both ranks.
enum class Communication : std::uint8_t {
  Beside,  // they run beside them
  Within,  // they take both ranks' time: at the send, and just before what takes the value
};

// By the boundary after each stage but the last.
struct TransferCosts {
  std::vector<double> activation_seconds;  // to the next stage
  std::vector<double> gradient_seconds;    // to the stage before
  std::vector<std::int64_t> bytes;         // of either
  Communication communication = Communication::Beside;
};

// How many pairs of a stage and a microbatch there are: no more than actions, so that what is kept
// for each fits into memory. Throws where there are none, or more.
std::int64_t stage_microbatches(const Schedule& schedule);

// A stage's output on its way to the next stage, or a gradient to the stage before.
struct Route {
  bool gradient;
  std::int64_t producer;  // the stage
  std::int64_t source;    // the ranks
  std::int64_t target;
  std::size_t message;  // its index among all messages

  bool crosses() const { return source != target; }
};

// Not a number, where a time is not known yet.
struct Message {
  double sent;  // when its sender was ready for it
  Span span;    // as long as the end is not known, the start is when its receiver was ready
};

// All messages of a schedule, and the links that they cross: one per ordered pair of ranks, which
// takes one transfer at a time, in the order in which they are sent.
class Transfers {
 public:
  // Throws where a stage has no rank or two, or where the table is too small for its numbers.
  explicit Transfers(const Schedule& schedule);

  std::int64_t num_stages() const { return num_stages_; }
  std::int64_t n_microbatches() const { return n_microbatches_; }
  // Whether the table has sends and receives of its own.
  bool spelled_out() const { return spelled_out_; }
  std::int64_t rank_of(std::int64_t stage) const {
    return rank_of_[static_cast<std::size_t>(stage)];
  }

  // Whether a stage has a neighbour that takes its output, or its gradient.
  bool has_taker(bool gradient, std::int64_t producer) const {
    return gradient ? producer > 0 && producer < num_stages_
                    : producer >= 0 && producer + 1 < num_stages_;
  }
  // Needs `has_taker`.
  Route route(bool gradient, std::int64_t producer, std::int64_t microbatch) const {
    return {gradient, producer, rank_of(producer), rank_of(gradient ? producer - 1 : producer + 1),
            static_cast<std::size_t>(((gradient ? num_stages_ : 0) + producer) * n_microbatches_ +
                                     microbatch)};
  }
  // Whether a computation takes anything from a neighbouring stage, and what.
  bool takes(Action action) const {
    switch (action.kind()) {
      case Kind::Forward:
        return action.stage() > 0;
      case Kind::FullBackward:
      case Kind::BackwardInput:
        return action.stage() + 1 < num_stages_;
      default:
        return false;
    }
  }
  Route input(Action action) const {
    const bool gradient = is_gradient(action.kind());
    return route(gradient, action.stage() + (gradient ? 1 : -1), action.microbatch());
  }
  Route route_of_message(std::size_t message) const {
    const auto index = static_cast<std::int64_t>(message);
    const std::int64_t row = index / n_microbatches_;
    const bool gradient = row >= num_stages_;
    return route(gradient, gradient ? row - num_stages_ : row, index % n_microbatches_);
  }

  Message& operator[](const Route& route) { return messages_[route.message]; }
  const Message& operator[](const Route& route) const { return messages_[route.message]; }
  double seconds(const TransferCosts& costs, const Route& route) const {
    return (route.gradient ? costs.gradient_seconds : costs.activation_seconds)[boundary(route)];
  }
  std::int64_t bytes(const TransferCosts& costs, const Route& route) const {
    return costs.bytes[boundary(route)];
  }

  // With overlap: both ends say when they are ready; what thereby comes to its turn on the link
  // gets its span. Appends the messages whose span is known now.
  void send(const TransferCosts& costs, const Route& route, double time,
            std::vector<std::size_t>& known);
  void receive(const TransferCosts& costs, const Route& route, double time,
               std::vector<std::size_t>& known);
  // The same where receivers are always ready.
  void send_to_ready(const TransferCosts& costs, const Route& route, double time);

 private:
  struct Link {
    double free = 0;
    std::vector<std::size_t> queue;  // sent, in order; from `head` on without a span
    std::size_t head = 0;
  };

  static std::size_t boundary(const Route& route) {
    return static_cast<std::size_t>(route.gradient ? route.producer - 1 : route.producer);
  }
  Link& link(const Route& route) {
    const std::int64_t row = (route.gradient ? num_stages_ : 0) + route.producer;
    return links_[link_of_[static_cast<std::size_t>(row)]];
  }
  void find_links(std::int64_t pp_size);
  void advance(const TransferCosts& costs, Link& link, std::vector<std::size_t>& known);
  void cross(const TransferCosts& costs, const Route& route, Link& link, double ready);

  std::int64_t num_stages_;
  std::int64_t n_microbatches_;
  bool spelled_out_;
  std::vector<std::int32_t> rank_of_;
  std::vector<std::size_t> link_of_;  // of every stage's outputs, then of every stage's gradients
  std::vector<Link> links_;
  std::vector<Message> messages_;
};

}  // namespace hfpp
