"""transformers + PEFT's side of unified.py: one process that generates and trains in turns, as its users must.

Generation is a running batch over one KV cache: requests are admitted between steps (prefilled together, then joined to the
batch, left-padded), each row with the adapter of its own (`adapter_names`), ended rows are dropped and common padding is cut.
Training is a mini-batch at a time, padded to its longest example; while requests run, one mini-batch follows every `peft_turns`
generation steps, without requests it goes on all the time. Adapters in training are f32 (PEFT's default), those that only serve
have the model's dtype. Read next: _replay.py.
"""

from __future__ import annotations

import argparse
import time

import torch
from _replay import LEARNING_RATE, SHAPES, Clock, Prompts, TrainingData, new_records, warm_trace
from loquetier_core.sizing import metrics, workload
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

ADMITTED_TOKENS = 8192  # of a prefill, padding included: more wait for the next step


def joined(left: torch.Tensor, right: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of both, the shorter padded with zeros at the left of `dim`."""
    length = max(left.shape[dim], right.shape[dim])
    parts = []
    for part in (left, right):
        missing = length - part.shape[dim]
        if missing:
            shape = list(part.shape)
            shape[dim] = missing
            part = torch.cat([part.new_zeros(shape), part], dim)
        parts.append(part)
    return torch.cat(parts)


class RunningBatch:
    """Sequences that are generating. Left-padded: mask [B, S], cache layers [B, K, S, D]."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.adapters: list[str] = []
        self.left: list[int] = []  # tokens to make
        self.cache = None
        self.mask = self.last = None

    def join(self, other: RunningBatch) -> None:
        if not self.requests:
            self.__dict__ = other.__dict__
            return
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = joined(mine.keys, theirs.keys, 2)
            mine.values = joined(mine.values, theirs.values, 2)
        self.mask = joined(self.mask, other.mask, 1)
        self.last = torch.cat([self.last, other.last])
        self.requests += other.requests
        self.adapters += other.adapters
        self.left += other.left

    def drop_ended(self) -> None:
        keep = [i for i, left in enumerate(self.left) if left > 0]
        if len(keep) == len(self.left):
            return
        if not keep:
            self.__init__()
            return
        rows = torch.tensor(keep, device=self.mask.device)
        self.mask = self.mask[rows]
        begin = int(self.mask.any(0).int().argmax())  # columns that are padding in every row
        self.mask = self.mask[:, begin:]
        self.last = self.last[rows]
        for layer in self.cache.layers:
            layer.keys = layer.keys[rows, :, begin:]
            layer.values = layer.values[rows, :, begin:]
        self.requests = [self.requests[i] for i in keep]
        self.adapters = [self.adapters[i] for i in keep]
        self.left = [self.left[i] for i in keep]


class PeftSide:
    def __init__(self, args: argparse.Namespace, with_target: bool = False) -> None:
        """There is no target that it could know."""
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        if args.device == "cpu":
            torch.set_num_threads(args.threads)
        torch.set_default_dtype(torch.float32 if args.device == "cpu" else torch.bfloat16)
        with self.device:
            self.base = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape]))
        torch.set_default_dtype(torch.float32)
        self.model = self.base

    def start(self, args: argparse.Namespace, trace: workload.Workload) -> None:
        """The adapters of a workload over the model; those of the last one are gone."""
        self.close()
        self.args, self.trace = args, trace
        o = trace.options
        config = LoraConfig(r=o.rank, lora_alpha=2 * o.rank, target_modules="all-linear", lora_dropout=0.0)
        names = [(f"serve{i}", False) for i in range(o.adapters)] + [(f"train{i}", True) for i in range(o.trainers)]
        for name, trained in names:
            if self.model is self.base:
                self.model = get_peft_model(self.base, config, adapter_name=name, autocast_adapter_dtype=trained)
            else:
                self.model.add_adapter(name, config, autocast_adapter_dtype=trained)
        self.model.eval()  # dropout is 0: training needs no other mode
        if args.peft_checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.data = [TrainingData(trace, i, Prompts(args.shape, o.seed)) for i in range(o.trainers)]
        self.optimizers = []
        for i in range(o.trainers):
            self.model.set_adapter(f"train{i}")
            parameters = [p for n, p in self.model.named_parameters() if f".train{i}." in n]
            self.optimizers.append(torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=args.device != "cpu"))
        self.turn = 0  # trainer
        self.prompts = Prompts(args.shape, o.seed)

    def names(self, adapters: list[str]) -> dict:
        return {"adapter_names": adapters} if self.model is not self.base else {}

    @torch.inference_mode()
    def prefill(self, trace: workload.Workload, requests: list[int]) -> RunningBatch:
        batch = RunningBatch()
        batch.requests = list(requests)
        batch.adapters = ["__base__" if a < 0 else f"serve{a}" for a in trace.adapters[requests]]
        batch.left = [int(n) - 1 for n in trace.outputs[requests]]
        lengths = [int(n) for n in trace.prompts[requests]]
        ids = torch.zeros(len(requests), max(lengths), dtype=torch.long)
        batch.mask = torch.zeros_like(ids)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            ids[row, -length:] = torch.from_numpy(self.prompts.request(request, length)).long()
            batch.mask[row, -length:] = 1
        ids, batch.mask = ids.to(self.device), batch.mask.to(self.device)
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
        batch.cache = DynamicCache(config=self.base.config)
        out = self.model(
            input_ids=ids, attention_mask=batch.mask, position_ids=positions, past_key_values=batch.cache, use_cache=True,
            logits_to_keep=1, **self.names(batch.adapters),
        )  # fmt: skip
        batch.last = out.logits[:, -1].argmax(-1, keepdim=True)
        batch.last.tolist()  # the user has the tokens: wait for the device
        return batch

    @torch.inference_mode()
    def decode(self, batch: RunningBatch) -> None:
        positions = batch.mask.sum(1, keepdim=True)
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.requests), 1)], 1)
        out = self.model(
            input_ids=batch.last, attention_mask=batch.mask, position_ids=positions, past_key_values=batch.cache, use_cache=True,
            **self.names(batch.adapters),
        )  # fmt: skip
        batch.last = out.logits[:, -1].argmax(-1, keepdim=True)
        batch.last.tolist()
        batch.left = [n - 1 for n in batch.left]

    def train_mini_batch(self) -> tuple[int, bool]:
        """(real tokens, whether weights were updated)"""
        data, optimizer = self.data[self.turn], self.optimizers[self.turn]
        if data.next % data.accumulation == 0:
            self.model.set_adapter(f"train{self.turn}")
        if self.args.peft_checkpointing:
            self.model.train()
        examples, update = data.mini_batch()
        longest = max(len(e) for e in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            ids[row, : len(example)] = torch.from_numpy(example).long()
            labels[row, : len(example)] = ids[row, : len(example)]
        mask = (labels >= 0).long()
        loss = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), labels=labels.to(self.device), use_cache=False
        ).loss
        (loss / data.accumulation).backward()
        if update:
            optimizer.step()
            optimizer.zero_grad()
            self.turn = (self.turn + 1) % len(self.data)
        loss.item()
        if self.args.peft_checkpointing:
            self.model.eval()
        return sum(len(e) for e in examples), update

    def warm_up(self, train: bool) -> None:
        if len(self.trace):
            self.run(warm_trace(self.trace), True, False, 60.0)
        if train:
            self.train_mini_batch()

    def admit(self, trace: workload.Workload, waiting: list[int], room: int) -> list[int]:
        """The first of the waiting that fit, taken off the list."""
        taken, longest = 0, 0
        while taken < min(len(waiting), room):
            longest = max(longest, int(trace.prompts[waiting[taken]]))
            if taken and longest * (taken + 1) > ADMITTED_TOKENS:
                break
            taken += 1
        admitted, waiting[:] = waiting[:taken], waiting[taken:]
        return admitted

    def run(self, trace: workload.Workload, serve: bool, train: bool, seconds: float) -> metrics.RunRecord:
        records = new_records(trace) if serve else []
        batch, waiting, arrived, since = RunningBatch(), [], 0, 0
        trained: list[tuple[float, int]] = []
        updates = steps = 0
        clock = Clock()
        while (now := clock.now()) < seconds and not (records and all(r.done for r in records)):
            while arrived < len(records) and records[arrived].arrived <= now:
                waiting.append(arrived)
                arrived += 1
            if waiting and len(batch.requests) < self.args.peft_batch:
                admitted = self.admit(trace, waiting, self.args.peft_batch - len(batch.requests))
                for i in admitted:
                    records[i].queued = now - records[i].arrived
                joining = self.prefill(trace, admitted)
                at = clock.now()
                for i in admitted:
                    records[i].token(at)
                joining.drop_ended()
                if joining.requests:
                    batch.join(joining)
                steps += 1
            if batch.requests:
                self.decode(batch)
                at = clock.now()
                for i in batch.requests:
                    records[i].token(at)
                batch.drop_ended()
                steps += 1
                since += 1
            if train and (not batch.requests or since >= self.args.peft_turns):
                tokens, update = self.train_mini_batch()
                trained.append((clock.now(), tokens))
                updates += update
                since = 0
            elif not batch.requests and not waiting:
                time.sleep(0.001)
        window = clock.now() if records or not trained else trained[-1][0]
        return metrics.RunRecord(records, window, trained, updates, {"steps": steps})

    def device_name(self) -> str:
        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def close(self) -> None:
        if self.model is not self.base:
            self.optimizers = []
            self.base = self.model = self.model.unload()
