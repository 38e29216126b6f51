// safetensors files: reading by memory map, writing atomically. Format: https://github.com/huggingface/safetensors (README,
// "Format"). The reader checks everything it relies on (header size and JSON, dtypes, shapes, offsets in range, no overlap, no gap
// that hides bytes, byte counts) and throws FormatError naming file and tensor; hostile input never reads out of bounds or
// allocates by its word. A tensor of a dtype that this library does not compute with (F64, U16, F8_E4M3, …) does not stop a file
// from loading: it is listed by name in unsupported() and refused when asked for.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace loquetier {

// A read-only mapping of a whole file.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);  // NotFound, FormatError
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

struct TensorEntry {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  const void* data = nullptr;  // into the mapping; may be unaligned
  size_t bytes = 0;
};

class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::filesystem::path& path);
  // Parses bytes in memory (fuzzing, tests). `bytes` must outlive the result; `where` names them in errors.
  static SafetensorsFile parse(std::string_view bytes, const std::string& where);

  const std::map<std::string, TensorEntry>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& unsupported() const { return unsupported_; }  // name -> dtype as the file spells it
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const TensorEntry& at(const std::string& name) const;                   // FormatError naming file and tensor
  std::shared_ptr<const MappedFile> mapping() const { return mapping_; }  // keeps the data alive

 private:
  std::string where_;
  std::shared_ptr<const MappedFile> mapping_;
  std::map<std::string, TensorEntry> tensors_;
  std::map<std::string, std::string> unsupported_;
  std::map<std::string, std::string> metadata_;
};

// The tensors of a checkpoint folder: model.safetensors, or all shards of model.safetensors.index.json (checked against each
// other).
struct CheckpointTensors {
  std::string where;  // the folder, for messages
  std::map<std::string, TensorEntry> tensors;
  std::map<std::string, std::string> unsupported;  // name -> dtype as the file spells it
  std::vector<std::shared_ptr<const MappedFile>> mappings;
  const TensorEntry& at(const std::string& name) const;  // FormatError naming folder and tensor: missing, or unsupported dtype
};
CheckpointTensors open_checkpoint(const std::filesystem::path& folder);

struct TensorToWrite {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  const void* data = nullptr;
};
// The bytes of a safetensors file, tensors in the given order, header padded to 8 bytes.
std::string safetensors_bytes(const std::vector<TensorToWrite>& tensors, const std::map<std::string, std::string>& metadata);

// Writes to a temporary name in the same folder, syncs the file and the folder, renames over `path`. After an error `path` is as it
// was.
void write_file_atomically(const std::filesystem::path& path, std::string_view bytes);

// What becomes of the other files of a folder that is there already. replace: they go with the old folder, which must hold a file
// named like one of the new ones (so that a mistyped path does not lose somebody's folder). keep: they stay.
enum class OtherFiles { replace, keep };
// Writes a folder of files the same way: a temporary sibling folder, synced, then exchanged with the old one in one step. Names are
// plain file names. InvalidArgument when the old folder may not be replaced (or has subfolders to keep). After an error the old
// folder is as it was.
void write_folder_atomically(const std::filesystem::path& folder, const std::map<std::string, std::string>& files,
                             OtherFiles other_files = OtherFiles::replace);

// Reads a small text file whole (config.json); NotFound, or FormatError above `limit` bytes.
std::string read_text_file(const std::filesystem::path& path, size_t limit = 64u << 20);

// Element conversion on the host between f32, f16 and bf16 (round to nearest even; NaN stays NaN). No alignment needed; src and dst
// must not overlap.
void convert_elements(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t n);

}  // namespace loquetier
