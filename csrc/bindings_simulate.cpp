// Simulations in Python: numbers of one rank at a time, made when they are asked for.
#include <memory>
#include <optional>
#include <utility>

#include "bindings.hpp"
#include "lock_step.hpp"
#include "simulate.hpp"

namespace hfpp::python {

namespace {

std::unique_ptr<Simulation> simulate(
    const Schedule& schedule, const py::sequence& forward, const py::sequence& backward,
    const py::sequence& backward_input, const py::sequence& backward_weight,
    const py::sequence& activation_bytes, const py::sequence& weight_bytes,
    const py::sequence& activation_seconds, const py::sequence& gradient_seconds,
    const py::sequence& boundary_bytes, bool overlap, double overlap_gain) {
  const Communication communication = overlap ? Communication::Beside : Communication::Within;
  const ActionCosts costs{numbers(forward, "forward"),
                          numbers(backward, "backward"),
                          numbers(backward_input, "backward_input"),
                          numbers(backward_weight, "backward_weight"),
                          integers(activation_bytes, "activation_bytes"),
                          integers(weight_bytes, "weight_bytes"),
                          {numbers(activation_seconds, "activation_seconds"),
                           numbers(gradient_seconds, "gradient_seconds"),
                           integers(boundary_bytes, "boundary_bytes"), communication},
                          overlap_gain};
  const py::gil_scoped_release release;
  return std::make_unique<Simulation>(schedule, costs);
}

py::tuple report(const Simulation& simulation, py::handle rank) {
  const RankReport& r = simulation.report(rank_of(simulation.schedule(), rank));
  return py::make_tuple(
      py::make_tuple(r.busy, r.start, r.activations, r.gradients, r.communication, r.end),
      py::make_tuple(r.own.start, r.own.end),
      py::make_tuple(r.peak_live, r.peak_activation_bytes, r.peak_receive_buffers,
                     r.peak_receive_bytes, r.sent_bytes, r.received_bytes));
}

py::list spans(const Simulation& simulation, py::handle argument) {
  const std::int64_t rank = rank_of(simulation.schedule(), argument);
  require_objects("spans()", simulation.schedule().size(rank));
  py::list spans(simulation.schedule().size(rank));
  for (std::int64_t i = 0; i < simulation.schedule().size(rank); ++i) {
    const Span& span = simulation.spans(rank)[i];
    PyList_SET_ITEM(spans.ptr(), i, py::make_tuple(span.start, span.end).release().ptr());
  }
  return spans;
}

py::list transfers(const Simulation& simulation, py::handle argument) {
  py::list list;
  for (const Simulation::Sent& sent :
       simulation.sent_by(rank_of(simulation.schedule(), argument))) {
    list.append(py::make_tuple(sent.route.source, sent.route.target, sent.route.gradient,
                               sent.route.producer, sent.action.microbatch(), sent.span.start,
                               sent.span.end));
  }
  return list;
}

py::tuple steps(const Schedule& schedule) {
  std::optional<LockStep> found;
  {
    const py::gil_scoped_release release;
    found.emplace(lock_step(schedule));
  }
  return py::make_tuple(std::move(found->steps), found->count);
}

}  // namespace

void bind_simulate(py::module_& m) {
  py::class_<Simulation>(m, "Simulation", py::is_final(),
                         "When each action of a schedule runs, and what each rank holds.")
      .def_property_readonly("step_time", &Simulation::step_time, "When the last rank ends.")
      .def_property_readonly("idle_share", &Simulation::idle_share,
                             "All ranks' idle time over all ranks' time.")
      .def("report", &report, py::arg("rank"),
           "Of one rank: (busy, and idle at the start, for activations, gradients, communication, "
           "at the end), (start, end of its own), (peak live activations and their bytes, receive "
           "buffers and their bytes, bytes sent, received).")
      .def("spans", &spans, py::arg("rank"), "(start, end) of every action of one rank.")
      .def("transfers", &transfers, py::arg("rank"),
           "(source, target, whether a gradient, stage, microbatch, start, end) of what one rank "
           "sends.");
  m.def("simulate", &simulate, py::keep_alive<0, 1>(), py::arg("schedule"), py::kw_only(),
        py::arg("forward"), py::arg("backward"), py::arg("backward_input"),
        py::arg("backward_weight"), py::arg("activation_bytes"), py::arg("weight_bytes"),
        py::arg("activation_seconds"), py::arg("gradient_seconds"), py::arg("boundary_bytes"),
        py::arg("overlap"), py::arg("overlap_gain"), "Runs a schedule in time.");
  m.def("lock_step", &steps, py::arg("schedule"),
        "(int32 [actions], row after row: the step of each action; the number of steps).");
}

}  // namespace hfpp::python
