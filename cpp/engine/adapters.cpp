// The life of adapters: add, clone, remove, save, move, checkpoint. All but remove take the step lock, so they wait for the step
// under way.
#include <nlohmann/json.hpp>

#include "engine/impl.h"
#include "io/checkpoint.h"
#include "io/peft_folder.h"
#include "io/safetensors.h"

namespace loquetier {

namespace {

constexpr int kCheckpointFormat = 1;

bool is_utf8(const std::string& text) {
  try {
    (void)nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::type_error&) {
    return false;
  }
}

std::vector<NamedTensor> named(const AdapterLayout& layout, const std::vector<float>& flat) {
  std::vector<NamedTensor> tensors;
  for (size_t i = 0; i < layout.targets.size(); ++i) {
    const LoraTarget& t = layout.targets[i];
    auto part = [&](char ab, int64_t offset, int64_t rows, int64_t cols) {
      tensors.push_back({peft_key(t.module, ab), {rows, cols}, {flat.begin() + offset, flat.begin() + offset + rows * cols}});
    };
    part('A', layout.a_offset[i], t.rank, t.module.in);
    part('B', layout.b_offset[i], t.module.out, t.rank);
  }
  return tensors;
}

}  // namespace

void Engine::Impl::require_new_name(const std::string& name) const {
  require_usable();
  require(!name.empty(), "[add_adapter] name: expected at least one character; the empty name is the base model");
  require(is_utf8(name), "[add_adapter] name: expected UTF-8 text");
  require(!registry.contains(name), "[add_adapter] name: \"", name,
          "\" is taken; remove that adapter first or choose another name");
}

AdapterPtr Engine::Impl::new_record(const std::string& name, LoraConfig config, std::shared_ptr<const AdapterLayout> layout,
                                    DType stored) const {
  auto record = std::make_shared<AdapterRecord>();
  record->name = name;
  record->config = std::move(config);
  record->layout = std::move(layout);
  record->stored_dtype = stored;
  return record;
}

void Engine::Impl::register_adapter(const AdapterPtr& record) {
  std::lock_guard guard(front);
  require_new_name(record->name);  // another thread may have taken it meanwhile
  record->id = next_adapter++;
  core->planner.add_adapter(record->id, static_cast<int64_t>(record->layout->pool_bytes(core->ops->compute_dtype())),
                            record->weights->version());
  core->adapters.emplace(record->id, record);
  registry.emplace(record->name, record);
  if (record->train) core->stats.training_state_bytes += static_cast<int64_t>(record->train->bytes());
}

void Engine::Impl::add_adapter(const std::string& name, LoraConfig config, std::vector<LoraTarget> targets,
                               const LoraWeights& weights, DType stored) {
  auto layout = std::make_shared<const AdapterLayout>(AdapterLayout::make(std::move(targets), base->weights().config));
  auto record = new_record(name, std::move(config), layout, stored);
  std::vector<float> flat = layout->flatten(weights);
  std::lock_guard step_guard(step_lock);
  {
    std::lock_guard guard(front);
    require_new_name(name);
  }
  record->weights = core->pool.add(layout, flat.data(), 0);
  const DType compute = core->ops->compute_dtype();
  if (compute != DType::f32 && compute != stored) record->exact = std::move(flat);
  register_adapter(record);
}

std::vector<float> Engine::Impl::master_values(const AdapterRecord& record) const {
  if (record.train) return record.train->read("master");
  return record.exact.empty() ? core->pool.read(*record.weights) : record.exact;
}

AdapterSnapshot Engine::Impl::snapshot(const std::string& name) const {
  AdapterPtr record;
  {
    std::lock_guard guard(front);
    record = find_named(name, "[engine] adapter");
    require(record->live_jobs == 0, "[engine] adapter \"", name, "\": expected no queued jobs, ", record->live_jobs,
            " have not ended; step until they have");
  }
  const AdapterLayout& layout = *record->layout;
  AdapterSnapshot out;
  out.config = record->config;
  out.targets = layout.targets;
  out.version = record->weights->version();
  out.stored_dtype = record->stored_dtype;
  out.weights = layout.unflatten(master_values(*record).data());
  out.dropout_counter = record->dropout_counter;
  if (!record->train) return out;
  out.has_training_state = true;
  out.optimizer_steps = record->train->optimizer_steps();
  out.exp_avg = layout.unflatten(record->train->read("exp_avg").data());
  out.exp_avg_sq = layout.unflatten(record->train->read("exp_avg_sq").data());
  out.gradients = layout.unflatten(record->train->read("gradients").data());
  return out;
}

AdapterPtr Engine::Impl::restored_record(const std::string& name, const AdapterSnapshot& s) {
  auto layout = std::make_shared<const AdapterLayout>(AdapterLayout::make(s.targets, base->weights().config));
  auto record = new_record(name, s.config, layout, s.stored_dtype);
  std::vector<float> master = layout->flatten(s.weights);
  record->weights = core->pool.add(layout, master.data(), s.version);
  record->dropout_counter = s.dropout_counter;
  if (s.has_training_state) {
    record->train = new_train_state(*record, master.data());
    record->train->restore(master.data(), layout->flatten(s.exp_avg).data(), layout->flatten(s.exp_avg_sq).data(),
                           layout->flatten(s.gradients).data(), s.optimizer_steps);
  } else if (core->ops->compute_dtype() != DType::f32 && core->ops->compute_dtype() != s.stored_dtype) {
    record->exact = std::move(master);
  }
  return record;
}

// ---------------------------------------------------------------- facade

void Engine::add_adapter(const std::string& name, const std::filesystem::path& peft_folder) {
  {
    std::lock_guard guard(impl_->front);
    impl_->require_new_name(name);
  }
  PeftAdapter peft = load_peft_folder(peft_folder, impl_->base->weights().config, impl_->options.max_lora_rank);
  // PEFT stores a copy of lm_head when it is adapted and puts it over the base's when it loads: it must be the same.
  for (const BaseCopy& copy : peft.base_copies) check_base_copy(copy, impl_->base->weights().host.lm_head.front().w);
  impl_->add_adapter(name, std::move(peft.config), std::move(peft.targets), peft.weights, peft.stored_dtype);
}

void Engine::add_adapter(const std::string& name, const LoraConfig& config) {
  {
    std::lock_guard guard(impl_->front);
    impl_->require_new_name(name);
  }
  std::vector<LoraTarget> targets = resolve_lora_config(config, impl_->base->weights().config, impl_->options.max_lora_rank);
  const LoraWeights weights = initial_lora_weights(config, targets);
  impl_->add_adapter(name, config, std::move(targets), weights, DType::f32);
}

void Engine::clone_adapter(const std::string& src, const std::string& dst) {
  std::lock_guard step_guard(impl_->step_lock);
  AdapterPtr source;
  {
    std::lock_guard guard(impl_->front);
    source = impl_->find_named(src, "[clone_adapter] src");
    impl_->require_new_name(dst);
  }
  const bool trained = source->train != nullptr;
  auto record = impl_->new_record(dst, source->config, source->layout, trained ? DType::f32 : source->stored_dtype);
  record->weights = impl_->core->pool.copy(source->weights, source->weights->version());
  if (impl_->core->ops->compute_dtype() != DType::f32 && (trained || !source->exact.empty()))
    record->exact = impl_->master_values(*source);
  impl_->register_adapter(record);
}

void Engine::remove_adapter(const std::string& name) {
  std::lock_guard guard(impl_->front);
  AdapterPtr record = impl_->find_named(name, "[remove_adapter] name");
  impl_->registry.erase(name);
  impl_->inbox.push_back(
      RemoveCommand{std::move(record)});  // the pool is given back at the next step, also with nothing else to do
}

void Engine::save_adapter(const std::string& name, const std::filesystem::path& folder) const {
  PeftAdapter peft;
  {
    std::lock_guard step_guard(impl_->step_lock);
    AdapterPtr record;
    {
      std::lock_guard guard(impl_->front);
      record = impl_->find_named(name, "[save_adapter] name");
    }
    peft.config = record->config;
    peft.targets = record->layout->targets;
    peft.weights = record->layout->unflatten(impl_->master_values(*record).data());
    peft.stored_dtype = record->train ? DType::f32 : record->stored_dtype;  // trained: keep what the master weights have learned
  }
  save_peft_folder(folder, peft, "");
}

std::string Engine::export_adapter(const std::string& name) const {
  std::lock_guard step_guard(impl_->step_lock);
  return snapshot_bytes(impl_->snapshot(name));
}

void Engine::import_adapter(const std::string& name, const std::string& bytes) {
  const AdapterSnapshot snapshot =
      parse_snapshot(bytes, "[import_adapter] bytes", impl_->base->weights().config, impl_->options.max_lora_rank);
  std::lock_guard step_guard(impl_->step_lock);
  {
    std::lock_guard guard(impl_->front);
    impl_->require_new_name(name);
  }
  impl_->register_adapter(impl_->restored_record(name, snapshot));
}

std::vector<AdapterInfo> Engine::adapters() const {
  std::lock_guard step_guard(impl_->step_lock);
  std::lock_guard guard(impl_->front);
  impl_->require_usable();
  std::vector<AdapterInfo> list;
  for (const auto& [name, record] : impl_->registry) {
    AdapterInfo info;
    info.name = name;
    info.version = record->weights->version();
    info.config = record->config;
    info.parameters = record->layout->parameters();
    info.bytes = static_cast<int64_t>(record->layout->pool_bytes(impl_->core->ops->compute_dtype()));
    info.resident = record->weights->resident();
    info.training = record->train != nullptr;
    info.requests = record->live_requests;
    list.push_back(std::move(info));
  }
  return list;
}

AdapterInfo Engine::adapter(const std::string& name) const {
  for (AdapterInfo& info : adapters()) {
    if (info.name == name) return info;
  }
  throw NotFound(concat("[engine] adapter \"", name, "\": expected the name of an adapter of this engine, there is none"));
}

std::vector<NamedTensor> Engine::adapter_state(const std::string& name, const std::string& what) const {
  require(what == "weights" || what == "master" || what == "gradients" || what == "exp_avg" || what == "exp_avg_sq",
          "[adapter_state] what: expected \"weights\", \"master\", \"gradients\", \"exp_avg\" or \"exp_avg_sq\", got \"", what,
          "\"");
  std::lock_guard step_guard(impl_->step_lock);
  AdapterPtr record;
  {
    std::lock_guard guard(impl_->front);
    record = impl_->find_named(name, "[adapter_state] name");
  }
  if (what == "weights") return named(*record->layout, impl_->core->pool.read(*record->weights));
  if (what == "master") return named(*record->layout, impl_->master_values(*record));
  require(record->train != nullptr, "[adapter_state] adapter \"", name,
          "\": expected one in training, it has no training state yet");
  return named(*record->layout, record->train->read(what));
}

void Engine::save_checkpoint(const std::filesystem::path& folder) const {
  std::map<std::string, std::string> files;
  {
    std::lock_guard step_guard(impl_->step_lock);
    std::vector<std::string> names;
    {
      std::lock_guard guard(impl_->front);
      impl_->require_usable();
      for (const auto& [name, record] : impl_->registry) names.push_back(name);
    }
    nlohmann::json manifest = {
        {"format", "loquetier-checkpoint"}, {"format_version", kCheckpointFormat}, {"adapters", nlohmann::json::array()}};
    for (size_t i = 0; i < names.size(); ++i) {
      const std::string file = concat("adapter-", i, ".safetensors");
      files.emplace(file, snapshot_bytes(impl_->snapshot(names[i])));
      manifest["adapters"].push_back({{"name", names[i]}, {"file", file}});
    }
    files.emplace("checkpoint.json", manifest.dump(2));
  }
  write_folder_atomically(folder, files);
}

void Engine::load_checkpoint(const std::filesystem::path& folder) {
  const std::filesystem::path manifest_path = folder / "checkpoint.json";
  const nlohmann::json manifest = nlohmann::json::parse(read_text_file(manifest_path), nullptr, false);
  auto check = [&](bool ok, const char* what) {
    require<FormatError>(ok, "[load_checkpoint] ", manifest_path.string(), ": ", what);
  };
  check(manifest.is_object() && manifest.contains("format") && manifest["format"] == "loquetier-checkpoint",
        "expected a checkpoint's list of adapters");
  check(manifest.contains("format_version") && manifest["format_version"] == kCheckpointFormat, "expected format_version 1");
  check(manifest.contains("adapters") && manifest["adapters"].is_array(), "expected a list \"adapters\"");
  std::vector<std::pair<std::string, AdapterSnapshot>> snapshots;
  for (const auto& entry : manifest["adapters"]) {
    check(entry.is_object() && entry.contains("name") && entry["name"].is_string() && entry.contains("file") &&
              entry["file"].is_string(),
          "expected adapters with \"name\" and \"file\"");
    const std::filesystem::path file = entry["file"].get<std::string>();
    check(!file.empty() && file == file.filename() && file != ".." && file != ".", "expected file names without folders");
    const MappedFile mapped(folder / file);
    snapshots.emplace_back(entry["name"].get<std::string>(),
                           parse_snapshot({reinterpret_cast<const char*>(mapped.data()), mapped.size()}, (folder / file).string(),
                                          impl_->base->weights().config, impl_->options.max_lora_rank));
  }
  std::lock_guard step_guard(impl_->step_lock);
  {
    std::lock_guard guard(impl_->front);
    for (size_t i = 0; i < snapshots.size(); ++i) {
      impl_->require_new_name(snapshots[i].first);
      for (size_t j = 0; j < i; ++j) check(snapshots[i].first != snapshots[j].first, "expected distinct adapter names");
    }
  }
  std::vector<AdapterPtr> records;  // all of them are made before the first is registered: all or nothing
  for (const auto& [name, snapshot] : snapshots) records.push_back(impl_->restored_record(name, snapshot));
  for (const AdapterPtr& record : records) impl_->register_adapter(record);
}

}  // namespace loquetier
