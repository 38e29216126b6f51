"""The oracle above the ladder: transformers + PEFT in f32 on the CPU, one sequence at a time, without padding, cache or batching.

What it computes is written from the definitions: log-probabilities by log_softmax, losses by autograd, updates by
torch.optim.AdamW with torch's clipping. Read next: drive.py (the engine's side of the same), test_parity.py.
"""

from __future__ import annotations

import contextlib
import copy

import torch

from helpers import adapters

torch.set_num_threads(1)


class Oracle:
    def __init__(self, tuned):
        self.tuned = tuned.eval()

    def copy(self) -> Oracle:
        return Oracle(copy.deepcopy(self.tuned))

    @contextlib.contextmanager
    def using(self, adapter: str | None):
        if adapter is None:
            with self.tuned.disable_adapter():
                yield
        else:
            self.tuned.set_adapter(adapter)
            yield

    def logits(self, adapter: str | None, ids) -> torch.Tensor:
        """[T, V] f32, with its graph when gradients are on."""
        with self.using(adapter):
            return self.tuned(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    @torch.no_grad()
    def greedy(self, adapter: str | None, prompt, count: int) -> list[int]:
        """No end of sequence stops it. Uses transformers' cache; the cache is proven against the uncached logits in
        test_parity.py."""
        tokens = []
        with self.using(adapter):
            out = self.tuned(input_ids=torch.tensor([list(prompt)]), use_cache=True)
            while True:
                tokens.append(int(out.logits[0, -1].argmax()))
                if len(tokens) == count:
                    return tokens
                out = self.tuned(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)

    @torch.no_grad()
    def logprobs(self, adapter: str | None, example) -> torch.Tensor:
        """[T] log-probability of every target given the tokens before it; NaN where there is none."""
        ids = example["input_ids"]
        p = target_logprobs(self.logits(adapter, ids), [max(label, 0) for label in example.get("labels") or ids])
        p[~target_mask(example)] = torch.nan
        return p

    def loss(self, adapter: str | None, examples, loss: str = "cross_entropy", reduction: str = "mean", **clip) -> torch.Tensor:
        """The mini-batch's loss as design.md defines it, differentiable. examples: dicts with Example's field names."""
        total, targets = torch.zeros(()), 0
        for example in examples:
            ids = example["input_ids"]
            mask = target_mask(example)
            targets_of = [max(label, 0) for label in example.get("labels") or ids]  # -100 is masked out below
            p = target_logprobs(self.logits(adapter, ids), targets_of)[mask]
            weights = torch.tensor(example.get("weights") or [1.0] * len(ids))[mask]
            if loss in ("cross_entropy", "weighted_logprob"):
                per_token = -p
            else:
                ratio = torch.exp(p - torch.tensor(example["logprobs"])[mask])
                advantage = torch.tensor(example["advantages"])[mask]
                if loss == "importance_sampling":
                    per_token = -ratio * advantage
                else:
                    clipped = ratio.clamp(1 - clip.get("clip_low", 0.2), 1 + clip.get("clip_high", 0.2))
                    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
            total = total + (weights * per_token).sum()
            targets += int(mask.sum())
        return total / targets if reduction == "mean" else total

    def gradients(self, adapter: str, batches, **loss_options) -> dict[str, torch.Tensor]:
        """Of the sum of the losses of `batches` (each a list of examples), by PEFT key."""
        self.tuned.zero_grad()
        for examples in batches:
            self.loss(adapter, examples, **loss_options).backward()
        found = adapters.state(self.tuned, adapter, lambda p: p.grad)
        self.tuned.zero_grad()
        return found

    def optimizer(self, adapter: str, options: dict) -> torch.optim.AdamW:
        """torch's AdamW for this adapter; options: AdamW's fields of design.md."""
        self.tuned.set_adapter(adapter)
        parts = {"lora_A": [], "lora_B": []}
        for key, p in self.tuned.named_parameters():
            for ab, part in parts.items():
                if f".{ab}.{adapter}.weight" in key:
                    part.append(p)
        lr = options["lr"]
        groups = [dict(params=parts["lora_A"], lr=lr), dict(params=parts["lora_B"], lr=lr * options.get("loraplus_lr_ratio", 1.0))]
        return torch.optim.AdamW(
            groups,
            betas=options.get("betas", (0.9, 0.999)),
            eps=options.get("eps", 1e-8),
            weight_decay=options.get("weight_decay", 0.0),
        )

    def train_step(self, adapter: str, optimizer, batches, max_grad_norm: float | None = None, **loss_options):
        """Accumulates the batches, clips, steps. Returns (loss of each batch, gradient norm before clipping)."""
        optimizer.zero_grad()
        losses = []
        for examples in batches:
            loss = self.loss(adapter, examples, **loss_options)
            loss.backward()
            losses.append(loss.item())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm is not None else float("inf"))
        optimizer.step()
        return losses, norm.item()

    def weights(self, adapter: str) -> dict[str, torch.Tensor]:
        return adapters.state(self.tuned, adapter)


def target_logprobs(logits: torch.Tensor, targets) -> torch.Tensor:
    """[T]: entry t is log p(targets[t] | tokens before t), entry 0 NaN. logits [T, V]."""
    p = torch.log_softmax(logits[:-1], -1)
    picked = p.gather(1, torch.tensor(list(targets))[1:, None])[:, 0]
    return torch.cat([torch.full((1,), float("nan")), picked])


def target_mask(example) -> torch.Tensor:
    """[T] bool: the tokens that are targets."""
    ids = example["input_ids"]
    labels = torch.tensor(list(example.get("labels") or ids))
    mask = labels != -100
    mask[0] = False
    return mask


def make_examples(
    count: int, vocab_size: int, seed: int, *, masks=True, weights=False, policy=False, longest: int = 30
) -> list[dict]:
    """Random examples as dicts: mixed lengths, some with masked prompts, weights, and a sampling policy's log-probabilities."""
    g = torch.Generator().manual_seed(3000 + seed)
    examples = []
    for i in range(count):
        n = int(torch.randint(2, longest + 1, (1,), generator=g))
        ids = torch.randint(3, vocab_size, (n,), generator=g).tolist()
        example = {"input_ids": ids}
        if masks and i % 2:
            drop = torch.rand(n, generator=g) < 0.4
            drop[-1] = False  # at least one target
            example["labels"] = [-100 if d else t for d, t in zip(drop.tolist(), ids, strict=True)]
            if i % 4 == 3:  # a label need not be the token itself
                example["labels"][-1] = (ids[-1] + 1) % vocab_size
        if weights and i % 3 != 1:
            example["weights"] = (torch.rand(n, generator=g) * 2).tolist()
        if policy:
            example["logprobs"] = (-1 - 5 * torch.rand(n, generator=g)).tolist()
            example["advantages"] = torch.randn(n, generator=g).tolist()
        examples.append(example)
    return examples
