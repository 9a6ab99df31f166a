// The Python module hfpp._core: placement, uniform partitions, shapes and the table itself.
//
// Only the files bindings*.cpp know pybind11. Every function converts its arguments there, naming
// them in errors, and works without the GIL.
// Lists of names are built with CPython's own API: a nested std::vector would be converted twice.
#include "bindings.hpp"

#include <pybind11/native_enum.h>

#include <array>
#include <charconv>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "partition.hpp"
#include "shapes.hpp"

#ifndef HFPP_VERSION
#define HFPP_VERSION "0.0.0"
#endif

namespace hfpp::python {

namespace {

constexpr std::int64_t kMaxObjects = std::int64_t{1} << 24;

}  // namespace

void require_objects(const char* what, std::int64_t count) {
  if (count > kMaxObjects) {
    throw std::overflow_error(std::string(what) + ": " + std::to_string(count) +
                              " Python objects are over the limit of " +
                              std::to_string(kMaxObjects) + ": use smaller sizes.");
  }
}

std::string text_of(py::handle value) {
  return py::repr(value).cast<std::string>();
}

std::int64_t integer(py::handle value, const char* name) {
  if (PyBool_Check(value.ptr())) {
    throw ConfigError(std::string(name) + " (" + text_of(value) +
                      ") must be an integer, not a bool: use " + name + "=" +
                      (value.ptr() == Py_True ? "1" : "0") + " if that is meant.");
  }
  if (!PyIndex_Check(value.ptr())) {
    throw py::type_error(std::string(name) + " must be an integer, not " +
                         Py_TYPE(value.ptr())->tp_name + ".");
  }
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) {
    throw std::overflow_error(std::string(name) + " does not fit in 64 bits: use a smaller value.");
  }
  if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

// A sequence may make its items when it is asked for them: each is held while it is read.
std::vector<double> numbers(const py::sequence& values, const char* name) {
  require_objects(name, static_cast<std::int64_t>(values.size()));
  std::vector<double> result;
  result.reserve(values.size());
  for (const py::object value : values) {
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    result.push_back(number);
  }
  return result;
}

std::vector<std::int64_t> integers(const py::sequence& values, const char* name) {
  require_objects(name, static_cast<std::int64_t>(values.size()));
  std::vector<std::int64_t> result;
  result.reserve(values.size());
  for (const py::object value : values) result.push_back(integer(value, name));
  return result;
}

Placement placement(py::handle style) {
  if (PyUnicode_Check(style.ptr())) {
    if (PyUnicode_CompareWithASCIIString(style.ptr(), "loop") == 0) return Placement::Loop;
    if (PyUnicode_CompareWithASCIIString(style.ptr(), "v") == 0) return Placement::V;
  }
  throw ConfigError("style (" + text_of(style) +
                    ") must be 'loop' or 'v': use style='loop' or style='v'.");
}

}  // namespace hfpp::python

namespace py = pybind11;

namespace {

using hfpp::ConfigError;
using hfpp::Table;
using hfpp::python::integer;
using hfpp::python::placement;
using hfpp::python::require_objects;
using hfpp::python::text_of;

// ---- arguments

std::int64_t checked_integer(const std::string& name, py::handle value, py::handle minimum,
                             py::handle maximum) {
  const std::int64_t result = integer(value, name.c_str());
  const std::int64_t least = minimum.is_none() ? result : integer(minimum, "minimum");
  const std::int64_t most = maximum.is_none() ? result : integer(maximum, "maximum");
  hfpp::require_at_least(name.c_str(), result, least);
  if (result > most) {
    throw ConfigError(hfpp::named(name.c_str(), result) + " must be at most " +
                      std::to_string(most) + ": use " + name + "=" + std::to_string(most) +
                      " or less.");
  }
  return result;
}

// A dtype by its code or by torch's name for it.
hfpp::DType dtype_argument(py::handle value) {
  if (PyUnicode_Check(value.ptr())) {
    for (const hfpp::DTypeInfo& info : hfpp::kDTypes) {
      if (PyUnicode_CompareWithASCIIString(value.ptr(), info.name) == 0) return info.code;
    }
  } else {
    const std::int64_t code = integer(value, "dtype");
    if (code >= 0 && code < static_cast<std::int64_t>(hfpp::kDTypes.size())) {
      return hfpp::kDTypes[static_cast<std::size_t>(code)].code;
    }
  }
  std::string known;
  for (const hfpp::DTypeInfo& info : hfpp::kDTypes) {
    known += std::string(known.empty() ? "" : ", ") + "'" + info.name + "'";
  }
  throw ConfigError("dtype (" + text_of(value) + ") must be a known dtype: use one of " + known +
                    ".");
}

// ---- placement

hfpp::StageLayout layout(py::handle pp_size, py::handle num_stages, py::handle style) {
  return {integer(pp_size, "pp_size"), integer(num_stages, "num_stages"), placement(style)};
}

py::tuple stage_ids_this_rank(py::handle pp_rank, py::handle pp_size, py::handle num_stages,
                              py::handle style) {
  const hfpp::StageLayout stages = layout(pp_size, num_stages, style);
  const std::int64_t rank = integer(pp_rank, "pp_rank");
  stages.require_rank(rank);
  require_objects("num_stages / pp_size", stages.stages_per_rank());
  py::tuple ids(stages.stages_per_rank());
  for (std::int64_t k = 0; k < stages.stages_per_rank(); ++k) {
    PyTuple_SET_ITEM(ids.ptr(), k, py::int_(stages.stage(rank, k)).release().ptr());
  }
  return ids;
}

Table stage_ids_by_rank(py::handle pp_size, py::handle num_stages, py::handle style) {
  const hfpp::StageLayout stages = layout(pp_size, num_stages, style);
  const py::gil_scoped_release release;
  return stages.stage_ids_by_rank();
}

Table ranks_by_stage(py::handle pp_size, py::handle num_stages, py::handle style) {
  const hfpp::StageLayout stages = layout(pp_size, num_stages, style);
  const py::gil_scoped_release release;
  return stages.ranks_by_stage();
}

// ---- partition

hfpp::UniformPartition uniform(py::handle num_stages, py::handle num_layers) {
  return {integer(num_stages, "num_stages"), integer(num_layers, "num_layers")};
}

Table uniform_offsets(py::handle num_stages, py::handle num_layers) {
  const hfpp::UniformPartition partition = uniform(num_stages, num_layers);
  const py::gil_scoped_release release;
  return partition.offsets();
}

py::tuple layers_of_stage(py::handle stage_index, py::handle num_stages, py::handle num_layers) {
  const hfpp::UniformPartition partition = uniform(num_stages, num_layers);
  const std::int64_t stage = integer(stage_index, "stage_index");
  partition.require_stage(stage);
  const hfpp::LayerRange layers = partition.layers(stage);
  return py::make_tuple(layers.begin, layers.end);
}

// The names of a partition's modules, and how a stage's list is put together.
class StageNames {
 public:
  StageNames(hfpp::UniformPartition partition, std::string layers_prefix, py::tuple first,
             py::tuple last, py::tuple every)
      : partition_(partition),
        prefix_(std::move(layers_prefix)),
        first_(std::move(first)),
        last_(std::move(last)),
        every_(std::move(every)) {
    for (const char c : prefix_) ascii_ = ascii_ && static_cast<unsigned char>(c) < 128;
  }

  py::list all() const {
    require_objects("num_layers", partition_.num_layers());
    auto lists = steal_list(partition_.num_stages());
    for (std::int64_t stage = 0; stage < partition_.num_stages(); ++stage) {
      PyList_SET_ITEM(lists.ptr(), stage, list_of(stage).release().ptr());
    }
    return lists;
  }

  py::list one(std::int64_t stage) const {
    partition_.require_stage(stage);
    require_objects("num_layers / num_stages", partition_.widest());
    return list_of(stage);
  }

 private:
  static py::list steal_list(std::int64_t size) {
    PyObject* const list = PyList_New(static_cast<Py_ssize_t>(size));
    if (list == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::list>(list);
  }

  static void append(py::list& list, Py_ssize_t& at, const py::tuple& names) {
    const Py_ssize_t count = PyTuple_GET_SIZE(names.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* const name = PyTuple_GET_ITEM(names.ptr(), i);
      Py_INCREF(name);
      PyList_SET_ITEM(list.ptr(), at++, name);
    }
  }

  py::list list_of(std::int64_t stage) const {
    const bool is_first = stage == 0;
    const bool is_last = stage == partition_.num_stages() - 1;
    const hfpp::LayerRange layers = partition_.layers(stage);
    const std::int64_t count = (layers.end - layers.begin) + PyTuple_GET_SIZE(every_.ptr()) +
                               (is_first ? PyTuple_GET_SIZE(first_.ptr()) : 0) +
                               (is_last ? PyTuple_GET_SIZE(last_.ptr()) : 0);
    py::list list = steal_list(count);
    Py_ssize_t at = 0;
    if (is_first) append(list, at, first_);
    for (std::int64_t layer = layers.begin; layer < layers.end; ++layer) {
      PyList_SET_ITEM(list.ptr(), at++, layer_name(layer));
    }
    if (is_last) append(list, at, last_);
    append(list, at, every_);
    return list;
  }

  // prefix + decimal digits, written straight into the new string: this is where the time goes.
  PyObject* layer_name(std::int64_t layer) const {
    std::array<char, 20> digits;
    const char* const end = std::to_chars(digits.data(), digits.data() + digits.size(), layer).ptr;
    const auto length = static_cast<std::size_t>(end - digits.data());
    PyObject* name = nullptr;
    if (ascii_) {
      name = PyUnicode_New(static_cast<Py_ssize_t>(prefix_.size() + length), 127);
      if (name == nullptr) throw py::error_already_set();
      auto* const out = reinterpret_cast<char*>(PyUnicode_1BYTE_DATA(name));
      prefix_.copy(out, prefix_.size());
      std::char_traits<char>::copy(out + prefix_.size(), digits.data(), length);
    } else {
      const std::string text = prefix_ + std::string(digits.data(), length);
      name = PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
      if (name == nullptr) throw py::error_already_set();
    }
    return name;
  }

  hfpp::UniformPartition partition_;
  std::string prefix_;
  bool ascii_ = true;
  py::tuple first_;
  py::tuple last_;
  py::tuple every_;
};

py::list fqn_lists(py::handle num_stages, py::handle num_layers, std::string layers_prefix,
                   py::tuple first, py::tuple last, py::tuple every) {
  return StageNames(uniform(num_stages, num_layers), std::move(layers_prefix), std::move(first),
                    std::move(last), std::move(every))
      .all();
}

py::list fqn_list_of_stage(py::handle stage_index, py::handle num_stages, py::handle num_layers,
                           std::string layers_prefix, py::tuple first, py::tuple last,
                           py::tuple every) {
  return StageNames(uniform(num_stages, num_layers), std::move(layers_prefix), std::move(first),
                    std::move(last), std::move(every))
      .one(integer(stage_index, "stage_index"));
}

// ---- shapes

py::tuple boundary_tables(py::handle num_stages, py::handle microbatch_size, py::handle seq_len,
                          py::handle hidden_size, py::handle vocab_size, py::handle dtype) {
  const bool has_head = !vocab_size.is_none();
  const hfpp::BoundarySizes sizes{integer(num_stages, "num_stages"),
                                  integer(microbatch_size, "microbatch_size"),
                                  integer(seq_len, "seq_len"),
                                  integer(hidden_size, "hidden_size"),
                                  has_head ? integer(vocab_size, "vocab_size") : 0,
                                  has_head,
                                  dtype_argument(dtype)};
  std::optional<hfpp::BoundaryTables> tables;
  {
    const py::gil_scoped_release release;
    tables.emplace(hfpp::boundary_tables(sizes));
  }
  return py::make_tuple(std::move(tables->shapes), std::move(tables->dtypes),
                        std::move(tables->bytes));
}

// ---- the table

std::string format_of(const Table& table) {
  switch (table.item()) {
    case hfpp::Item::Int8:
      return py::format_descriptor<std::int8_t>::format();
    case hfpp::Item::Int32:
      return py::format_descriptor<std::int32_t>::format();
    case hfpp::Item::Int64:
      break;
  }
  return py::format_descriptor<std::int64_t>::format();
}

py::tuple shape_of(const Table& table) {
  py::tuple shape(table.axes());
  for (std::size_t axis = 0; axis < table.axes(); ++axis) shape[axis] = py::int_(table.size(axis));
  return shape;
}

py::buffer_info buffer_of(Table& table) {
  std::vector<py::ssize_t> shape(table.axes());
  std::vector<py::ssize_t> strides(table.axes());
  py::ssize_t stride = hfpp::item_size(table.item());
  for (std::size_t axis = table.axes(); axis-- > 0;) {
    shape[axis] = table.size(axis);
    strides[axis] = stride;
    stride *= table.size(axis);
  }
  return {table.raw(),      hfpp::item_size(table.item()),
          format_of(table), static_cast<py::ssize_t>(table.axes()),
          std::move(shape), std::move(strides)};
}

std::int64_t index_of(py::handle value) {
  try {
    return integer(value, "index");
  } catch (const std::overflow_error&) {
    throw py::index_error("index does not fit in 64 bits.");
  }
}

std::int64_t get_item(const Table& table, py::handle key) {
  std::array<std::int64_t, Table::kMaxAxes> indices{};
  const bool many = PyTuple_Check(key.ptr());
  const std::size_t count = many ? static_cast<std::size_t>(PyTuple_GET_SIZE(key.ptr())) : 1;
  if (count != table.axes()) {
    throw py::type_error("a table of " + std::to_string(table.axes()) + " axes takes " +
                         std::to_string(table.axes()) + " indices, not " + std::to_string(count) +
                         ": use table.row() for a whole row, or memoryview(table).");
  }
  for (std::size_t axis = 0; axis < count; ++axis) {
    indices[axis] = index_of(
        many ? py::handle(PyTuple_GET_ITEM(key.ptr(), static_cast<Py_ssize_t>(axis))) : key);
  }
  return table.at_flat(table.position(indices.data(), count));
}

py::tuple get_row(const Table& table, const py::args& args) {
  std::array<std::int64_t, Table::kMaxAxes> indices{};
  const std::size_t count = args.size();
  if (count + 1 != table.axes()) {
    throw py::type_error("row() of a table of " + std::to_string(table.axes()) + " axes takes " +
                         std::to_string(table.axes() - 1) + " indices, not " +
                         std::to_string(count) + ".");
  }
  for (std::size_t axis = 0; axis < count; ++axis) indices[axis] = index_of(args[axis]);
  const std::int64_t length = table.size(table.axes() - 1);
  require_objects("row()", length);
  const std::int64_t start = table.position(indices.data(), count);
  py::tuple row(length);
  for (std::int64_t i = 0; i < length; ++i) {
    PyTuple_SET_ITEM(row.ptr(), i, py::int_(table.at_flat(start + i)).release().ptr());
  }
  return row;
}

void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const ConfigError& error) {
    const py::object type = py::module_::import("hfpp.errors").attr("PipelineConfigError");
    py::set_error(type, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used(),
                py::multiple_interpreters::per_interpreter_gil()) {
  m.doc() = "The native core of hfpp: plans of whole worlds as dense tables.";
  m.attr("__version__") = HFPP_VERSION;
  py::register_local_exception_translator(translate);

  py::class_<Table>(m, "Table", py::buffer_protocol(), py::is_final(),
                    "A dense table of integers that owns its memory (buffer protocol, row-major).")
      .def_buffer(&buffer_of)
      .def_property_readonly("shape", &shape_of, "The size of every axis.")
      .def_property_readonly("ndim", &Table::axes, "The number of axes, 1 to 3.")
      .def_property_readonly("format", &format_of, "The item type, as the struct module spells it.")
      .def_property_readonly("nbytes", &Table::bytes, "The bytes of all items.")
      .def("row", &get_row, "The items along the last axis under the given leading indices.")
      .def("__getitem__", &get_item, py::arg("key"))
      .def("__len__", [](const Table& table) { return table.size(0); })
      .def("__repr__", [](const Table& table) {
        return "Table(shape=" + text_of(shape_of(table)) + ", format='" + format_of(table) + "')";
      });

  py::native_enum<hfpp::DType> dtypes(
      m, "DType", "enum.IntEnum", "Codes of the dtypes that cross a boundary, by torch's names.");
  for (const hfpp::DTypeInfo& info : hfpp::kDTypes) dtypes.value(info.name, info.code);
  dtypes.finalize();
  m.def(
      "itemsize", [](py::handle dtype) { return hfpp::bytes_of(dtype_argument(dtype)); },
      py::arg("dtype"), "The bytes of one item of a dtype, given by code or by name.");

  m.def("checked_integer", &checked_integer, py::arg("name"), py::arg("value"), py::kw_only(),
        py::arg("minimum") = py::none(), py::arg("maximum") = py::none(),
        "The value as an int, or an error that names the argument.");

  m.def("stage_ids_this_rank", &stage_ids_this_rank, py::arg("pp_rank"), py::arg("pp_size"),
        py::arg("num_stages"), py::arg("style") = "loop", "The stages of one rank.");
  m.def("stage_ids_by_rank", &stage_ids_by_rank, py::arg("pp_size"), py::arg("num_stages"),
        py::arg("style") = "loop", "int32 [pp_size, stages_per_rank]: the stages of every rank.");
  m.def("ranks_by_stage", &ranks_by_stage, py::arg("pp_size"), py::arg("num_stages"),
        py::arg("style") = "loop", "int32 [num_stages]: the rank of every stage.");

  m.def("uniform_offsets", &uniform_offsets, py::arg("num_stages"), py::arg("num_layers"),
        "int64 [num_stages + 1]: stage s has layers offsets[s] to offsets[s + 1] - 1.");
  m.def("layers_of_stage", &layers_of_stage, py::arg("stage_index"), py::arg("num_stages"),
        py::arg("num_layers"), "The first layer of a stage and the one after its last.");
  m.def("fqn_lists", &fqn_lists, py::arg("num_stages"), py::arg("num_layers"),
        py::arg("layers_prefix"), py::arg("first"), py::arg("last"), py::arg("every"),
        "The module names of every stage.");
  m.def("fqn_list_of_stage", &fqn_list_of_stage, py::arg("stage_index"), py::arg("num_stages"),
        py::arg("num_layers"), py::arg("layers_prefix"), py::arg("first"), py::arg("last"),
        py::arg("every"), "The module names of one stage.");

  m.def("boundary_tables", &boundary_tables, py::arg("num_stages"), py::kw_only(),
        py::arg("microbatch_size"), py::arg("seq_len"), py::arg("hidden_size"),
        py::arg("vocab_size"), py::arg("dtype"),
        "(shapes, dtypes, bytes) of what enters and leaves every stage.");

  hfpp::python::bind_schedule(m);
  hfpp::python::bind_verify(m);
  hfpp::python::bind_balance(m);
  hfpp::python::bind_files(m);
  hfpp::python::bind_simulate(m);
}
