// An owning, dense, row-major table of integers: the only type that the core hands to Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "error.hpp"

namespace hfpp {

enum class Item : std::uint8_t { Int8, Int32, Int64 };

template <class T>
constexpr Item item_of();
template <>
constexpr Item item_of<std::int8_t>() {
  return Item::Int8;
}
template <>
constexpr Item item_of<std::int32_t>() {
  return Item::Int32;
}
template <>
constexpr Item item_of<std::int64_t>() {
  return Item::Int64;
}

constexpr std::int64_t item_size(Item item) {
  return item == Item::Int8 ? 1 : item == Item::Int32 ? 4 : 8;
}

class Table {
 public:
  static constexpr std::size_t kMaxAxes = 3;
  // Nothing that a plan of a real cluster needs comes near this; a typing error in a size does, and
  // would otherwise be met by the operating system's out-of-memory killer.
  static constexpr std::int64_t kMaxBytes = std::int64_t{1} << 31;

  // Every axis is non-negative. `what` names the caller's arguments that gave the shape.
  // The items are not initialised: whoever makes a table fills it.
  template <class T>
  static Table make(std::initializer_list<std::int64_t> shape, const char* what) {
    return Table(item_of<T>(), shape, what);
  }

  std::size_t axes() const { return axes_; }
  std::int64_t size(std::size_t axis) const { return shape_.at(axis); }
  std::int64_t items() const { return items_; }
  Item item() const { return item_; }
  std::int64_t bytes() const { return items_ * item_size(item_); }
  void* raw() { return data_.get(); }
  const void* raw() const { return data_.get(); }

  template <class T>
  T* data() {
    if (item_of<T>() != item_) throw std::logic_error("Table::data: another item type is stored");
    return reinterpret_cast<T*>(data_.get());
  }

  // The item at a flat, already checked position.
  std::int64_t at_flat(std::int64_t position) const {
    const std::byte* const data = data_.get();
    switch (item_) {
      case Item::Int8:
        return reinterpret_cast<const std::int8_t*>(data)[position];
      case Item::Int32:
        return reinterpret_cast<const std::int32_t*>(data)[position];
      case Item::Int64:
        break;
    }
    return reinterpret_cast<const std::int64_t*>(data)[position];
  }

  // The flat position of the first item under `count` leading indices, each checked.
  std::int64_t position(const std::int64_t* indices, std::size_t count) const {
    if (count > axes_) throw std::out_of_range("a table has no more indices than axes");
    std::int64_t flat = 0;
    for (std::size_t axis = 0; axis < axes_; ++axis) {
      const std::int64_t index = axis < count ? indices[axis] : 0;
      if (axis < count && (index < 0 || index >= shape_[axis])) {
        throw std::out_of_range("index (" + std::to_string(index) + ") of axis " +
                                std::to_string(axis) + " must be in [0, " +
                                std::to_string(shape_[axis]) + ").");
      }
      flat = flat * shape_[axis] + index;
    }
    return flat;
  }

 private:
  Table(Item item, std::initializer_list<std::int64_t> shape, const char* what)
      : item_(item), axes_(shape.size()) {
    if (axes_ == 0 || axes_ > kMaxAxes) throw std::logic_error("Table: 1 to 3 axes");
    std::int64_t bytes = item_size(item);
    std::size_t axis = 0;
    for (const std::int64_t size : shape) {
      if (size < 0) throw std::logic_error("Table: an axis is negative");
      shape_[axis++] = size;
      items_ = checked_multiply(items_, size, what);
      bytes = checked_multiply(bytes, size, what);
    }
    if (bytes > kMaxBytes) {
      throw std::overflow_error(std::string(what) + ": a table of " + std::to_string(bytes) +
                                " bytes is over the limit of " + std::to_string(kMaxBytes) +
                                " bytes: use smaller sizes.");
    }
    data_.reset(new std::byte[static_cast<std::size_t>(bytes)]);
  }

  Item item_;
  std::size_t axes_;
  std::array<std::int64_t, kMaxAxes> shape_{};
  std::int64_t items_ = 1;
  std::unique_ptr<std::byte[]> data_;  // operator new aligns for every item type
};

}  // namespace hfpp
