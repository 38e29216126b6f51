"""A whole model of Llama-3-8B shape on one GPU: training, decode, prefill and mixed steps of the engine.

    python benchmarks/model.py --out benchmarks/results/model.json         # every case
    python benchmarks/model.py --cases train,decode --profile              # some, with the kernels' times
    python benchmarks/model.py --cases train --first --kv-tokens 4096 --pool-gib 0.25    # memory in use
    python benchmarks/model.py --cases latency --tpot-ms 30                # training beside live decodes under a target
    python benchmarks/model.py --side peft                                 # transformers + PEFT on the same GPU

Random bf16 weights; rank 16 on all seven linears. A case is a few warm steps, then the median of the measured ones (wall time of
step() calls, which end when the results are on the host). Ceilings (copy bandwidth, a large product) are measured by torch in the
same process before the engine is made. `--profile` needs torch's profiler and prints the kernels of one step per case. Read next:
kernels.cu for the LoRA kernels alone; serve.py and train.py for the CPU beside transformers + PEFT.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import threading
import time
from pathlib import Path

import _common as common

LLAMA_8B = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False, hidden_act="silu", torch_dtype="bfloat16",
    bos_token_id=128000, eos_token_id=128001,
)  # fmt: skip
SHAPES = {
    "llama-3-8b": LLAMA_8B,
    "small": dict(LLAMA_8B, vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                  num_attention_heads=8, num_key_value_heads=4, head_dim=64),
}  # fmt: skip
RANK = 16
ADAPTERS = 64
CASES = ("train", "decode", "prefill", "mixed", "graphs", "latency")


def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight of a Llama."""
    hidden, feed, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "lm_head.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (feed, hidden), "mlp.up_proj": (feed, hidden),
            "mlp.down_proj": (hidden, feed),
        }.items():  # fmt: skip
            shapes[layer + name + ".weight"] = shape
        shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def random_weights(config: dict, generator_device: str):
    """Views of one random block at different places: a whole model's values without a whole model's time to draw them."""
    import torch

    shapes = weight_shapes(config)
    largest = max(torch.Size(s).numel() for s in shapes.values())
    block = torch.empty(largest + (1 << 20), dtype=torch.bfloat16, device=generator_device).normal_(0, 0.02).cpu()
    if generator_device == "cuda":
        torch.cuda.empty_cache()
    ones = torch.ones(config["hidden_size"], dtype=torch.bfloat16)
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        offset = i * 4096 % (1 << 20)
        weights[name] = ones if len(shape) == 1 else block[offset : offset + torch.Size(shape).numel()].view(shape)
    return weights


def ceilings() -> dict:
    """Copy bandwidth and a large bf16 product, medians."""
    import torch

    def seconds(run) -> float:
        times = []
        for i in range(13):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def product() -> float:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * 8192**3 / seconds(lambda: a @ b) / 1e12

    def copy() -> float:
        source = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16).normal_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9

    found = {"product_tflops": product(), "copy_gbs": copy()}
    torch.cuda.empty_cache()
    return found


def median_seconds(step, repeats: int, warm: int = 2) -> float:
    """Of one call, after the warm ones."""
    times = []
    for i in range(warm + repeats):
        begin = time.perf_counter()
        step()
        if i >= warm:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


class Bench:
    def __init__(self, args) -> None:
        import loquetier_core as lq

        self.lq, self.args, self.config = lq, args, SHAPES[args.shape]
        self.figures: dict[str, float] = {}
        begin = time.perf_counter()
        model = lq.BaseModel.from_state_dict(self.config, random_weights(self.config, "cuda"))
        made = time.perf_counter()
        options = dict(
            kv_cache_tokens=args.kv_tokens, adapter_pool_bytes=int(args.pool_gib * 2**30), max_sequences=256, max_batch_tokens=8192
        )  # fmt: skip
        if args.tpot_ms:
            options["latency"] = lq.LatencyTarget(ttft_ms=1000, tpot_ms=args.tpot_ms)
        if args.trace:
            options["trace_path"] = str(args.trace)
        self.engine = lq.Engine(model, device="cuda", prefix_caching=False, **options)
        self.figures["engine_start_s"] = time.perf_counter() - made
        self.figures["weights_made_s"] = made - begin
        config = lq.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["all-linear"], init_lora_weights=False)
        self.engine.add_adapter("a0", config)
        for i in range(1, ADAPTERS):  # memory of their own; the values do not matter
            self.engine.clone_adapter("a0", f"a{i}")
        self.figures["adapters_made_s"] = time.perf_counter() - made - self.figures["engine_start_s"]

    @functools.cache  # noqa: B019 (lives as long as the process)
    def ids(self, length: int, seed: int):
        import numpy

        return numpy.array(common.random_ids(1, length, self.config["vocab_size"], seed)[0], numpy.int32)

    def note(self, name: str, value: float) -> None:
        self.figures[name] = value
        print(f"{name:44s} {value:12.3f}", flush=True)

    def profiled(self, name: str, run) -> None:
        """Prints where the GPU's time goes in run()."""
        if not self.args.profile:
            return
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            begin = time.perf_counter()
            run()
            wall = time.perf_counter() - begin
        rows = sorted(prof.key_averages(), key=lambda r: -r.device_time_total)
        total = sum(r.device_time_total for r in rows)
        print(f"--- {name}: {total / 1e3:.2f} ms of kernels, {wall * 1e3:.2f} ms of wall time", flush=True)
        for row in rows[: self.args.kernels]:
            print(f"{row.device_time_total / 1e3:9.3f} ms {row.count:6d} x  {row.key[:120]}")

    # ------------------------------------------------------------ training

    def train(self) -> None:
        shapes = ((1, 4, 2048), (1, 2, 4096), (4, 4, 2048), (16, 16, 512), (1, 16, 512))
        for adapters, sequences, length in shapes[: 1 if self.args.first else None]:

            def step(adapters=adapters, sequences=sequences, length=length) -> None:
                each = sequences // adapters
                for a in range(adapters):
                    examples = [self.lq.Example(input_ids=self.ids(length + 1, 100 * a + i)) for i in range(each)]
                    self.engine.submit_train(f"a{a}", examples, optimizer=self.lq.AdamW(lr=1e-4))
                trained = []
                while self.engine.has_work():
                    trained += self.engine.step().trained
                if [t.applied for t in trained] != [True] * adapters:
                    raise RuntimeError(f"train: expected {adapters} applied updates, got {trained}")

            name = f"train_{adapters}x_{sequences}x{length}"
            seconds = median_seconds(step, self.args.repeats)
            self.note(name + "_tok_s", sequences * length / seconds)
            self.profiled(name, step)
        self.note("memory_gib", self.memory_gib())

    def memory_gib(self) -> float:
        """Device memory in use, all of it (this process is alone on the GPU)."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    # ------------------------------------------------------------ serving

    def start_decodes(self, sequences: int, adapters: int, context: int, tokens: int, seed: int = 7, **options) -> None:
        """Live decodes at `context`, interleaved over the adapters; 0: base rows. Greedy unless `options` say otherwise."""
        sampling = self.lq.SamplingParams(**{"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **options})
        for i in range(sequences):
            adapter = f"a{i % adapters}" if adapters else None
            self.engine.submit_infer(self.ids(context, seed + i), adapter=adapter, sampling=sampling)
        waiting = sequences
        while waiting:
            waiting -= sum(t.index == 0 for t in self.engine.step().tokens)

    def drain(self) -> None:
        while self.engine.has_work():
            self.check(self.engine.step().finished)

    @staticmethod
    def check(finished) -> None:
        for result in finished:
            if result.finish_reason != "length":
                raise RuntimeError(f"expected every request to end by its length, got {result}")

    def decode(self) -> None:
        weights = sum(self.size(s) for n, s in weight_shapes(self.config).items() if "embed" not in n) * 2
        kv_row = 2 * 2 * self.config["num_hidden_layers"] * self.config["num_key_value_heads"] * self.config["head_dim"]
        adapter_bytes = self.engine.adapter("a0").bytes
        top_p = {"temperature": 0.8, "top_p": 0.9}
        greedy = ((64, 0, {}), (64, 1, {}), (64, 8, {}), (64, 64, {}), (16, 16, {}), (256, 8, {}))
        for sequences, adapters, options in (*greedy, (64, 8, top_p)):
            context = 512 if sequences <= 64 else 256
            steps = 8 + self.args.repeats * 10
            self.start_decodes(sequences, adapters, context, steps + 10, **options)
            times, host, ahead = [], [], self.engine.stats().steps_ahead
            for i in range(steps):
                before, begin = self.engine.stats().host_seconds, time.perf_counter()
                self.engine.step()
                if i >= 8:
                    times.append(time.perf_counter() - begin)
                    host.append(self.engine.stats().host_seconds - before)
            name = f"decode_{sequences}x{adapters}" + ("_top_p" if options else "")
            self.note(name + "_host_us", statistics.median(host) * 1e6)
            self.note(name + "_steps_ahead", (self.engine.stats().steps_ahead - ahead) / steps)  # its host time is hidden
            ms = statistics.median(times) * 1e3
            self.note(name + "_ms", ms)
            floor = weights + sequences * (context + steps / 2) * kv_row + adapters * adapter_bytes
            self.note(name + "_over_bytes_floor", ms / (floor / self.figures["copy_gbs"] / 1e6))
            self.profiled(name, self.engine.step)
            self.drain()

    def graphs(self) -> None:
        """Decodes of every bucket of rows, without adapters, with one and with eight: how long recording their graphs takes."""
        before = self.engine.stats()
        for sequences in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
            for adapters in (0, 1, 8):
                self.start_decodes(sequences, adapters, 16, 6)
                self.drain()
        after = self.engine.stats()
        self.note("graphs_recorded", after.graph_captures - before.graph_captures)
        self.note("graphs_recorded_s", after.graph_seconds - before.graph_seconds)

    @staticmethod
    def size(shape) -> int:
        product = 1
        for n in shape:
            product *= n
        return product

    def prefill(self) -> None:
        for adapters in (0, 1, 4, 16):

            def step(adapters=adapters) -> None:
                for i in range(16):
                    adapter = f"a{i * adapters // 16}" if adapters else None
                    sampling = self.lq.SamplingParams(max_tokens=1, temperature=0)
                    self.engine.submit_infer(self.ids(512, 31 + i), adapter=adapter, sampling=sampling)
                self.drain()

            seconds = median_seconds(step, self.args.repeats)
            self.note(f"prefill_8192_{adapters}_ms", seconds * 1e3)
            self.profiled(f"prefill_{adapters}", step)

    def mixed(self) -> None:
        """Steps of 2,048 rows of an example alone and with 64 decodes beside them: forward (an evaluation), and the whole training
        step, backward and update included. In turn and after steps of the same kind, since a busy card lowers its clock."""

        def evaluate(decodes: int, i: int) -> None:
            self.engine.submit_eval("a1", [self.lq.Example(input_ids=self.ids(2048, i))])
            result = self.engine.step()
            if len(result.evaluated) != 1 or len(result.tokens) != decodes:
                raise RuntimeError(f"mixed: expected an evaluation and {decodes} tokens in one step, got {result}")

        def train(_: int, i: int) -> None:
            self.engine.submit_train("a1", [self.lq.Example(input_ids=self.ids(2049, i))], optimizer=self.lq.AdamW(lr=1e-4))
            while not self.engine.step().trained:
                pass

        for name, step, warm, over in (
            ("forward", evaluate, 10, "mixed_forward_over_alone"),
            ("train", train, 3, "mixed_over_training_alone"),
        ):
            samples: dict[int, list[float]] = {0: [], 64: []}
            for _ in range(3):
                for decodes, times in samples.items():
                    if decodes:
                        self.start_decodes(decodes, 8, 512, 24 + 4 * (warm + self.args.repeats))
                    for i in range(warm + self.args.repeats):
                        begin = time.perf_counter()
                        step(decodes, i)
                        if i >= warm:
                            times.append(time.perf_counter() - begin)
                    self.drain()
            ms = {decodes: statistics.median(times) * 1e3 for decodes, times in samples.items()}
            for decodes in ms:
                self.note(f"{name}_2048_with_{decodes}_decodes_ms", ms[decodes])
            self.note(over, ms[64] / ms[0])

    # ------------------------------------------------------------ training beside live decodes

    def submit_trainers(self, trainers: int, length: int = 2048, accumulate: int = 4) -> None:
        """One mini-batch of packed sequences with its update, for each trainer."""
        for a in range(trainers):
            examples = [self.lq.Example(input_ids=self.ids(length + 1, 50 * a + i)) for i in range(accumulate)]
            self.engine.submit_train(f"a{60 + a}", examples, optimizer=self.lq.AdamW(lr=1e-4))

    def latency(self) -> None:
        for trainers in (1, 4):
            rate = self.training_rate(trainers, seconds=4)
            self.note(f"latency_train_alone_{trainers}_tok_s", rate)
            for decodes in (32, 64):
                gaps, finished = [], []
                self.start_decodes(decodes, 8, 512, 300)
                last: dict[int, float] = {}
                begin, rows, queued, warm = None, 0, 0, 40
                while True:
                    while queued < 2 * trainers:
                        self.submit_trainers(trainers)
                        queued += trainers
                    result = self.engine.step()
                    now = time.perf_counter()
                    queued -= len(result.trained)
                    warm -= bool(result.tokens)
                    if warm == 0 and begin is None and result.tokens:
                        begin, rows = now, self.engine.stats().train_tokens
                    for token in result.tokens:
                        if begin is not None and token.request_id in last:
                            gaps.append(now - last[token.request_id])
                        last[token.request_id] = now
                    finished += result.finished
                    if finished:
                        break
                share = (self.engine.stats().train_tokens - rows) / (now - begin) / rate
                while self.engine.stats().running_requests:  # the others end within a few steps
                    finished += self.engine.step().finished
                self.check(finished)
                gaps.sort()
                tpots = sorted(r.tpot_seconds for r in finished)
                name = f"latency_{decodes}_decodes_{trainers}_trainers"
                self.note(name + "_tpot_p99_ms", 1e3 * tpots[int(len(tpots) * 0.99)])  # of requests: mean over their tokens
                self.note(name + "_between_tokens_p50_ms", 1e3 * gaps[len(gaps) // 2])
                self.note(name + "_between_tokens_p99_ms", 1e3 * gaps[int(len(gaps) * 0.99)])
                self.note(name + "_training_share", share)
                self.drain()
        stats = self.engine.stats()
        self.note("latency_prediction_error_median", stats.prediction_error_median)
        self.note("latency_prediction_error_p95", stats.prediction_error_p95)
        self.burst()

    def training_rate(self, trainers: int, seconds: float) -> float:
        """Rows of forward a second, a whole number of mini-batches in."""
        self.submit_trainers(trainers)
        self.drain()
        begin, rows = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            self.submit_trainers(trainers)
            self.drain()
            rows += trainers * 4 * 2048
        return rows / (time.perf_counter() - begin)

    def burst(self) -> None:
        """100 requests from another thread into training at full speed: how soon the first of them is in a forward pass."""
        self.submit_trainers(4)
        sampling = self.lq.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)

        def submit() -> None:
            time.sleep(0.5)
            for i in range(100):
                self.engine.submit_infer(self.ids(64, 900 + i), adapter=f"a{i % 8}", sampling=sampling)

        thread = threading.Thread(target=submit)
        thread.start()
        finished = []
        while self.engine.has_work() or thread.is_alive():
            finished += self.engine.step().finished
        thread.join()
        self.note("burst_first_forward_ms", 1e3 * min(finished, key=lambda r: r.request_id).queue_seconds)
        self.note("burst_ttft_p99_ms", 1e3 * sorted(r.ttft_seconds for r in finished)[98])


class Peft:
    """transformers + PEFT: training as installed and tuned by hand (bf16 adapters, cuDNN attention, head and loss in chunks), and
    decode steps of mixed adapters."""

    def __init__(self, args) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        self.torch, self.args, self.figures = torch, args, {}
        fields = {k: v for k, v in SHAPES[args.shape].items() if k not in ("model_type", "architectures", "torch_dtype")}
        config = LlamaConfig(**fields, dtype=torch.bfloat16, attn_implementation="sdpa")
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            base = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        self.lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        self.get = lambda tuned: get_peft_model(base, self.lora, adapter_name="a0", autocast_adapter_dtype=not tuned)
        self.base = base

    def note(self, name: str, value: float) -> None:
        self.figures[name] = value
        print(f"{name:44s} {value:12.3f}", flush=True)

    def train(self) -> None:
        torch = self.torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def chunked_loss(model, ids):
            hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            total = 0
            for at in range(0, len(targets), 2048):
                logits = torch.utils.checkpoint.checkpoint(
                    lambda h: self.base.lm_head(h).float(), hidden[at : at + 2048], use_reentrant=False
                )
                total = total + torch.nn.functional.cross_entropy(logits, targets[at : at + 2048], reduction="sum")
            return total / len(targets)

        for tuned in (True, False):
            model = self.get(tuned)
            model.train()
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
            for sequences, length in ((4, 2048), (2, 4096)):
                ids = torch.randint(0, self.base.config.vocab_size, (sequences, length), device="cuda")
                torch.cuda.reset_peak_memory_stats()

                def step(model=model, optimizer=optimizer, ids=ids, tuned=tuned) -> None:
                    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
                        loss = chunked_loss(model, ids) if tuned else model(input_ids=ids, labels=ids, use_cache=False).loss
                        loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    loss.item()

                seconds = median_seconds(step, self.args.repeats)
                name = f"peft_{'tuned' if tuned else 'installed'}_{sequences}x{length}"
                self.note(name + "_tok_s", sequences * length / seconds)
                self.note(name + "_memory_gib", torch.cuda.max_memory_reserved() / 2**30)
            model.unload()
            del optimizer, model
            torch.cuda.empty_cache()

    def decode(self) -> None:
        torch = self.torch
        from transformers import DynamicCache

        model = self.get(True)
        for i in range(1, 16):
            model.add_adapter(f"a{i}", self.lora)
        model.to(dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            for sequences, adapters in ((64, 1), (64, 8), (64, 16), (16, 16)):
                cache = DynamicCache()
                ids = torch.randint(0, self.base.config.vocab_size, (sequences, 512), device="cuda")
                names = [f"a{i % adapters}" for i in range(sequences)]
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

                def step(ids=ids, cache=cache, names=names) -> None:
                    out = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, adapter_names=names)
                    out.logits.argmax(-1).tolist()

                self.note(f"peft_decode_{sequences}x{adapters}_ms", median_seconds(step, self.args.repeats) * 1e3)
        model.unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--cases", default="train,decode,prefill,mixed,graphs", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kernels", type=int, default=24, help="rows of a profile")
    parser.add_argument("--side", choices=("loquetier", "peft"), default="loquetier")
    parser.add_argument("--tpot-ms", type=float, help="the engine's latency target, time per output token")
    parser.add_argument("--trace", type=Path, help="a Chrome trace of every step")
    parser.add_argument("--kv-tokens", type=int, default=80 * 1024)
    parser.add_argument("--pool-gib", type=float, default=7, help="of device memory for adapters")
    parser.add_argument("--first", action="store_true", help="of train, only the first shape: with the two above, for memory_gib")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")

    import torch

    found = ceilings()
    print(f"{torch.cuda.get_device_name()}: {found['product_tflops']:.0f} TFLOP/s, {found['copy_gbs']:.0f} GB/s", flush=True)
    bench = Bench(args) if args.side == "loquetier" else Peft(args)
    for name, value in {**found, **bench.figures}.items():
        bench.note(name, value)
    for case in cases:
        if args.side == "loquetier" or case in ("train", "decode"):
            getattr(bench, case)()
    if args.out:
        record = {
            "benchmark": "model", "commit": common.commit(), "gpu": torch.cuda.get_device_name(), "versions": common.versions(),
            "shape": SHAPES[args.shape], "settings": {"rank": RANK, "targets": "all-linear", "dtype": "bf16",
            "repeats": args.repeats}, "figures": bench.figures,
        }  # fmt: skip
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
