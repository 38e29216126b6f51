// Opening a checkpoint folder: one safetensors file, or the shards that an index lists, checked against each other. Also the
// reading of small text files. Declared in io/safetensors.h.
#include <set>

#include "io/json_reader.h"
#include "io/safetensors.h"

namespace loquetier {

namespace {

namespace fs = std::filesystem;

void add_shard(CheckpointTensors& checkpoint, const SafetensorsFile& shard) {
  checkpoint.tensors.insert(shard.tensors().begin(), shard.tensors().end());
  checkpoint.unsupported.insert(shard.unsupported().begin(), shard.unsupported().end());
  checkpoint.mappings.push_back(shard.mapping());
}

// file -> names of the tensors that the index puts there
std::map<std::string, std::set<std::string>> read_index(const fs::path& path) {
  const nlohmann::json index = parse_large_json_object(read_text_file(path), path.string());
  const auto weight_map = index.find("weight_map");
  require<FormatError>(weight_map != index.end() && weight_map->is_object() && !weight_map->empty(), "[checkpoint] ", path.string(),
                       ": weight_map: expected an object of tensor names and file names");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [name, file] : weight_map->items()) {
    require<FormatError>(file.is_string(), "[checkpoint] ", path.string(), ": weight_map: '", name, "': expected a file name");
    const std::string& file_name = file.get_ref<const std::string&>();
    require<FormatError>(!file_name.empty() && file_name != "." && file_name != ".." && file_name.find('/') == std::string::npos,
                         "[checkpoint] ", path.string(), ": weight_map: '", name, "': expected a file of the same folder, got '",
                         file_name, "'");
    shards[file_name].insert(name);
  }
  return shards;
}

}  // namespace

CheckpointTensors open_checkpoint(const fs::path& folder) {
  const fs::path single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
  CheckpointTensors checkpoint;
  checkpoint.where = folder.string();
  std::error_code ignored;
  if (fs::exists(single, ignored)) {
    add_shard(checkpoint, SafetensorsFile::open(single));
    return checkpoint;
  }
  if (!fs::exists(index, ignored)) {
    const bool pickled =
        fs::exists(folder / "pytorch_model.bin", ignored) || fs::exists(folder / "pytorch_model.bin.index.json", ignored);
    throw NotFound(concat("[checkpoint] ", folder.string(), ": expected model.safetensors or model.safetensors.index.json, found ",
                          !fs::is_directory(folder, ignored) ? "no such folder"
                          : pickled                          ? "pytorch_model.bin only: save it again with safe_serialization=True"
                                                             : "neither"));
  }
  for (const auto& shard_names : read_index(index)) {
    const std::string& file_name = shard_names.first;
    const std::set<std::string>& names = shard_names.second;
    const fs::path path = folder / file_name;
    require<NotFound>(fs::exists(path, ignored), "[checkpoint] ", path.string(), ": no such file, but ", index.filename().string(),
                      " lists it");
    const SafetensorsFile shard = SafetensorsFile::open(path);
    for (const std::string& name : names) {
      require<FormatError>(shard.tensors().count(name) || shard.unsupported().count(name), "[checkpoint] ", path.string(), ": '",
                           name, "': no such tensor, but ", index.filename().string(), " puts it there");
    }
    const auto check_listed = [&](const std::string& name) {
      require<FormatError>(names.count(name) > 0, "[checkpoint] ", path.string(), ": '", name, "': a tensor that ",
                           index.filename().string(), " does not put there");
    };
    for (const auto& [name, entry] : shard.tensors()) check_listed(name);
    for (const auto& [name, dtype] : shard.unsupported()) check_listed(name);
    add_shard(checkpoint, shard);
  }
  return checkpoint;
}

std::string read_text_file(const fs::path& path, size_t limit) {
  const MappedFile file(path);
  require<FormatError>(file.size() <= limit, "[io] ", path.string(), ": expected a text file of at most ", limit, " bytes, got ",
                       file.size());
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

}  // namespace loquetier
