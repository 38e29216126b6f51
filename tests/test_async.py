"""AsyncEngine: streams, jobs, cancellation and errors. Results are those of the engine stepped by hand."""

import asyncio

import loquetier_core as lq
import pytest
from helpers.drive import generate, greedy

pytest_plugins = ["helpers.fixtures"]
PROMPTS = [[1, 5, 9, 13], [1, 7], [3, 4, 5, 6, 7, 8]]


def test_streams_equal_stepping(bench):
    names = list(bench.adapter_folders)[:2]
    adapters = [None, *names]
    with bench.engine(names) as engine:
        expected = generate(engine, list(zip(adapters, PROMPTS, strict=True)), greedy(12))

    async def one(aio, prompt, adapter):
        events = [event async for event in aio.stream(prompt, adapter=adapter, sampling=greedy(12))]
        assert isinstance(events[-1], lq.InferResult)
        assert [e.token_id for e in events[:-1]] == events[-1].token_ids
        assert [e.index for e in events[:-1]] == list(range(len(events) - 1))
        assert {e.adapter for e in events} == {adapter}
        return events[-1].token_ids

    async def main():
        with bench.engine(names) as engine:
            async with lq.AsyncEngine(engine) as aio:
                return await asyncio.gather(*(one(aio, p, a) for p, a in zip(PROMPTS, adapters, strict=True)))

    assert asyncio.run(main()) == expected


def test_train_and_serve_together(bench):
    async def main():
        with bench.engine() as engine:
            engine.add_adapter("t", lq.LoraConfig(r=4, lora_alpha=8))
            async with lq.AsyncEngine(engine) as aio:
                before = await aio.evaluate("t", [PROMPTS[2]])
                results = await asyncio.gather(
                    *(aio.train("t", [PROMPTS[2]], optimizer=lq.AdamW(lr=1e-2)) for _ in range(4)),
                    aio.infer(PROMPTS[0], sampling=greedy(6)),
                )
                after = await aio.evaluate("t", [PROMPTS[2]])
            return before, results, after

    before, results, after = asyncio.run(main())
    assert [r.version for r in results[:4]] == [1, 2, 3, 4] and all(r.applied for r in results[:4])
    assert len(results[4].token_ids) == 6
    assert after.loss < before.loss and after.version == 4


def test_leaving_a_stream_cancels_the_request(bench):
    async def main():
        with bench.engine() as engine:
            async with lq.AsyncEngine(engine) as aio:
                async for event in aio.stream(PROMPTS[0], sampling=lq.SamplingParams(max_tokens=300, ignore_eos=True)):
                    assert event.index == 0
                    break
                for _ in range(1000):
                    if not engine.has_work():
                        break
                    await asyncio.sleep(0.01)
                assert not engine.has_work()
                return engine.stats().generated_tokens

    assert asyncio.run(main()) < 300


def test_a_cancelled_task_cancels_the_request(bench):
    async def main():
        with bench.engine() as engine:
            async with lq.AsyncEngine(engine) as aio:
                task = asyncio.create_task(aio.infer(PROMPTS[0], sampling=lq.SamplingParams(max_tokens=400, ignore_eos=True)))
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                while engine.has_work():
                    await asyncio.sleep(0.01)
                return engine.stats().generated_tokens

    assert asyncio.run(main()) < 400


def test_refusals_reach_the_caller_and_harm_nobody(bench):
    async def main():
        with bench.engine() as engine:
            async with lq.AsyncEngine(engine) as aio:
                with pytest.raises(lq.NotFound, match="nobody"):
                    await aio.infer(PROMPTS[0], adapter="nobody")
                with pytest.raises(lq.InvalidArgument):
                    await aio.infer([])
                return (await aio.infer(PROMPTS[0], sampling=greedy(3))).token_ids

    assert len(asyncio.run(main())) == 3


def test_closing_ends_open_streams_and_leaves_the_engine(bench):
    async def main():
        with bench.engine() as engine:
            aio = lq.AsyncEngine(engine)
            task = asyncio.create_task(aio.infer(PROMPTS[0], sampling=lq.SamplingParams(max_tokens=400, ignore_eos=True)))
            await asyncio.sleep(0.02)
            await asyncio.to_thread(aio.close)
            with pytest.raises(lq.InvalidArgument, match="closed"):
                await task
            with pytest.raises(lq.InvalidArgument, match="closed"):
                await aio.infer(PROMPTS[0])
            aio.close()  # twice does nothing
            while engine.has_work():
                engine.step()
            return engine.stats().steps

    assert asyncio.run(main()) > 0


def test_an_error_in_step_reaches_every_waiter(bench):
    """A closed engine makes the next step fail; whoever waits learns why."""

    async def main():
        engine = bench.engine()
        aio = lq.AsyncEngine(engine)
        tasks = [asyncio.create_task(aio.infer(p, sampling=lq.SamplingParams(max_tokens=400, ignore_eos=True))) for p in PROMPTS]
        await asyncio.sleep(0.05)
        engine.close()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=60)
        aio.close()
        return outcomes

    outcomes = asyncio.run(main())
    assert len(outcomes) == 3 and all(isinstance(outcome, lq.InvalidArgument) for outcome in outcomes)
