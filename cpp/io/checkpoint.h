// The bytes of a live adapter: everything export_adapter() moves and save_checkpoint() stores. One safetensors file whose metadata
// holds the configuration, the version, the step count and a format number; tensors by PEFT key with a prefix ("master.",
// "exp_avg.", "exp_avg_sq.", "gradients.").
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/peft_folder.h"

namespace loquetier {

struct AdapterSnapshot {
  LoraConfig config;
  std::vector<LoraTarget> targets;
  int64_t version = 0;
  DType stored_dtype = DType::f32;  // of the PEFT file it came from
  LoraWeights weights;              // master values, f32
  bool has_training_state = false;
  int64_t optimizer_steps = 0;                 // Adam's t
  uint64_t dropout_counter = 0;                // examples seen so far: the key of the next dropout mask
  LoraWeights exp_avg, exp_avg_sq, gradients;  // when has_training_state
};

std::string snapshot_bytes(const AdapterSnapshot& snapshot);
// FormatError naming what is wrong; checked against the model as a PEFT folder is.
AdapterSnapshot parse_snapshot(std::string_view bytes, const std::string& where, const ModelConfig& model, int max_rank);

}  // namespace loquetier
