"""The Python face of the API: argument conversion, option objects, exception classes, tensors of other libraries without a copy."""

import copy
import gc
import pickle
import threading
import time
import weakref

import loquetier_core as lq
import numpy as np
import pytest
import torch
from helpers import models
from helpers.drive import generate, greedy, run

pytest_plugins = ["helpers.fixtures"]


# ---------------------------------------------------------------- exceptions


@pytest.mark.parametrize(
    "error, builtin",
    [
        (lq.InvalidArgument, ValueError),
        (lq.NotFound, KeyError),
        (lq.OutOfMemory, MemoryError),
        (lq.FormatError, ValueError),
        (lq.DeviceError, RuntimeError),
        (lq.QueueFull, RuntimeError),
    ],
)
def test_error_classes(error, builtin):
    assert issubclass(error, lq.Error) and issubclass(error, builtin) and error.__doc__
    assert str(error("a message")) == "a message"
    assert str(pickle.loads(pickle.dumps(error("a message")))) == "a message"


def test_native_errors_arrive_as_their_class(bench, tmp_path):
    with bench.engine() as engine:
        with pytest.raises(KeyError) as caught:
            engine.submit_infer([1, 2], adapter="nobody")
        assert type(caught.value) is lq.NotFound and "nobody" in str(caught.value) and not str(caught.value).startswith(("'", '"'))
    with pytest.raises(lq.Error, match="nowhere"):
        lq.Engine(tmp_path / "nowhere")


# ---------------------------------------------------------------- option objects


@pytest.mark.parametrize(
    "value",
    [
        lq.LoraConfig(),
        lq.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "up_proj"], exclude_modules=".*v", layers_to_transform=[0, 2],
                      lora_dropout=0.1, use_rslora=True, rank_pattern={"q_proj": 4, "up": 2}, alpha_pattern={"q_proj": 3.5},
                      init_lora_weights="gaussian", seed=9),
        lq.LoraConfig(target_modules="all-linear", init_lora_weights=False, layers_to_transform=1),
        lq.SamplingParams(),
        lq.SamplingParams(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=2**63, max_tokens=9, min_tokens=2,
                          stop_token_ids=[4], ignore_eos=True, presence_penalty=1, frequency_penalty=-1,
                          repetition_penalty=1.5, logit_bias={3: -2.5}, logprobs=4, prompt_logprobs=True),
        lq.AdamW(1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, max_grad_norm=1.0, loraplus_lr_ratio=16),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_copy_compare_and_print(value):
    for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value)), eval(repr(value), vars(lq).copy())):
        assert other == value and other is not value and repr(other) == repr(value)
    field = {"LoraConfig": "r", "SamplingParams": "max_tokens", "AdamW": "lr"}[type(value).__name__]
    changed = copy.copy(value)
    setattr(changed, field, 7)
    assert changed != value and getattr(changed, field) == 7
    assert value != 3 and not value == None  # noqa: E711


def test_lora_config_takes_modules_as_peft_does():
    assert lq.LoraConfig().target_modules is None
    assert lq.LoraConfig(target_modules="all-linear").target_modules == "all-linear"
    assert lq.LoraConfig(target_modules=r".*\.(q|k)_proj").target_modules == r".*\.(q|k)_proj"
    assert lq.LoraConfig(target_modules=("q_proj", "k_proj")).target_modules == ["q_proj", "k_proj"]
    assert sorted(lq.LoraConfig(target_modules={"q_proj", "k_proj"}).target_modules) == ["k_proj", "q_proj"]
    assert list(lq.LoraConfig(rank_pattern={"b": 1, "a": 2}).rank_pattern) == ["b", "a"]
    assert lq.LoraConfig(init_lora_weights=True).init_lora_weights is True


@pytest.mark.parametrize(
    "make", [lq.LoraConfig, lq.SamplingParams, lambda **k: lq.AdamW(1e-3, **k), lambda **k: lq.Example([1], **k)]
)
def test_unknown_keywords_are_type_errors(make):
    with pytest.raises(TypeError, match="colour"):
        make(colour="red")


# ---------------------------------------------------------------- examples and ids


IDS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    "ids",
    [IDS, tuple(IDS), np.array(IDS), np.array(IDS, np.int32), np.array(IDS, np.uint8), np.array(IDS, ">i4"), np.repeat(IDS, 2)[::2],
     torch.tensor(IDS), torch.tensor(IDS, dtype=torch.int32), torch.tensor(IDS).repeat_interleave(3)[::3],
     [np.int64(i) for i in IDS], iter(IDS), range(1, 6)],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_ids_of_every_kind(ids):
    expected = [1, 2, 3, 4, 5] if isinstance(ids, range) else IDS
    example = lq.Example(ids)
    assert example.input_ids.tolist() == expected and example.input_ids.dtype == np.int32 and len(example) == 5
    assert example.labels is None and example.weights is None


@pytest.mark.parametrize(
    "values",
    [[0.5, -1, 2.25], np.array([0.5, -1, 2.25]), np.array([0.5, -1, 2.25], np.float32), np.array([0.5, -1, 2.25], np.float16),
     torch.tensor([0.5, -1, 2.25]), torch.tensor([0.5, -1, 2.25], dtype=torch.bfloat16),
     torch.tensor([0.5, -1, 2.25], dtype=torch.float16),
     torch.tensor([0.5, -1, 2.25], requires_grad=True)],
    ids=lambda values: f"{type(values).__name__}-{getattr(values, 'dtype', '')}",
)  # fmt: skip
def test_floats_of_every_kind(values):
    example = lq.Example([1, 2, 3], weights=values, logprobs=values, advantages=values)
    for got in (example.weights, example.logprobs, example.advantages):
        assert got.tolist() == [0.5, -1.0, 2.25] and got.dtype == np.float32


def test_half_floats_convert_exactly():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    got = lq.Example([0] * len(halves), weights=halves).weights
    np.testing.assert_array_equal(got, halves.astype(np.float32))
    brains = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    np.testing.assert_array_equal(lq.Example([0] * len(brains), weights=brains).weights, brains.float().numpy())


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: lq.Example("abc"), TypeError, "input_ids.*str"),
        (lambda: lq.Example(5), TypeError, "input_ids.*int"),
        (lambda: lq.Example([1, 2.5]), TypeError, r"input_ids\[1\].*float"),
        (lambda: lq.Example([1, True]), TypeError, r"input_ids\[1\].*bool"),
        (lambda: lq.Example([1, 2**40]), lq.InvalidArgument, r"input_ids\[1\].*1099511627776"),
        (lambda: lq.Example([10**30]), lq.InvalidArgument, r"input_ids\[0\]"),
        (lambda: lq.Example(np.array([2**63], np.uint64)), lq.InvalidArgument, r"input_ids\[0\]"),
        (lambda: lq.Example(np.array([1.0])), TypeError, "input_ids.*f64"),
        (lambda: lq.Example(np.array([[1, 2]])), lq.InvalidArgument, "input_ids.*2 dimensions"),
        (lambda: lq.Example(torch.tensor(3)), lq.InvalidArgument, "input_ids.*0 dimensions"),
        (lambda: lq.Example([1], weights=["x"]), TypeError, r"weights\[0\].*str"),
        (lambda: lq.Example([1], weights=np.array(["x"])), lq.InvalidArgument, "weights.*U1"),
    ],
)
def test_wrong_ids_say_where(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_examples_of_every_kind_train_alike(bench):
    as_dict = {"input_ids": torch.tensor(IDS), "labels": np.array([-100, 1, 4, -100, 5]), "weights": None}
    as_object = lq.Example(IDS, labels=[-100, 1, 4, -100, 5])
    losses = []
    with bench.engine() as engine:
        for example in (as_dict, as_object, pickle.loads(pickle.dumps(as_object))):
            job = engine.submit_eval(None, [example])
            losses.append(run(engine).evaluated[job].loss)
        job = engine.submit_eval(None, [IDS, np.array(IDS)])
        two = run(engine).evaluated[job]
        assert (
            len(two.logprobs) == 2
            and isinstance(two.logprobs[0], np.ndarray)
            and two.logprobs[0].shape == (5,)
            and np.isnan(two.logprobs[0][0])
        )
        for wrong, words in (
            (IDS, r"examples\[0\].*int"),
            (as_object, "examples.*put it in a list"),
            ("text", "examples.*str"),
            (None, "examples"),
            ([None], r"examples\[0\]"),
        ):
            with pytest.raises(TypeError, match=words):
                engine.submit_eval(None, wrong)
        with pytest.raises(lq.InvalidArgument, match=r'examples\[1\]\["attention_mask"\]'):
            engine.submit_eval(None, [IDS, {"input_ids": IDS, "attention_mask": IDS}])
        with pytest.raises(lq.InvalidArgument, match=r"examples\[0\].*input_ids"):
            engine.submit_eval(None, [{"labels": IDS}])
        assert not engine.has_work()
    assert losses[0] == losses[1] == losses[2]


# ---------------------------------------------------------------- models from live weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_state_dict_of_a_live_model(dtype, tmp_path):
    """Torch tensors through DLPack give the tokens of the same weights saved and loaded."""
    model = models.make_model("llama2", seed=3, dtype=dtype)
    folder = models.save_model(model, tmp_path / "model")
    requests = [(None, [5, 6, 7]), (None, [9, 8])]
    options = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 512, "max_batch_tokens": 256}
    with lq.Engine(folder, **options) as engine:
        expected = generate(engine, requests, greedy(10))
    with lq.Engine.from_state_dict(model.config, model.state_dict(), **options) as engine:
        assert generate(engine, requests, greedy(10)) == expected
    if dtype == torch.float32:
        arrays = {name: value.numpy() for name, value in model.state_dict().items()}
        strided = {name: np.repeat(value, 2, axis=-1)[..., ::2] for name, value in arrays.items()}
        parameters = dict(model.named_parameters())  # they require gradients
        for weights in (arrays, strided, parameters):
            with lq.Engine.from_state_dict(model.config.to_dict(), weights, **options) as engine:
                assert generate(engine, requests, greedy(10)) == expected


def test_state_dict_is_not_copied_and_stays_alive():
    model = models.make_model("llama2", seed=4)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    base = lq.BaseModel.from_state_dict(model.config, weights)
    # The tensor lives as long as the model uses it, and a change of it is seen: the same memory.
    watched = weights["model.layers.0.mlp.down_proj.weight"]
    died = weakref.ref(watched)
    options = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 512, "max_batch_tokens": 256}
    with lq.Engine(base, **options) as engine:
        job = engine.submit_eval(None, [IDS])
        before = run(engine).evaluated[job].loss
        watched *= 2
        job = engine.submit_eval(None, [IDS])
        after = run(engine).evaluated[job].loss
    assert before != after
    del weights, watched
    gc.collect()
    assert died() is not None
    del base, engine
    gc.collect()
    assert died() is None


def test_one_base_model_serves_several_engines(bench):
    base = lq.BaseModel.load(bench.folder)
    assert base.family == "llama" and base.vocab_size == bench.vocab_size and base.num_layers == 2 and base.num_parameters > 0
    options = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 512, "max_batch_tokens": 256}
    with lq.Engine(base, **options) as one, lq.Engine(base, **options) as two:
        request = [(None, [5, 6, 7])]
        assert generate(one, request, greedy(8)) == generate(two, request, greedy(8))
        assert one.base_model is two.base_model is base


def test_random_models_from_a_config(bench):
    config = models.FAMILIES["llama2"]()
    options = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 512, "max_batch_tokens": 256}
    losses = []
    for source, seed in ((config, 1), (config.to_dict(), 1), (config, 2)):
        with lq.Engine(source, seed=seed, **options) as engine:
            job = engine.submit_eval(None, [IDS])
            losses.append(run(engine).evaluated[job].loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda c, w: lq.Engine.from_state_dict(c, list(w)), TypeError, "state_dict.*list"),
        (
            lambda c, w: lq.Engine.from_state_dict(c, {**w, "lm_head.weight": [1.0]}),
            TypeError,
            r'state_dict\["lm_head.weight"\].*list',
        ),
        (
            lambda c, w: lq.Engine.from_state_dict(c, {**w, "lm_head.weight": w["lm_head.weight"].double()}),
            lq.InvalidArgument,
            "lm_head.weight.*f64",
        ),
        (
            lambda c, w: lq.Engine.from_state_dict(c, {**w, "lm_head.weight": w["lm_head.weight"][:-1]}),
            lq.InvalidArgument,
            "lm_head.weight",
        ),
        (
            lambda c, w: lq.Engine.from_state_dict(c, {k: v for k, v in w.items() if "down_proj" not in k}),
            lq.InvalidArgument,
            "down_proj",
        ),
        (lambda c, w: lq.Engine.from_state_dict("folder", w), TypeError, "config.*str"),
        (lambda c, w: lq.Engine.from_state_dict({"model_type": {1, 2}}, w), lq.InvalidArgument, "config.*JSON"),
        (lambda c, w: lq.Engine.from_state_dict(c, w, colour="red"), TypeError, "colour"),
        (lambda c, w: lq.Engine(5), TypeError, "Engine model.*int"),
        (lambda c, w: lq.Engine(c, latency=0.1), lq.InvalidArgument, "latency"),
        (lambda c, w: lq.Engine(c, "cpu"), TypeError, "incompatible"),
    ],
)
def test_wrong_models_say_where(call, error, words):
    model = models.make_model("llama2")
    with pytest.raises(error, match=words):
        call(model.config, model.state_dict())


# ---------------------------------------------------------------- results


def test_results_read_like_records(bench):
    with bench.engine() as engine:
        sampling = lq.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=True)
        request = engine.submit_infer([5, 6, 7], sampling=sampling)
        events, finished = [], []
        while engine.has_work():
            result = engine.step()
            assert repr(result).startswith("StepResult(tokens=")
            events += result.tokens
            finished += result.finished
        assert [e.finish_reason for e in events] == [None, None, "length"]
        token_id, logprob = events[0].top_logprobs[0]
        assert token_id == events[0].token_id and logprob == pytest.approx(events[0].logprob)
        assert len(dict(events[0].top_logprobs)) == 2
        assert f"request_id={request}" in repr(events[0]) and "adapter=None" in repr(events[0])
        (done,) = finished
        assert done.finish_reason == "length" and done.error == "" and done.adapter is None
        assert done.logprobs == [e.logprob for e in events] and len(done.prompt_logprobs) == 3
        with pytest.raises(AttributeError):
            done.adapter = "x"
        with pytest.raises(lq.InvalidArgument, match="adapter"):
            engine.submit_infer([1], adapter="")


def test_stats_are_attributes_and_a_mapping(bench):
    with bench.engine() as engine:
        generate(engine, [(None, [5, 6, 7])], greedy(4))
        stats = engine.stats()
        as_dict = dict(stats)
        assert as_dict["generated_tokens"] == stats["generated_tokens"] == stats.generated_tokens == 4
        assert isinstance(stats.step_seconds, float) and stats["step_seconds"] > 0
        assert list(stats) == list(as_dict) and len(stats) == len(as_dict) and "steps" in stats and "nothing" not in stats
        with pytest.raises(KeyError, match="nothing"):
            stats["nothing"]


def test_adapter_state_is_writable_memory_of_its_own(bench):
    with bench.engine() as engine:
        engine.add_adapter("a", lq.LoraConfig(r=3, target_modules=["q_proj"]))
        state = engine.adapter_state("a", "weights")
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert state[key].shape == (3, 64) and state[key].dtype == np.float32
        kept = state[key]
        kept += 1
        again = engine.adapter_state("a")[key]
        np.testing.assert_allclose(kept - 1, again, atol=1e-6)
        assert torch.from_dlpack(again).shape == (3, 64)
        assert engine.adapter("a").config == lq.LoraConfig(r=3, target_modules=["q_proj"])
        assert [info.name for info in engine.adapters()] == ["a"] and "name='a'" in repr(engine.adapter("a"))


def test_exported_adapters_are_bytes(bench):
    with bench.engine() as engine:
        engine.add_adapter("a", lq.LoraConfig(r=2))
        data = engine.export_adapter("a")
        assert isinstance(data, bytes)
        engine.import_adapter("b", data)
        with pytest.raises(TypeError):
            engine.import_adapter("c", "text")
        assert [info.name for info in engine.adapters()] == ["a", "b"]


def test_loading_releases_the_interpreter(tmp_path):
    """Another thread runs while a model is made."""
    config = {
        **models.FAMILIES["llama2"]().to_dict(),
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "vocab_size": 8192,
    }
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    lq.BaseModel.random(config)
    end = time.monotonic()
    stop.set()
    thread.join()
    inside = [t for t in ticks if begin < t < end]
    assert len(inside) >= 3 and max(np.diff([begin, *inside, end])) < 0.7 * (end - begin)
