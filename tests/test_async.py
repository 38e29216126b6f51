"""AsyncEngine: streams, jobs, cancellation and errors. Results are those of the engine stepped by hand."""

import asyncio

import loquetier_core as lq
import pytest
from helpers.drive import generate, greedy

pytest_plugins = ["helpers.fixtures"]
PROMPTS = [[1, 5, 9, 13], [1, 7], [3, 4, 5, 6, 7, 8]]
# Work that cannot end before the test has acted: the engine takes one of these at a time.
MANY = 30
LONG = lq.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


async def drained(engine):
    while engine.has_work():
        await asyncio.sleep(0.01)
    return engine.stats()


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
    async def first_token(aio):
        async for event in aio.stream(PROMPTS[0], sampling=LONG):
            assert event.index == 0
            return

    async def main():
        with bench.engine(max_sequences=1) as engine:
            async with lq.AsyncEngine(engine) as aio:
                await asyncio.gather(*(first_token(aio) for _ in range(MANY)))
                return (await drained(engine)).generated_tokens

    assert MANY <= asyncio.run(main()) < MANY * LONG.max_tokens


def test_a_cancelled_task_cancels_the_request(bench):
    async def main():
        with bench.engine(max_sequences=1) as engine:
            async with lq.AsyncEngine(engine) as aio:
                tasks = [asyncio.create_task(aio.infer(PROMPTS[0], sampling=LONG)) for _ in range(MANY)]
                await asyncio.sleep(0.02)
                for task in tasks:
                    task.cancel()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                return outcomes, (await drained(engine)).generated_tokens

    outcomes, generated = asyncio.run(main())
    assert isinstance(outcomes[-1], asyncio.CancelledError)
    assert generated < MANY * LONG.max_tokens


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
        with bench.engine(max_sequences=1) as engine:
            aio = lq.AsyncEngine(engine)
            tasks = [asyncio.create_task(aio.infer(PROMPTS[0], sampling=LONG)) for _ in range(MANY)]
            await asyncio.sleep(0.02)
            await asyncio.to_thread(aio.close)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(outcomes[-1], lq.InvalidArgument) and "closed" in str(outcomes[-1])
            with pytest.raises(lq.InvalidArgument, match="closed"):
                await aio.infer(PROMPTS[0])
            aio.close()  # twice does nothing
            while engine.has_work():
                engine.step()
            return generate(engine, [(None, PROMPTS[1])], greedy(3))

    assert len(asyncio.run(main())[0]) == 3


def test_an_error_in_step_reaches_every_waiter(bench):
    """A closed engine makes the next step fail; whoever waits learns why."""

    async def main():
        engine = bench.engine(max_sequences=1)
        aio = lq.AsyncEngine(engine)
        tasks = [asyncio.create_task(aio.infer(PROMPTS[0], sampling=LONG)) for _ in range(MANY)]
        await asyncio.sleep(0.02)
        engine.close()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=60)
        aio.close()
        return outcomes

    *some, last = asyncio.run(main())
    assert isinstance(last, lq.InvalidArgument)
    assert all(isinstance(outcome, lq.InferResult | lq.InvalidArgument) for outcome in some)
