// The balancer in Python.
#include <algorithm>
#include <utility>

#include "balance.hpp"
#include "bindings.hpp"
#include "table.hpp"

namespace hfpp::python {

namespace {

py::tuple balance_of(py::handle pp_size, py::handle num_stages, py::handle style,
                     const py::sequence& seconds, const py::sequence& static_bytes,
                     const py::sequence& activation_bytes, const py::sequence& live,
                     py::handle cap) {
  const StageLayout layout(integer(pp_size, "pp_size"), integer(num_stages, "num_stages"),
                           placement(style));
  LayerCosts costs;
  costs.seconds = numbers(seconds, "seconds");
  costs.static_bytes = integers(static_bytes, "static_bytes");
  costs.activation_bytes = integers(activation_bytes, "activation_bytes");
  costs.live = integers(live, "live");
  if (!cap.is_none()) costs.cap = integer(cap, "cap");
  Balance found;
  {
    const py::gil_scoped_release release;
    found = balance(layout, costs);
  }
  Table offsets =
      Table::make<std::int64_t>({static_cast<std::int64_t>(found.offsets.size())}, "num_stages");
  std::copy(found.offsets.begin(), found.offsets.end(), offsets.data<std::int64_t>());
  return py::make_tuple(std::move(offsets), found.slowest, found.lower_bound, found.optimal);
}

}  // namespace

void bind_balance(py::module_& m) {
  m.def("balance", &balance_of, py::arg("pp_size"), py::arg("num_stages"), py::arg("style"),
        py::kw_only(), py::arg("seconds"), py::arg("static_bytes") = py::tuple(),
        py::arg("activation_bytes") = py::tuple(), py::arg("live") = py::tuple(),
        py::arg("cap") = py::none(),
        "(offsets, slowest, lower_bound, optimal): layers cut so that the slowest rank is fast.");
}

}  // namespace hfpp::python
