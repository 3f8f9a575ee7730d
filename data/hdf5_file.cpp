#include "data/hdf5_file.h"

#include <hdf5.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "data/error.h"
#include "data/file.h"

namespace dsa {
namespace {

// HDF5 prints its error stack unless told otherwise, thread by thread; ours goes into the exception.
struct Quiet {
  Quiet() { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }
};

std::string hdf5_error() {
  std::string text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD,
           [](unsigned n, const H5E_error2_t* error, void* out) -> herr_t {
             auto& all = *static_cast<std::string*>(out);
             if (n < 4 && error->desc) all += (all.empty() ? "" : " < ") + std::string(error->desc);
             return 0;
           },
           &text);
  return text.empty() ? "HDF5 gives no reason" : text;
}

template <class T>
T check(T result, const std::string& problem, const char* suggestion = "the file is damaged; make or copy it again") {
  if (result < 0) throw InputError(problem, hdf5_error(), suggestion);
  return result;
}
constexpr const char* kDiskFull = "check the free space and the permissions of that disk";

class Id {
 public:
  Id(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Id() {
    if (id_ >= 0) close_(id_);
  }
  Id(Id&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Id& operator=(Id&&) = delete;
  operator hid_t() const { return id_; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

hid_t file_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::BOOL: case Dtype::U8: case Dtype::F8_E5M2: case Dtype::F8_E4M3: case Dtype::F8_E8M0:
    case Dtype::F8_E4M3FNUZ: case Dtype::F8_E5M2FNUZ: return H5T_STD_U8LE;
    case Dtype::I8: return H5T_STD_I8LE;
    case Dtype::I16: return H5T_STD_I16LE;
    case Dtype::U16: case Dtype::F16: case Dtype::BF16: return H5T_STD_U16LE;
    case Dtype::I32: return H5T_STD_I32LE;
    case Dtype::U32: return H5T_STD_U32LE;
    case Dtype::F32: return H5T_IEEE_F32LE;
    case Dtype::F64: return H5T_IEEE_F64LE;
    case Dtype::I64: return H5T_STD_I64LE;
    case Dtype::U64: return H5T_STD_U64LE;
    default: throw std::invalid_argument("dtype " + name(dtype) + " cannot be stored in HDF5");
  }
}

Dtype plain_dtype(hid_t type, const std::string& what) {
  for (Dtype d : {Dtype::U8, Dtype::I8, Dtype::I16, Dtype::U16, Dtype::I32, Dtype::U32, Dtype::F32, Dtype::F64,
                  Dtype::I64, Dtype::U64})
    if (H5Tequal(type, file_type(d)) > 0) return d;
  throw InputError("cannot read " + what, "its element type is none of ours", "write it with little-endian numbers");
}

// How an object is created, but for the times that HDF5 would keep in it: files of equal contents are equal byte for byte.
Id without_times(hid_t of) {
  Id list(check(H5Pcreate(of), "HDF5 failed"), H5Pclose);
  check(H5Pset_obj_track_times(list, false), "HDF5 failed");
  return list;
}

Id access_list() {
  Id list(check(H5Pcreate(H5P_FILE_ACCESS), "HDF5 failed"), H5Pclose);
  check(H5Pset_libver_bounds(list, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST), "HDF5 failed");
  // Parallel file systems often have no locks: then go on without.
  check(H5Pset_file_locking(list, true, true), "HDF5 failed");
  return list;
}

Id open_dataset(hid_t file, const std::string& path, const std::string& name) {
  return Id(check(H5Dopen2(file, name.c_str(), H5P_DEFAULT), "cannot open dataset " + name + " of " + path), H5Dclose);
}

std::vector<int64_t> dataset_shape(hid_t dataset, const std::string& what) {
  const Id space(check(H5Dget_space(dataset), "cannot read " + what), H5Sclose);
  const int rank = check(H5Sget_simple_extent_ndims(space), "cannot read " + what);
  std::vector<hsize_t> dims(static_cast<size_t>(rank));
  check(H5Sget_simple_extent_dims(space, dims.data(), nullptr), "cannot read " + what);
  return {dims.begin(), dims.end()};
}

// The selected part of a dataset, and a dense memory space for it.
struct Slab {
  Id file_space, memory_space;
};
Slab select(hid_t dataset, const std::string& what, const std::vector<int64_t>& offset, const std::vector<int64_t>& count) {
  const std::vector<int64_t> shape = dataset_shape(dataset, what);
  if (offset.size() != shape.size() || count.size() != shape.size())
    throw std::invalid_argument("slab of " + what + " has another rank than the dataset");
  for (size_t d = 0; d < shape.size(); ++d)
    if (offset[d] < 0 || count[d] < 0 || offset[d] > shape[d] - count[d])
      throw std::out_of_range("slab of " + what + " lies outside of it");
  const std::vector<hsize_t> start(offset.begin(), offset.end()), n(count.begin(), count.end());
  Slab slab{Id(check(H5Dget_space(dataset), "cannot read " + what), H5Sclose),
            Id(check(shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(n.size()), n.data(), nullptr),
                     "cannot read " + what),
               H5Sclose)};
  if (!shape.empty())
    check(H5Sselect_hyperslab(slab.file_space, H5S_SELECT_SET, start.data(), nullptr, n.data(), nullptr),
          "cannot read " + what);
  return slab;
}

bool empty(const std::vector<int64_t>& count) { return std::count(count.begin(), count.end(), 0) > 0; }

void write_attribute(hid_t object, const std::string& key, hid_t type, const void* value, const std::string& path) {
  const std::string problem = "cannot write attribute " + key + " of " + path;
  const Id space(check(H5Screate(H5S_SCALAR), problem, kDiskFull), H5Sclose);
  if (check(H5Aexists(object, key.c_str()), problem) > 0) check(H5Adelete(object, key.c_str()), problem, kDiskFull);
  const Id attribute(check(H5Acreate2(object, key.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT), problem, kDiskFull), H5Aclose);
  check(H5Awrite(attribute, type, value), problem, kDiskFull);
}

void write_text_attribute(hid_t object, const std::string& key, const std::string& value, const std::string& path) {
  const Id type(check(H5Tcopy(H5T_C_S1), "HDF5 failed"), H5Tclose);
  check(H5Tset_size(type, std::max<size_t>(value.size(), 1)), "HDF5 failed");
  check(H5Tset_strpad(type, H5T_STR_NULLPAD), "HDF5 failed");
  check(H5Tset_cset(type, H5T_CSET_UTF8), "HDF5 failed");
  std::string padded = value;
  padded.resize(std::max<size_t>(value.size(), 1), '\0');
  write_attribute(object, key, type, padded.data(), path);
}

std::optional<std::string> read_text_attribute(hid_t object, const std::string& key, const std::string& path) {
  const std::string problem = "cannot read attribute " + key + " of " + path;
  if (check(H5Aexists(object, key.c_str()), problem) == 0) return std::nullopt;
  const Id attribute(check(H5Aopen(object, key.c_str(), H5P_DEFAULT), problem), H5Aclose);
  const Id type(check(H5Aget_type(attribute), problem), H5Tclose);
  const Id space(check(H5Aget_space(attribute), problem), H5Sclose);
  if (H5Tget_class(type) != H5T_STRING || H5Sget_simple_extent_npoints(space) != 1)
    throw InputError(problem, "it is not a string", "write the file again");
  if (H5Tis_variable_str(type) > 0) {  // as h5py writes it
    char* text = nullptr;
    check(H5Aread(attribute, type, &text), problem);
    const std::string value = text ? text : "";
    H5free_memory(text);
    return value;
  }
  std::string value(H5Tget_size(type), '\0');
  check(H5Aread(attribute, type, value.data()), problem);
  return value.substr(0, value.find('\0'));
}

}  // namespace

Hdf5File Hdf5File::create(const std::string& path) {
  const Quiet quiet;
  if (path_exists(path))
    throw InputError("cannot write " + path, "it exists already", "choose another name or remove that file first");
  const Id access = access_list(), root = without_times(H5P_FILE_CREATE);
  return Hdf5File(path, check(H5Fcreate(path.c_str(), H5F_ACC_EXCL, root, access), "cannot create " + path, kDiskFull));
}

Hdf5File Hdf5File::open(const std::string& path) {
  const Quiet quiet;
  ReadFile(path).size();  // a missing or unreadable file says so itself
  const Id access = access_list();
  return Hdf5File(path, check(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), "cannot open " + path,
                              "it is no HDF5 file, was cut, or its writer was killed; make or copy it again"));
}

Hdf5File::Hdf5File(Hdf5File&& other) noexcept : path_(std::move(other.path_)), id_(std::exchange(other.id_, -1)) {}

Hdf5File::~Hdf5File() {
  const Quiet quiet;
  if (id_ >= 0) H5Fclose(id_);
}

void Hdf5File::close() {
  const Quiet quiet;
  const hid_t id = std::exchange(id_, -1);
  const herr_t flushed = H5Fflush(id, H5F_SCOPE_LOCAL);  // reports a full disk; H5Fclose does not
  const std::string why = flushed < 0 ? hdf5_error() : "";
  const herr_t closed = H5Fclose(id);
  if (flushed < 0) throw InputError("cannot write " + path_, why, kDiskFull);
  check(closed, "cannot close " + path_, kDiskFull);
}

void Hdf5File::create_dataset(const std::string& name, Dtype dtype, const std::vector<int64_t>& shape) {
  const Quiet quiet;
  const std::string problem = "cannot create dataset " + name + " of " + path_;
  const std::vector<hsize_t> dims(shape.begin(), shape.end());
  const Id space(check(shape.empty() ? H5Screate(H5S_SCALAR)
                                     : H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
                       problem, kDiskFull), H5Sclose);
  const Id group = without_times(H5P_GROUP_CREATE), layout = without_times(H5P_DATASET_CREATE);
  for (size_t slash = name.find('/', 1); slash != std::string::npos; slash = name.find('/', slash + 1)) {
    const std::string parent = name.substr(0, slash);
    if (H5Lexists(id_, parent.c_str(), H5P_DEFAULT) > 0) continue;
    Id(check(H5Gcreate2(id_, parent.c_str(), H5P_DEFAULT, group, H5P_DEFAULT), problem, kDiskFull), H5Gclose);
  }
  check(H5Pset_layout(layout, H5D_CONTIGUOUS), problem);
  check(H5Pset_fill_time(layout, H5D_FILL_TIME_NEVER), problem);
  const hid_t type = file_type(dtype);
  const Id dataset(check(H5Dcreate2(id_, name.c_str(), type, space, H5P_DEFAULT, layout, H5P_DEFAULT), problem, kDiskFull), H5Dclose);
  if (plain_dtype(type, name) != dtype) write_text_attribute(dataset, "dtype", dsa::name(dtype), path_);
}

void Hdf5File::write_slab(const std::string& name, const std::vector<int64_t>& offset, const std::vector<int64_t>& count,
                          const void* data) {
  const Quiet quiet;
  const std::string what = "dataset " + name + " of " + path_;
  const Id dataset = open_dataset(id_, path_, name);
  const Slab slab = select(dataset, what, offset, count);
  if (empty(count)) return;
  const Id type(check(H5Dget_type(dataset), "cannot write " + what), H5Tclose);
  check(H5Dwrite(dataset, type, slab.memory_space, slab.file_space, H5P_DEFAULT, data), "cannot write " + what, kDiskFull);
}

void Hdf5File::write_dataset(const std::string& name, Dtype dtype, const std::vector<int64_t>& shape, const void* data) {
  create_dataset(name, dtype, shape);
  write_slab(name, std::vector<int64_t>(shape.size(), 0), shape, data);
}

bool Hdf5File::has(const std::string& name) const {
  const Quiet quiet;
  // Every group on the way must exist before the last name may be asked for.
  for (size_t slash = name.find('/', 1); slash != std::string::npos; slash = name.find('/', slash + 1))
    if (H5Lexists(id_, name.substr(0, slash).c_str(), H5P_DEFAULT) <= 0) return false;
  return H5Lexists(id_, name.c_str(), H5P_DEFAULT) > 0;
}

std::vector<std::string> Hdf5File::names() const {
  const Quiet quiet;
  std::vector<std::string> names;
  const auto visit = [](hid_t group, const char* link, const H5L_info_t*, void* out) -> herr_t {
    const Id object(H5Oopen(group, link, H5P_DEFAULT), H5Oclose);
    if (object < 0) return -1;
    if (H5Iget_type(object) == H5I_DATASET) static_cast<std::vector<std::string>*>(out)->push_back(link);
    return 0;
  };
  check(H5Lvisit(id_, H5_INDEX_NAME, H5_ITER_NATIVE, visit, &names), "cannot list " + path_);
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<int64_t> Hdf5File::shape(const std::string& name) const {
  const Quiet quiet;
  return dataset_shape(open_dataset(id_, path_, name), "dataset " + name + " of " + path_);
}

Dtype Hdf5File::dtype(const std::string& name) const {
  const Quiet quiet;
  const std::string what = "dataset " + name + " of " + path_;
  const Id dataset = open_dataset(id_, path_, name);
  const Id type(check(H5Dget_type(dataset), "cannot read " + what), H5Tclose);
  const Dtype plain = plain_dtype(type, what);
  const auto text = read_text_attribute(dataset, "dtype", path_);
  if (!text) return plain;
  const auto told = parse_dtype(*text);
  if (!told || bits(*told) != bits(plain))
    throw InputError("cannot read " + what, "its attribute dtype is \"" + *text + "\"", "make or copy the file again");
  return *told;
}

void Hdf5File::read_dataset(const std::string& name, void* out) const {
  const std::vector<int64_t> all = shape(name);
  read_dataset(name, std::vector<int64_t>(all.size(), 0), all, out);
}

void Hdf5File::read_dataset(const std::string& name, const std::vector<int64_t>& offset,
                            const std::vector<int64_t>& count, void* out) const {
  const Quiet quiet;
  const std::string what = "dataset " + name + " of " + path_;
  const Id dataset = open_dataset(id_, path_, name);
  const Slab slab = select(dataset, what, offset, count);
  if (empty(count)) return;
  const Id type(check(H5Dget_type(dataset), "cannot read " + what), H5Tclose);
  plain_dtype(type, what);  // little-endian numbers: file and memory layout are one
  check(H5Dread(dataset, type, slab.memory_space, slab.file_space, H5P_DEFAULT, out), "cannot read " + what);
}

void Hdf5File::set_attribute(const std::string& key, const std::string& value, const std::string& on) {
  const Quiet quiet;
  const Id object(check(H5Oopen(id_, on.c_str(), H5P_DEFAULT), "cannot open " + on + " of " + path_), H5Oclose);
  write_text_attribute(object, key, value, path_);
}

void Hdf5File::set_attribute(const std::string& key, int64_t value, const std::string& on) {
  const Quiet quiet;
  const Id object(check(H5Oopen(id_, on.c_str(), H5P_DEFAULT), "cannot open " + on + " of " + path_), H5Oclose);
  write_attribute(object, key, H5T_STD_I64LE, &value, path_);
}

std::optional<std::string> Hdf5File::string_attribute(const std::string& key, const std::string& on) const {
  const Quiet quiet;
  const Id object(check(H5Oopen(id_, on.c_str(), H5P_DEFAULT), "cannot open " + on + " of " + path_), H5Oclose);
  return read_text_attribute(object, key, path_);
}

std::optional<int64_t> Hdf5File::int_attribute(const std::string& key, const std::string& on) const {
  const Quiet quiet;
  const std::string problem = "cannot read attribute " + key + " of " + path_;
  const Id object(check(H5Oopen(id_, on.c_str(), H5P_DEFAULT), "cannot open " + on + " of " + path_), H5Oclose);
  if (check(H5Aexists(object, key.c_str()), problem) == 0) return std::nullopt;
  const Id attribute(check(H5Aopen(object, key.c_str(), H5P_DEFAULT), problem), H5Aclose);
  const Id type(check(H5Aget_type(attribute), problem), H5Tclose);
  const Id space(check(H5Aget_space(attribute), problem), H5Sclose);
  if (H5Tget_class(type) != H5T_INTEGER || H5Sget_simple_extent_npoints(space) != 1)
    throw InputError(problem, "it is not an integer", "write the file again");
  int64_t value = 0;
  check(H5Aread(attribute, H5T_NATIVE_INT64, &value), problem);
  return value;
}

}  // namespace dsa
