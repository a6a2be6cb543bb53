"""Requests for one subset run together, nobody is mixed, and nobody waits without bound."""

import asyncio
import random

import pytest

from dst_optax.serving.turns import Turns


class Model:
    """Is one subset at a time; fails where a request sees another one's values, or a switch while it runs."""

    def __init__(self, patience, failing=()):
        self.turns = Turns(self.switch, patience)
        self.is_now, self.running, self.switches, self.failing = None, 0, [], failing

    async def switch(self, name):
        assert not self.running
        await asyncio.sleep(0.001)
        assert not self.running
        if name in self.failing:
            raise RuntimeError(f"no {name}")
        self.is_now = name
        self.switches.append(name)

    async def request(self, name, seconds=0.0):
        async with self.turns.turn(name):
            self.running += 1
            assert self.is_now == name
            try:
                await asyncio.sleep(seconds)
                assert self.is_now == name
            finally:
                self.running -= 1


def test_each_request_sees_its_own_subset():
    async def main():
        model, rng = Model(patience=0.002), random.Random(0)
        requests = []
        for _ in range(300):
            requests.append(asyncio.ensure_future(model.request(rng.choice([None, "a", "b", "c"]), 0.001)))
            await asyncio.sleep(rng.choice([0, 0, 0.001]))
        await asyncio.gather(*requests)
        assert model.turns.running == 0
        return model

    assert len(set(asyncio.run(main()).switches)) == 4


def test_requests_that_wait_for_one_subset_share_a_turn():
    async def main():
        model = Model(patience=10)
        first = asyncio.ensure_future(model.request(None, 0.01))
        await asyncio.sleep(0)
        await asyncio.gather(first, *(model.request(name) for name in ["a", "b"] * 20))
        return model.switches

    assert asyncio.run(main()) == ["a", "b"]


@pytest.mark.parametrize("patience", [0.0, 0.05])
def test_a_stream_of_requests_does_not_starve_others(patience):
    async def main():
        model, served = Model(patience), []

        async def stream(k):
            await asyncio.sleep(0.001 * k)
            while "b" not in served:
                await model.request("a", 0.004)  # four at a time, so that one always runs
                served.append("a")

        async def other():
            await asyncio.sleep(0.02)
            await model.request("b")
            served.append("b")

        await asyncio.wait_for(asyncio.gather(*(stream(k) for k in range(4)), other()), 5)

    asyncio.run(main())


def test_turns_come_in_the_order_of_the_oldest_request():
    async def main():
        model = Model(patience=0)
        tasks = [asyncio.ensure_future(model.request(None, 0.01))]
        for name in "abcab":
            await asyncio.sleep(0)
            tasks.append(asyncio.ensure_future(model.request(name)))
        await asyncio.gather(*tasks)
        return model.switches

    assert asyncio.run(main()) == ["a", "b", "c"]


def test_a_failed_switch_is_told_to_those_who_asked_for_it_only():
    async def main():
        model = Model(patience=10, failing=("bad",))
        first = asyncio.ensure_future(model.request(None, 0.01))
        await asyncio.sleep(0)
        results = await asyncio.gather(
            first, *(model.request(n) for n in ["bad", "a", "bad"]), return_exceptions=True
        )
        assert [type(r) for r in results] == [type(None), RuntimeError, type(None), RuntimeError]
        await model.request("a")

    asyncio.run(main())


@pytest.mark.parametrize("when", ["waiting", "running", "admitted"])
def test_a_request_that_is_given_up_does_not_hold_its_turn(when):
    async def main():
        model = Model(patience=10)
        first = asyncio.ensure_future(model.request(None, 0.02))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(model.request("a", 10))
        if when == "waiting":
            await asyncio.sleep(0.005)
        else:
            await first
            while model.turns.running == 0:
                await asyncio.sleep(0)
            if when == "running":
                await asyncio.sleep(0.005)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await asyncio.wait_for(model.request("b"), 1)
        assert model.turns.running == 0

    asyncio.run(main())


def test_who_joined_the_turn_behind_a_request_that_is_given_up_comes_in():
    async def main():
        model = Model(patience=0)
        running = asyncio.ensure_future(model.request(None, 10))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(model.request("a"))
        await asyncio.sleep(0.005)
        late = asyncio.ensure_future(model.request(None))
        await asyncio.sleep(0.005)
        assert not late.done()
        gone.cancel()
        await asyncio.wait_for(late, 1)
        running.cancel()

    asyncio.run(main())


def test_nobody_comes_in_while_it_is_closed():
    async def main():
        model = Model(patience=10)
        running = asyncio.ensure_future(model.request(None, 0.005))
        await asyncio.sleep(0)
        async with model.turns.closed():
            late = asyncio.ensure_future(model.request(None))
            await running
            await asyncio.sleep(0.005)
            assert not late.done()
        await asyncio.wait_for(late, 1)

    asyncio.run(main())


def test_who_waited_for_the_present_turn_while_it_was_closed_joins_it():
    async def main():
        model = Model(patience=10)
        long = asyncio.ensure_future(model.request(None, 10))
        await asyncio.sleep(0)
        async with model.turns.closed():
            late = asyncio.ensure_future(model.request(None))
            await asyncio.sleep(0)
        await asyncio.wait_for(late, 1)
        long.cancel()

    asyncio.run(main())
