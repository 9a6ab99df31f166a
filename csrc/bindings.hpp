// What the files of the Python module share: arguments, and what each file adds to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "placement.hpp"
#include "schedule.hpp"

namespace hfpp::python {

namespace py = pybind11;

// More Python objects than `count` allows in one list or tuple is a mistake in a size, not a plan.
void require_objects(const char* what, std::int64_t count);

// The value as Python writes it.
std::string text_of(py::handle value);

// An integer argument: anything with __index__ but no bool, within 64 bits.
std::int64_t integer(py::handle value, const char* name);

// The items of a sequence argument, as floats or integers.
std::vector<double> numbers(const py::sequence& values, const char* name);
std::vector<std::int64_t> integers(const py::sequence& values, const char* name);

// "loop" or "v".
Placement placement(py::handle style);

// A rank of the schedule, or IndexError.
std::int64_t rank_of(const Schedule& schedule, py::handle rank);

void bind_balance(py::module_& m);
void bind_files(py::module_& m);
void bind_schedule(py::module_& m);
void bind_verify(py::module_& m);
void bind_simulate(py::module_& m);

}  // namespace hfpp::python
