#!/usr/bin/env python3
"""Makes the demo's base model and its ready-made adapters, from nothing: no data and no weights are downloaded.

    python tools/make_demo_model.py                     # into python/loquetier_core/demo, a few minutes on 2 cores
    python tools/make_demo_model.py --out /some/folder  # elsewhere
    python tools/make_demo_model.py --rehearse 3        # train the demo's live adapters with PEFT, 3 seeds each; writes nothing

The base is a Llama-family checkpoint in Hugging Face format (`model/`): grouped-query attention, a character-level
tokenizer, bfloat16 weights; it learns the `BASE_TASKS` of `demo/tasks.py`. The adapters are PEFT folders
(`adapters/<task>/`), trained on the `SERVED_TASKS`. Accuracies are exact match of greedy answers on held-out words,
measured at the end with the files as written and put into `model/demo_model_card.json` and `model/README.md`.

Needs torch, transformers, peft, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

DEMO = Path(__file__).resolve().parents[1] / "python" / "loquetier_core" / "demo"


def load_tasks():
    """`demo/tasks.py` as a module, without importing the package (which needs the native library)."""
    spec = importlib.util.spec_from_file_location("demo_tasks", DEMO / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tasks = load_tasks()

SPECIAL = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2
PAD, BOS, EOS = range(3)
BASE_NAME = "loquetier-core-demo"  # written into the adapters as the name of their base
SERVED_DTYPES = {"shout": torch.bfloat16}  # float32 where not named: folders in the wild come in both
LONGEST_ANSWER = 2 * tasks.MAX_LENGTH + 1  # tokens, end of sequence included; room for every task


# ---------------------------------------------------------------- tokenizer and data


def make_tokenizer() -> Tokenizer:
    """One token per printable ASCII character (a BPE without merges); `<s>` in front of every text."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, " ", *tasks.PRINTABLE])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def encode(tokenizer: Tokenizer, task, word: str) -> tuple[list[int], list[int]]:
    """(prompt ids with `<s>`, answer ids with `</s>`)."""
    answer = tokenizer.encode(task.answer(word), add_special_tokens=False).ids
    return tokenizer.encode(task.prompt(word)).ids, [*answer, EOS]


def make_batch(tokenizer: Tokenizer, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """(task, word) pairs to input ids and labels, both [B, longest]; the loss is on the answers only."""
    examples = [encode(tokenizer, task, word) for task, word in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), longest), PAD)
    labels = torch.full((len(examples), longest), -100)
    for row, (prompt, answer) in enumerate(examples):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


# ---------------------------------------------------------------- training and measuring


def train_step(model, optimizer, ids, labels) -> float:
    """One AdamW step on one mini-batch, gradients clipped to norm 1. Padding stands behind the answers, so causality masks it."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = causal_lm.model(input_ids=ids).last_hidden_state[:, :-1]  # [B, longest - 1, H]
    targets = labels[:, 1:]
    keep = targets != -100  # the head runs on rows with a target only
    loss = torch.nn.functional.cross_entropy(causal_lm.lm_head(hidden[keep]), targets[keep])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def exact_match(model, tokenizer: Tokenizer, task, words: list[str]) -> float:
    """Share of words whose greedy answer, up to and including `</s>`, is right."""
    model.eval()
    same_length = defaultdict(list)  # so that no prompt of a batch needs padding
    for word in words:
        same_length[len(word)].append(word)
    right = 0
    for group in same_length.values():
        encoded = [encode(tokenizer, task, word) for word in group]
        prompts = torch.tensor([prompt for prompt, _ in encoded])
        output = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=LONGEST_ANSWER
        )
        for row, (prompt, answer) in zip(output.tolist(), encoded, strict=True):
            right += row[len(prompt) : len(prompt) + len(answer)] == answer
    model.train()
    return right / len(words)


def pretrain(tokenizer: Tokenizer, args) -> LlamaForCausalLM:
    """A base model trained from random weights on the base tasks (and on copying words of any printable character)."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    letters = tasks.words(f"base {args.seed}", held_out=False)
    printable = tasks.words(f"base {args.seed}", held_out=False, alphabet=tasks.PRINTABLE)
    sources = [(task, letters) for task in tasks.BASE_TASKS] + [(tasks.BASE_TASKS[0], printable)]
    started, tokens = time.perf_counter(), 0
    for step in range(args.steps):
        done = step / args.steps
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.95 * max(0.0, 2 * done - 1))
        pairs = [(task, next(source)) for task, source in itertools.islice(itertools.cycle(sources), 128)]
        ids, labels = make_batch(tokenizer, pairs)
        loss = train_step(model, optimizer, ids, labels)
        tokens += int((ids != PAD).sum())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(
                f"  step {step + 1}/{args.steps}  loss {loss:.4f}  {seconds:.0f} s  {tokens / seconds:.0f} tokens/s",
                flush=True,
            )
    return model


def train_adapter(base_folder: Path, tokenizer: Tokenizer, recipe, seed: int) -> PeftModel:
    """A PEFT LoRA adapter for one task, on the base as written to disk (its bfloat16 weights widened to float32)."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    base.config.name_or_path = base.name_or_path = BASE_NAME
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.lora_alpha,
        target_modules=list(recipe.target_modules),
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_NAME,
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    words = tasks.words(f"{recipe.task.name} {seed}", held_out=False)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = tasks.learning_rate(step, recipe)
        ids, labels = make_batch(tokenizer, [(recipe.task, next(words)) for _ in range(recipe.batch)])
        train_step(model, optimizer, ids, labels)
    return model


# ---------------------------------------------------------------- files


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json."""
    folder.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    text = tasks.BASE_TASKS[0].prompt("kdvma!")
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text).ids
    if loaded(text)["input_ids"] != ids or loaded.decode(ids, skip_special_tokens=True) != text:
        raise SystemExit("AutoTokenizer does not read the tokenizer as it was made")


def write_adapter(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT saves them."""
    model.to(dtype).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE_NAME  # never the path of the machine that made it
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set: without this the file differs each time
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure(out: Path, tokenizer: Tokenizer, args) -> dict:
    """Accuracies on held-out words of the files as written."""
    words = tasks.distinct_words("card", args.held_out, held_out=True)
    base = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    live = tuple(recipe.task for recipe in tasks.LIVE_RECIPES)
    groups = {"base": tasks.BASE_TASKS, "served": tasks.SERVED_TASKS, "live": live}
    card = {
        "parameters": sum(p.numel() for p in base.parameters()),
        "seed": args.seed,
        "pretraining_steps": args.steps,
        "held_out_words": len(words),
        # of a guesser who knows the task and the word's length, but not its letters
        "chance": sum(26.0 ** -len(word) for word in words) / len(words),
        "base_accuracy": {
            kind: {task.name: exact_match(base, tokenizer, task, words) for task in group} for kind, group in groups.items()
        },
        "adapter_accuracy": {},
    }
    for recipe in tasks.SERVED_RECIPES:
        name = recipe.task.name
        base = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, out / "adapters" / name)
        card["adapter_accuracy"][name] = exact_match(model, tokenizer, recipe.task, words)
    return card


def write_card(card: dict, folder: Path) -> None:
    """demo_model_card.json, and the same as a page to read."""
    (folder / "demo_model_card.json").write_text(json.dumps(card, indent=2) + "\n")
    rows = []
    for kind, accuracies in card["base_accuracy"].items():
        for name, accuracy in accuracies.items():
            tuned = card["adapter_accuracy"].get(name)
            rows.append(f"| {kind} | {name} | {accuracy:.1%} | {'' if tuned is None else f'{tuned:.1%}'} |")
    table = "\n".join(rows)
    example = tasks.BASE_TASKS[1]
    (folder / "README.md").write_text(
        f"""# The demo's model

Written by `tools/make_demo_model.py`; do not edit. A Llama-family model of {card["parameters"]:,} parameters (bfloat16,
grouped-query attention, one token per character), trained from random weights on lines such as
`{example.prompt("kdvma")}{example.answer("kdvma")}`.

Exact match of greedy answers on {card["held_out_words"]} held-out words, which nothing was ever trained on. Chance, for a
guesser who knows the task and the word's length, is {card["chance"]:.1e}.

| kind | task | base model | its ready-made adapter |
|---|---|---|---|
{table}

*base*: the base model was trained on it. *served*: an adapter in `../adapters` does it. *live*: the demo trains an adapter for it.
"""
    )


def make(args) -> None:
    started = time.perf_counter()
    out: Path = args.out
    tokenizer = make_tokenizer()
    print(f"base model: {', '.join(task.name for task in tasks.BASE_TASKS)}", flush=True)
    base = pretrain(tokenizer, args)
    for name in ("model", "adapters"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_model(base, tokenizer, out / "model")
    for recipe in tasks.SERVED_RECIPES:
        name = recipe.task.name
        print(f"adapter {name}: rank {recipe.r} on {', '.join(recipe.target_modules)}, {recipe.steps} steps", flush=True)
        model = train_adapter(out / "model", tokenizer, recipe, args.seed)
        write_adapter(model, out / "adapters" / name, SERVED_DTYPES.get(name, torch.float32))

    print("measuring the files as written", flush=True)
    card = measure(out, tokenizer, args)
    write_card(card, out / "model")
    print(json.dumps(card, indent=2))
    for path in sorted(p for name in ("model", "adapters") for p in (out / name).rglob("*") if p.is_file()):
        print(f"{path.stat().st_size:>9,} bytes  {path.relative_to(out)}")
    print(f"done in {time.perf_counter() - started:.0f} s")


def rehearse(args) -> None:
    """The demo's live training, with PEFT: do the recipes reach 95 % for every seed, and how long does it take?"""
    tokenizer = make_tokenizer()
    words = tasks.distinct_words("rehearsal", args.held_out, held_out=True)
    base = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    for recipe in tasks.LIVE_RECIPES:
        before = exact_match(base, tokenizer, recipe.task, words)
        for seed in range(args.rehearse):
            started = time.perf_counter()
            model = train_adapter(args.out / "model", tokenizer, recipe, seed)
            seconds = time.perf_counter() - started
            after = exact_match(model, tokenizer, recipe.task, words)
            print(
                f"{recipe.task.name:8} seed {seed}  before {before:6.1%}  after {after:6.1%}  "
                f"{recipe.steps} steps of {recipe.batch}, {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder that gets model/ and adapters/ (replaced)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="pre-training steps")
    parser.add_argument("--held-out", type=int, default=500, help="held-out words per measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rehearse", type=int, default=0, metavar="SEEDS", help="only try the demo's live training with PEFT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    rehearse(args) if args.rehearse else make(args)


if __name__ == "__main__":
    main()
