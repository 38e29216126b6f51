// Reading safetensors: the mapping, and the header. A file is 8 bytes of little-endian header length, the header (a JSON object
// name -> {dtype, shape, data_offsets}, with an optional __metadata__ of strings), then the data. The header is read event by
// event, without a document in memory, by a small state machine that knows what may stand where; the layout of the data is checked
// last, over all tensors at once.
#include "io/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian and is used in place");

namespace loquetier {

namespace {

constexpr size_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr size_t kMaxDims = 16;

struct DTypeName {
  std::string_view name;
  DType dtype;
};
constexpr DTypeName kDTypes[] = {{"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16},
                                 {"I32", DType::i32}, {"I64", DType::i64}, {"U8", DType::u8}};

std::optional<DType> parse_dtype(std::string_view name) {
  for (const DTypeName& entry : kDTypes)
    if (entry.name == name) return entry.dtype;
  return std::nullopt;
}

std::string_view spelling(DType dtype) {
  for (const DTypeName& entry : kDTypes)
    if (entry.dtype == dtype) return entry.name;
  return "?";
}

struct RawTensor {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::pair<uint64_t, uint64_t>> offsets;
};

// Receives the header's JSON events. `place` says what the next value is; everything unexpected ends the reading with a message.
class HeaderReader {
 public:
  explicit HeaderReader(const std::string& where) : where_(where) {}

  std::vector<RawTensor> tensors;
  std::map<std::string, std::string> metadata;

  bool null() { return unexpected("null"); }
  bool boolean(bool) { return unexpected("a boolean"); }
  bool number_float(double, const std::string& text) { return unexpected("the number " + text); }
  bool number_integer(int64_t value) { return unexpected(concat("the negative number ", value)); }
  bool binary(nlohmann::json::binary_t&) { return unexpected("binary data"); }

  bool number_unsigned(uint64_t value) {
    if (place_ != Place::shape && place_ != Place::offsets) return unexpected(concat("the number ", value));
    if (numbers_.size() == (place_ == Place::shape ? kMaxDims : 2)) fail(concat(field(), ": too many numbers"));
    numbers_.push_back(value);
    return true;
  }

  bool string(std::string& value) {
    if (place_ == Place::metadata) {
      if (!metadata.emplace(key_, value).second) fail("__metadata__: key '" + key_ + "' appears twice");
      return true;
    }
    if (place_ != Place::dtype) return unexpected("a string");
    tensors.back().dtype = value;
    place_ = Place::entry;
    return true;
  }

  bool start_object(size_t) {
    if (place_ == Place::begin) place_ = Place::top;
    else if (place_ == Place::metadata_object) place_ = Place::metadata;
    else if (place_ == Place::entry_object) place_ = Place::entry;
    else return unexpected("an object");
    return true;
  }

  bool key(std::string& name) {
    if (place_ == Place::top) {
      if (!names_.insert(name).second) fail("'" + name + "' appears twice");
      if (name == "__metadata__") {
        place_ = Place::metadata_object;
      } else {
        tensors.push_back({name, {}, {}, {}});
        place_ = Place::entry_object;
      }
    } else if (place_ == Place::metadata) {
      key_ = name;
    } else {  // entry
      RawTensor& tensor = tensors.back();
      key_ = name;
      place_ = name == "dtype"          ? Place::dtype
               : name == "shape"        ? Place::shape_array
               : name == "data_offsets" ? Place::offsets_array
                                        : Place::begin;
      if (place_ == Place::begin) fail("'" + tensor.name + "': unknown key '" + name + "', expected dtype, shape and data_offsets");
      if ((place_ == Place::dtype && tensor.dtype) || (place_ == Place::shape_array && tensor.shape) ||
          (place_ == Place::offsets_array && tensor.offsets)) {
        fail("'" + tensor.name + "': key '" + name + "' appears twice");
      }
    }
    return true;
  }

  bool end_object() {
    if (place_ == Place::entry) {
      const RawTensor& tensor = tensors.back();
      if (!tensor.dtype) fail("'" + tensor.name + "': dtype is missing");
      if (!tensor.shape) fail("'" + tensor.name + "': shape is missing");
      if (!tensor.offsets) fail("'" + tensor.name + "': data_offsets is missing");
      place_ = Place::top;
    } else {
      place_ = place_ == Place::metadata ? Place::top : Place::end;
    }
    return true;
  }

  bool start_array(size_t) {
    if (place_ == Place::shape_array) place_ = Place::shape;
    else if (place_ == Place::offsets_array) place_ = Place::offsets;
    else return unexpected("a list");
    numbers_.clear();
    return true;
  }

  bool end_array() {
    RawTensor& tensor = tensors.back();
    if (place_ == Place::shape) {
      std::vector<int64_t> shape;
      for (uint64_t n : numbers_) {
        if (n > static_cast<uint64_t>(INT64_MAX)) fail(concat(field(), ": dimension ", n, " is too large"));
        shape.push_back(static_cast<int64_t>(n));
      }
      tensor.shape = std::move(shape);
    } else {
      if (numbers_.size() != 2) fail(concat(field(), ": expected [begin, end], got ", numbers_.size(), " numbers"));
      tensor.offsets = {numbers_[0], numbers_[1]};
    }
    place_ = Place::entry;
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) {
    const std::string_view message = error.what();
    const size_t begin = message.find("] ");
    fail(concat("not valid JSON: ", begin == std::string_view::npos ? message : message.substr(begin + 2)));
  }

 private:
  enum class Place {
    begin,
    top,
    metadata_object,
    metadata,
    entry_object,
    entry,
    dtype,
    shape_array,
    shape,
    offsets_array,
    offsets,
    end
  };

  std::string field() const { return "'" + tensors.back().name + "': " + key_; }

  [[noreturn]] void fail(const std::string& what) const { throw FormatError(concat("[safetensors] ", where_, ": header: ", what)); }

  bool unexpected(const std::string& got) const {
    switch (place_) {
      case Place::begin:
      case Place::top:
      case Place::end:
        fail("expected an object, got " + got);
      case Place::metadata_object:
        fail("__metadata__: expected an object, got " + got);
      case Place::metadata:
        fail("__metadata__: '" + key_ + "': expected a string, got " + got);
      case Place::entry_object:
      case Place::entry:
        fail("'" + tensors.back().name + "': expected an object, got " + got);
      case Place::dtype:
        fail(field() + ": expected a string, got " + got);
      default:
        fail(field() + ": expected a list of non-negative integers, got " + got);
    }
  }

  const std::string& where_;
  Place place_ = Place::begin;
  std::set<std::string, std::less<>> names_;
  std::string key_;
  std::vector<uint64_t> numbers_;
};

// bytes = product of shape times the element size; false on overflow.
bool byte_count(const std::vector<int64_t>& shape, size_t element, uint64_t& bytes) {
  bytes = element;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) bytes = 0;
  for (int64_t n : shape)
    if (bytes != 0 && __builtin_mul_overflow(bytes, static_cast<uint64_t>(n), &bytes)) return false;
  return true;
}

std::string show_shape(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (int64_t n : shape) text += concat(text.size() > 1 ? ", " : "", n);
  return text + "]";
}

// Every byte of the data belongs to exactly one tensor.
void check_layout(const std::vector<RawTensor>& tensors, uint64_t data_bytes, const std::string& where) {
  std::vector<const RawTensor*> order;
  for (const RawTensor& tensor : tensors) {
    const auto [begin, end] = *tensor.offsets;
    require<FormatError>(begin <= end, "[safetensors] ", where, ": '", tensor.name, "': data_offsets: expected begin <= end, got [",
                         begin, ", ", end, "]");
    require<FormatError>(end <= data_bytes, "[safetensors] ", where, ": '", tensor.name,
                         "': data_offsets: expected an end of at most ", data_bytes, " (the bytes after the header), got ", end,
                         "; the file may be truncated");
    order.push_back(&tensor);
  }
  std::sort(order.begin(), order.end(), [](const RawTensor* a, const RawTensor* b) { return *a->offsets < *b->offsets; });
  uint64_t covered = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const uint64_t begin = order[i]->offsets->first;
    if (begin < covered)
      throw FormatError(
          concat("[safetensors] ", where, ": '", order[i]->name, "': data_offsets: overlaps with '", order[i - 1]->name, "'"));
    if (begin > covered)
      throw FormatError(concat("[safetensors] ", where, ": '", order[i]->name, "': data_offsets: expected to begin at ", covered,
                               " where the tensor before it ends, got ", begin, " (bytes that belong to no tensor)"));
    covered = order[i]->offsets->second;
  }
  require<FormatError>(covered == data_bytes, "[safetensors] ", where, ": expected ", covered,
                       " bytes of data after the header, got ", data_bytes, " (bytes that belong to no tensor)");
}

[[noreturn]] void fail_unsupported(const std::string& where, const std::string& name, const std::string& dtype) {
  throw FormatError(concat("[safetensors] ", where, ": '", name, "': dtype: expected F32, F16, BF16, I32, I64 or U8, got ", dtype));
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    const int code = errno;
    if (code == ENOENT || code == ENOTDIR) throw NotFound(concat("[io] ", path.string(), ": no such file"));
    throw FormatError(concat("[io] ", path.string(), ": cannot be opened: ", std::strerror(code)));
  }
  struct stat info{};
  const bool regular = ::fstat(file, &info) == 0 && S_ISREG(info.st_mode);
  void* mapped = nullptr;
  if (regular && info.st_size > 0) mapped = ::mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, file, 0);
  const int code = errno;
  ::close(file);
  require<FormatError>(regular, "[io] ", path.string(), ": expected a regular file");
  require<FormatError>(mapped != MAP_FAILED, "[io] ", path.string(), ": cannot be mapped: ", std::strerror(code));
  data_ = static_cast<const std::byte*>(mapped);
  size_ = static_cast<size_t>(info.st_size);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  auto mapping = std::make_shared<const MappedFile>(path);
  SafetensorsFile file = parse({reinterpret_cast<const char*>(mapping->data()), mapping->size()}, path.string());
  file.mapping_ = std::move(mapping);
  return file;
}

SafetensorsFile SafetensorsFile::parse(std::string_view bytes, const std::string& where) {
  require<FormatError>(bytes.size() >= 8, "[safetensors] ", where, ": expected at least 8 bytes, got ", bytes.size());
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  require<FormatError>(header_bytes <= kMaxHeaderBytes && header_bytes <= bytes.size() - 8, "[safetensors] ", where,
                       ": header length: expected at most ", std::min<uint64_t>(kMaxHeaderBytes, bytes.size() - 8), " (a file of ",
                       bytes.size(), " bytes), got ", header_bytes, "; the file is truncated or no safetensors file");
  const std::string_view header = bytes.substr(8, header_bytes), data = bytes.substr(8 + header_bytes);
  require<FormatError>(!header.empty() && header.front() == '{', "[safetensors] ", where,
                       ": header: expected JSON beginning with '{'");
  // The JSON parser takes a zero byte for the end of its input: what follows one would be ignored silently.
  require<FormatError>(header.find('\0') == std::string_view::npos, "[safetensors] ", where,
                       ": header: expected JSON, got a zero byte");

  HeaderReader reader(where);
  nlohmann::json::sax_parse(header.begin(), header.end(), &reader);
  check_layout(reader.tensors, data.size(), where);

  SafetensorsFile file;
  file.where_ = where;
  file.metadata_ = std::move(reader.metadata);
  for (RawTensor& tensor : reader.tensors) {
    const auto [begin, end] = *tensor.offsets;
    const std::optional<DType> dtype = parse_dtype(*tensor.dtype);
    if (!dtype) {
      file.unsupported_.emplace(tensor.name, *tensor.dtype);
      continue;
    }
    uint64_t expected = 0;
    const bool countable = byte_count(*tensor.shape, size_of(*dtype), expected);
    if (!countable || expected != end - begin) {
      throw FormatError(concat("[safetensors] ", where, ": '", tensor.name, "': expected ",
                               countable ? concat(expected) : std::string("more than 2^64"), " bytes for ", *tensor.dtype, " ",
                               show_shape(*tensor.shape), ", got ", end - begin, " from data_offsets"));
    }
    TensorEntry entry{tensor.name, *dtype, std::move(*tensor.shape), data.data() + begin, static_cast<size_t>(end - begin)};
    file.tensors_.emplace(std::move(tensor.name), std::move(entry));
  }
  return file;
}

const TensorEntry& SafetensorsFile::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found != tensors_.end()) return found->second;
  const auto other = unsupported_.find(name);
  if (other != unsupported_.end()) fail_unsupported(where_, name, other->second);
  throw FormatError(concat("[safetensors] ", where_, ": '", name, "': no such tensor"));
}

const TensorEntry& CheckpointTensors::at(const std::string& name) const {
  const auto found = tensors.find(name);
  if (found != tensors.end()) return found->second;
  const auto other = unsupported.find(name);
  if (other != unsupported.end()) fail_unsupported(where, name, other->second);
  throw FormatError(concat("[safetensors] ", where, ": '", name, "': no such tensor"));
}

std::string safetensors_bytes(const std::vector<TensorToWrite>& tensors, const std::map<std::string, std::string>& metadata) {
  std::set<std::string_view> names;
  std::vector<uint64_t> sizes;
  uint64_t total = 0;
  std::string text = "{";
  try {
    if (!metadata.empty()) text += "\"__metadata__\":" + nlohmann::json(metadata).dump() + (tensors.empty() ? "" : ",");
    for (const TensorToWrite& tensor : tensors) {
      require(tensor.name != "__metadata__" && names.insert(tensor.name).second, "[safetensors] '", tensor.name,
              "': expected a name of its own, got one that is taken");
      uint64_t bytes = 0;
      const bool countable = std::all_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t n) { return n >= 0; }) &&
                             tensor.shape.size() <= kMaxDims && byte_count(tensor.shape, size_of(tensor.dtype), bytes);
      require(countable, "[safetensors] '", tensor.name, "': shape: expected at most ", kMaxDims, " non-negative dimensions, got ",
              show_shape(tensor.shape));
      require(bytes == 0 || tensor.data != nullptr, "[safetensors] '", tensor.name, "': expected data, got none");
      const nlohmann::ordered_json entry = {
          {"dtype", spelling(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {total, total + bytes}}};
      text += nlohmann::json(tensor.name).dump() + ":" + entry.dump() + (&tensor == &tensors.back() ? "" : ",");
      sizes.push_back(bytes);
      total += bytes;
    }
  } catch (const nlohmann::json::exception&) {
    throw InvalidArgument("[safetensors] names and metadata: expected UTF-8 text");
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  require(text.size() <= kMaxHeaderBytes, "[safetensors] header: expected at most ", kMaxHeaderBytes, " bytes, got ", text.size());

  const uint64_t header_bytes = text.size();
  std::string bytes;
  bytes.reserve(8 + text.size() + total);
  bytes.append(reinterpret_cast<const char*>(&header_bytes), 8);
  bytes += text;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (sizes[i] > 0) bytes.append(static_cast<const char*>(tensors[i].data), sizes[i]);
  return bytes;
}

}  // namespace loquetier
