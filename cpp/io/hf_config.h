// Hugging Face config.json -> ModelConfig. Honoured: both spellings of rope settings (rope_theta + rope_scaling, rope_parameters),
// head_dim, attention_bias, mlp_bias, tie_word_embeddings, eos_token_id as number or list, torch_dtype / dtype. Anything that would
// change the maths and is not supported is refused by its key (sliding windows in use, other activations, partial rotary, MoE,
// quantization, other rope types, …).
#pragma once

#include <filesystem>
#include <string>

#include "model/model_config.h"

namespace loquetier {

// `where` names the text in errors. Throws FormatError (not JSON, missing or absurd fields), InvalidArgument (unsupported, by key).
ModelConfig parse_hf_config(const std::string& json, const std::string& where);
// config.json of a folder, with eos_token_id of generation_config.json when that exists.
ModelConfig load_hf_config(const std::filesystem::path& folder);

}  // namespace loquetier
