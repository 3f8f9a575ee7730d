// One HDF5 file through the C API: libver latest (an unclean close is then refused at the next opening), contiguous
// datasets without filters, every return value checked. Errors are InputError with HDF5's own text.
// Names may contain '/': groups are made as needed. BF16, F16 and FP8 are stored as unsigned integers of the same
// width with a dataset attribute `dtype` that says what they are.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/dtype.h"

namespace dsa {

class Hdf5File {
 public:
  static Hdf5File create(const std::string& path);  // refuses an existing path
  static Hdf5File open(const std::string& path);    // read-only
  ~Hdf5File();
  Hdf5File(Hdf5File&& other) noexcept;
  Hdf5File& operator=(Hdf5File&&) = delete;

  const std::string& path() const { return path_; }

  void write_dataset(const std::string& name, Dtype dtype, const std::vector<int64_t>& shape, const void* data);
  // The same in two steps, for data that come in pieces.
  void create_dataset(const std::string& name, Dtype dtype, const std::vector<int64_t>& shape);
  void write_slab(const std::string& name, const std::vector<int64_t>& offset, const std::vector<int64_t>& count,
                  const void* data);

  bool has(const std::string& name) const;
  std::vector<std::string> names() const;  // every dataset's path, ascending
  std::vector<int64_t> shape(const std::string& name) const;
  Dtype dtype(const std::string& name) const;
  void read_dataset(const std::string& name, void* out) const;  // all of it
  void read_dataset(const std::string& name, const std::vector<int64_t>& offset, const std::vector<int64_t>& count,
                    void* out) const;

  // Attributes of the root, or of the dataset or group `on`.
  void set_attribute(const std::string& key, const std::string& value, const std::string& on = "/");
  void set_attribute(const std::string& key, int64_t value, const std::string& on = "/");
  std::optional<std::string> string_attribute(const std::string& key, const std::string& on = "/") const;
  std::optional<int64_t> int_attribute(const std::string& key, const std::string& on = "/") const;

  void close();  // flush and close with errors thrown; the destructor swallows them

 private:
  Hdf5File(std::string path, int64_t id) : path_(std::move(path)), id_(id) {}
  std::string path_;
  int64_t id_ = -1;  // hid_t
};

}  // namespace dsa
