#include "plan/adapter_table.h"

#include <algorithm>

#include "core/check.h"

namespace loquetier {

AdapterTable::AdapterTable(int64_t pool_bytes) : pool_bytes_(pool_bytes) {
  PlannedAdapter& base = adapters_[-1];
  base.newest = &version_of(base, 0);
}

void AdapterTable::add(int64_t id, int64_t bytes, int64_t version) {
  require(id >= 0, "[planner] adapter: expected an id >= 0, got ", id);
  require(!adapters_.contains(id), "[planner] adapter: ", id, " is already there");
  require(bytes >= 0 && bytes <= pool_bytes_, "[planner] bytes of adapter ", id, ": expected 0 .. ", pool_bytes_,
          " (the pool), got ", bytes);
  PlannedAdapter& adapter = adapters_[id];
  adapter.id = id;
  adapter.bytes = bytes;
  adapter.newest = &version_of(adapter, version);
}

PlannedAdapter& AdapterTable::find(int64_t id, const char* caller) {
  const auto found = adapters_.find(id);
  require(found != adapters_.end(), "[planner] ", caller, ": expected a known adapter or -1, got ", id);
  return found->second;
}

PlannedAdapter& AdapterTable::find_open(int64_t id, const char* caller) {
  PlannedAdapter& adapter = find(id, caller);
  require(!adapter.removed, "[planner] ", caller, ": adapter ", id, " was removed");
  return adapter;
}

AdapterVersion& AdapterTable::version_of(PlannedAdapter& adapter, int64_t version) {
  for (const auto& v : adapter.versions) {
    if (v->version == version) return *v;
  }
  adapter.versions.push_back(std::make_unique<AdapterVersion>());
  AdapterVersion& v = *adapter.versions.back();
  v.adapter = &adapter;
  v.version = version;
  v.bytes = adapter.bytes;
  return v;
}

void AdapterTable::erase_if_unused(PlannedAdapter& adapter, const AdapterVersion& version) {
  if (version.holders > 0 || adapter.newest == &version) return;
  std::erase_if(adapter.versions, [&](const auto& v) { return v.get() == &version; });
}

void AdapterTable::set_version(PlannedAdapter& adapter, int64_t version) {
  const AdapterVersion* before = adapter.newest;
  adapter.newest = &version_of(adapter, version);
  ++adapter.epoch;
  erase_if_unused(adapter, *before);
}

void AdapterTable::remove(PlannedAdapter& adapter) {
  adapter.removed = true;
  ++adapter.epoch;
  if (adapter.users == 0) adapters_.erase(adapter.id);
}

AdapterVersion& AdapterTable::hold(PlannedAdapter& adapter, int64_t version) {
  AdapterVersion& v = version_of(adapter, version);
  ++v.holders;
  return v;
}

void AdapterTable::release(AdapterVersion& version) {
  --version.holders;
  erase_if_unused(*version.adapter, version);
}

void AdapterTable::drop_user(PlannedAdapter& adapter) {
  if (--adapter.users == 0 && adapter.removed) adapters_.erase(adapter.id);
}

void AdapterTable::check_invariants() const {
  for (const auto& [id, adapter] : adapters_) {
    require<std::logic_error>(adapter.id == id && adapter.users >= 0 && (adapter.users > 0 || !adapter.removed),
                              "[planner] adapter ", id, ": removed and without users, but kept");
    bool newest = false;
    for (const auto& v : adapter.versions) {
      newest |= v.get() == adapter.newest;
      require<std::logic_error>(v->adapter == &adapter && v->holders >= 0 && (v->holders > 0 || v.get() == adapter.newest),
                                "[planner] adapter ", id, " keeps version ", v->version, " without a holder");
    }
    require<std::logic_error>(newest, "[planner] adapter ", id, " has lost its newest version");
  }
}

}  // namespace loquetier
