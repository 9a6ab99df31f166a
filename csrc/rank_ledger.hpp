// What one rank holds and waits for while it runs its row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "error.hpp"
#include "simulate.hpp"

namespace hfpp {

class RankLedger {
 public:
  // When the rank is free.
  double clock() const { return clock_; }

  // The rank waits until `until` for what its sender had ready at `sent`.
  void wait(double until, double sent, bool gradient) {
    const double made = std::min(std::max(sent, clock_), until);
    (gradient ? gradients_ : activations_) += made - clock_;
    communication_ += until - made;
    clock_ = until;
  }
  void communicate_until(double until) {
    communication_ += until - clock_;
    clock_ = until;
  }

  // Computes from now on. Waiting is counted here: what comes before the first computation is the
  // start, what comes after the last the end, whatever the rank waits for.
  void compute(double seconds, RankReport& report) {
    if (computes_) {
      report.activations += activations_;
      report.gradients += gradients_;
      report.communication += communication_;
    } else {
      computes_ = true;
      report.start = report.own.start = clock_;
    }
    activations_ = gradients_ = communication_ = 0;
    report.busy += seconds;
    clock_ += seconds;
    report.own.end = clock_;
  }
  void finish(double step_time, RankReport& report) const {
    (computes_ ? report.end : report.start) = step_time - report.own.end;
  }

  void begin_activation(RankReport& report) {
    report.peak_live = std::max(report.peak_live, ++live_);
  }
  void end_activation() { --live_; }
  void keep(std::int64_t bytes, RankReport& report) {
    held_ = checked_add(held_, bytes, "bytes of activations");
    report.peak_activation_bytes = std::max(report.peak_activation_bytes, held_);
  }
  void free(std::int64_t bytes) { held_ -= bytes; }

  void hold_buffer(std::int64_t bytes, RankReport& report) {
    report.peak_receive_buffers = std::max(report.peak_receive_buffers, ++buffers_);
    buffer_bytes_ = checked_add(buffer_bytes_, bytes, "bytes of receive buffers");
    report.peak_receive_bytes = std::max(report.peak_receive_bytes, buffer_bytes_);
  }
  void free_buffer(std::int64_t bytes) {
    --buffers_;
    buffer_bytes_ -= bytes;
  }

 private:
  double clock_ = 0;
  bool computes_ = false;   // whether it has begun to
  double activations_ = 0;  // seconds of waiting since the last computation, by cause
  double gradients_ = 0;
  double communication_ = 0;
  std::int64_t live_ = 0;
  std::int64_t held_ = 0;
  std::int64_t buffers_ = 0;
  std::int64_t buffer_bytes_ = 0;
};

}  // namespace hfpp
