"""Serving beside transformers + PEFT: mixed decode over 8 adapters, prefill with 1 and 4 adapters, what LoRA costs over the base.

    python benchmarks/serve.py --out benchmarks/results/serve.json

Decode: 16 sequences of 128 prompt tokens, two per adapter, greedy; only the decode steps are timed. Prefill: 4 prompts of 512
tokens in one batch, one token each. PEFT answers mixed batches with `adapter_names` and keeps its KV cache; its base figures are
the plain transformers model without PEFT's wrappers. Read next: _common.py.
"""

from __future__ import annotations

import time

import _common as common

SEQUENCES, PROMPT, DECODE_STEPS = 16, 128, 24
PREFILL_PROMPTS, PREFILL_LENGTH = 4, 512


def worker_peft(args) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    imported = common.memory_mb("VmRSS")
    vocab = common.SHAPES[args.shape]["vocab_size"]
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.float32).eval()
    timings = common.Timings()
    prompts = torch.tensor(common.random_ids(SEQUENCES, PROMPT, vocab, 1))  # [16, 128]
    chunk = torch.tensor(common.random_ids(PREFILL_PROMPTS, PREFILL_LENGTH, vocab, 2))  # [4, 512]

    @torch.inference_mode()
    def decode(network, **extra) -> float:
        out = network(input_ids=prompts, use_cache=True, logits_to_keep=1, **extra)
        start = time.perf_counter()
        for _ in range(DECODE_STEPS):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = network(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **extra)
        return time.perf_counter() - start

    @torch.inference_mode()
    def prefill(network, **extra) -> None:
        network(input_ids=chunk, use_cache=True, logits_to_keep=1, **extra).logits.argmax(-1)

    timings.measure(args.repeats, [("decode base", lambda: decode(model)), ("prefill base", lambda: prefill(model))])
    tuned = PeftModel.from_pretrained(model, args.folder / "adapter0", adapter_name="adapter0")
    for i in range(1, common.ADAPTERS):
        tuned.load_adapter(args.folder / f"adapter{i}", adapter_name=f"adapter{i}")
    tuned.eval()
    names = [f"adapter{i % common.ADAPTERS}" for i in range(SEQUENCES)]
    cases = [
        ("decode 8 adapters", lambda: decode(tuned, adapter_names=names)),
        ("prefill 1 adapter", lambda: prefill(tuned, adapter_names=["adapter0"] * PREFILL_PROMPTS)),
        ("prefill 4 adapters", lambda: prefill(tuned, adapter_names=names[:PREFILL_PROMPTS])),
    ]
    timings.measure(args.repeats, cases)
    common.finish_worker(timings, imported_mb=imported)


def worker_loquetier(args) -> None:
    import loquetier_core as lq

    imported = common.memory_mb("VmRSS")
    vocab = common.SHAPES[args.shape]["vocab_size"]
    engine = lq.Engine(
        args.folder / "model", device=args.device, num_threads=args.threads, prefix_caching=False, kv_cache_tokens=8192,
        max_batch_tokens=PREFILL_PROMPTS * PREFILL_LENGTH,
    )  # fmt: skip
    for i in range(common.ADAPTERS):
        engine.add_adapter(f"adapter{i}", args.folder / f"adapter{i}")
    timings = common.Timings()
    prompts = common.random_ids(SEQUENCES, PROMPT, vocab, 1)
    chunk = common.random_ids(PREFILL_PROMPTS, PREFILL_LENGTH, vocab, 2)

    def decode(adapters) -> float:
        sampling = lq.SamplingParams(temperature=0, max_tokens=DECODE_STEPS + 1, ignore_eos=True)
        started = set()
        for prompt, name in zip(prompts, adapters, strict=True):
            engine.submit_infer(prompt, adapter=name, sampling=sampling)
        while len(started) < SEQUENCES:
            started.update(token.request_id for token in engine.step().tokens)
        tokens, start = 0, time.perf_counter()
        while engine.has_work():
            tokens += len(engine.step().tokens)
        seconds = time.perf_counter() - start
        if tokens != DECODE_STEPS * SEQUENCES:
            raise RuntimeError(f"decode: expected {DECODE_STEPS * SEQUENCES} timed tokens, got {tokens}")
        return seconds

    def prefill(adapters) -> None:
        sampling = lq.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        for prompt, name in zip(chunk, adapters, strict=True):
            engine.submit_infer(prompt, adapter=name, sampling=sampling)
        while engine.has_work():
            engine.step()

    names = [f"adapter{i % common.ADAPTERS}" for i in range(SEQUENCES)]
    cases = [
        ("decode base", lambda: decode([None] * SEQUENCES)),
        ("decode 8 adapters", lambda: decode(names)),
        ("prefill base", lambda: prefill([None] * PREFILL_PROMPTS)),
        ("prefill 1 adapter", lambda: prefill(["adapter0"] * PREFILL_PROMPTS)),
        ("prefill 4 adapters", lambda: prefill(names[:PREFILL_PROMPTS])),
    ]
    timings.measure(args.repeats, cases)
    common.finish_worker(timings, imported_mb=imported)


def summarise(results):
    def rate(name, amount):
        return {side: common.median_rate(result, name, amount) for side, result in results.items()}

    def overhead(with_adapters, base):
        return {side: common.overhead_percent(result, with_adapters, base) for side, result in results.items()}

    decoded, prefilled = SEQUENCES * DECODE_STEPS, PREFILL_PROMPTS * PREFILL_LENGTH
    return [
        ("decode, 16 sequences over 8 adapters", "tok/s", rate("decode 8 adapters", decoded), (">=", 3)),
        ("decode, 16 sequences, base", "tok/s", rate("decode base", decoded), None),
        ("prefill 2048 tokens, 1 adapter", "tok/s", rate("prefill 1 adapter", prefilled), None),
        ("prefill 2048 tokens, 4 adapters", "tok/s", rate("prefill 4 adapters", prefilled), None),
        ("prefill 2048 tokens, base", "tok/s", rate("prefill base", prefilled), None),
        ("LoRA over base, decode (<= 15 wanted)", "%", overhead("decode 8 adapters", "decode base"), None),
        ("LoRA over base, prefill, 1 adapter (<= 15 wanted)", "%", overhead("prefill 1 adapter", "prefill base"), None),
        ("LoRA over base, prefill, 4 adapters (<= 15 wanted)", "%", overhead("prefill 4 adapters", "prefill base"), None),
        ("peak memory of the process", "MiB", {side: result["peak_mb"] for side, result in results.items()}, None),
    ]


if __name__ == "__main__":
    arguments = common.parse_args(__doc__)
    if arguments.worker:
        {"peft": worker_peft, "loquetier": worker_loquetier}[arguments.worker](arguments)
    else:
        settings = dict(sequences=SEQUENCES, prompt=PROMPT, decode_steps=DECODE_STEPS, prefill=[PREFILL_PROMPTS, PREFILL_LENGTH])
        common.run_benchmark(__file__, arguments, summarise, settings)
