// Serves one LoRA adapter while it fine-tunes another, in the same steps:
//   serve_and_train <Hugging Face model folder> <PEFT adapter folder> [training steps]
// Prompts and examples are made-up token ids; a real program gets them from its tokenizer.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "loquetier/engine.h"

namespace {

// The ids 1, 1 + stride, 1 + 2 stride, … below the vocabulary's size.
std::vector<int32_t> made_up_ids(int count, int stride, int64_t vocab_size) {
  std::vector<int32_t> ids;
  for (int i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>((1 + static_cast<int64_t>(i) * stride) % vocab_size));
  return ids;
}

int run(const std::string& model_folder, const std::string& adapter_folder, int training_steps) {
  loquetier::EngineOptions options;
  options.kv_cache_tokens = 4096;
  loquetier::Engine engine(model_folder, options);
  const int64_t vocab_size = engine.base_model().vocab_size();

  engine.add_adapter("served", adapter_folder);
  loquetier::LoraConfig fresh;
  fresh.r = 8;
  fresh.lora_alpha = 16;
  engine.add_adapter("trained", fresh);

  loquetier::SamplingParams greedy;
  greedy.temperature = 0;
  greedy.max_tokens = 8;
  greedy.ignore_eos = true;
  for (const std::string adapter : {"served", "trained", ""}) {  // "" is the base model
    loquetier::InferOptions request;
    request.adapter = adapter;
    request.sampling = greedy;
    engine.submit_infer(made_up_ids(12, 3, vocab_size), request);
  }

  loquetier::TrainOptions update;
  update.optimizer = loquetier::AdamW{};
  update.optimizer->lr = 1e-2;
  for (int i = 0; i < training_steps; ++i) {
    loquetier::Example example;
    example.input_ids = made_up_ids(24, 7, vocab_size);
    engine.submit_train("trained", {example}, update);
  }

  double first_loss = 0, last_loss = 0;
  int updates = 0;
  while (engine.has_work()) {
    const loquetier::StepResult result = engine.step();
    for (const loquetier::InferResult& r : result.finished) {
      std::printf("request %lld (%s):", static_cast<long long>(r.request_id), r.adapter.empty() ? "base" : r.adapter.c_str());
      for (const int32_t token : r.token_ids) std::printf(" %d", token);
      std::printf("\n");
    }
    for (const loquetier::TrainResult& r : result.trained) {
      if (!r.applied) throw loquetier::Error("update not applied: " + r.reason);
      if (updates++ == 0) first_loss = r.loss;
      last_loss = r.loss;
      std::printf("%s version %lld: loss %.4f\n", r.adapter.c_str(), static_cast<long long>(r.version), r.loss);
    }
  }
  std::printf("%d updates, loss %.4f -> %.4f\n", updates, first_loss, last_loss);
  return updates == training_steps && (updates < 2 || last_loss < first_loss) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: %s <model folder> <adapter folder> [training steps]\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2], argc > 3 ? std::atoi(argv[3]) : 5);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
