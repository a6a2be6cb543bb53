"""All processes switch or none does, one at a time; a server that cannot promise it answers no more."""

import asyncio
import contextlib
import json

import numpy as np
import pytest

from dst_optax.serving.server import BrokenServerError, SubsetServer, UnknownSubsetError
from dst_optax.serving.vllm import _AmongModels
from dst_optax.subset import SubsetError


class Fake:
    """An engine of two processes, each of which is the subset that it was last told to be."""

    def __init__(self, fail=None):
        self.ranks = [{"loaded": [], "now": None} for _ in range(2)]
        self.fail = fail or (lambda rank, verb, args: None)
        self.paused, self.log, self.version, self.missed = False, [], "default", [{}, {}]

    async def call(self, verb, *args):
        await asyncio.sleep(0)
        return [self.one(i, rank, verb, args) for i, rank in enumerate(self.ranks)]

    def one(self, i, rank, verb, args):
        self.log.append((verb, *args))
        if error := self.fail(i, verb, args):
            return error
        if verb == "load":
            rank["loaded"].append(args[0])
            return {"result": self.missed[i]}
        if verb == "activate":
            assert self.paused
            rank["now"] = args[0]
        if verb in ("unload", "discard") and args[0] in rank["loaded"]:
            rank["loaded"].remove(args[0])
            rank["now"] = None if rank["now"] == args[0] else rank["now"]
        if verb == "list":
            return {"result": [(n, 3, 10, n == rank["now"]) for n in rank["loaded"]]}
        return {"result": None}

    async def pause(self, mode):
        self.log.append(("pause", mode))
        self.paused = True

    async def resume(self):
        self.log.append(("resume",))
        self.paused = False

    async def set_version(self, version):
        await asyncio.sleep(0.001)
        self.version = version

    @property
    def now(self):
        return [rank["now"] for rank in self.ranks]


async def started(tmp_path, engine, names=("a", "b")):
    server = SubsetServer(engine, tmp_path)
    await server.start()
    for name in names:
        await server.load(name, name)
    return server


def run(tmp_path, body, **kwargs):
    async def main():
        engine = Fake(**kwargs)
        await body(await started(tmp_path, engine), engine)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_every_process_switches_between_requests(tmp_path):
    async def body(server, engine):
        for name in ["a", "b", None, "b", "b"]:
            await server.activate(name)
            assert engine.now == [name, name]
            assert engine.version == (name or "default")
            assert not engine.paused
            async with server.turn(None):  # what the base model's name means now
                assert engine.now == [name, name]
        async with server.turn("a"):
            assert engine.now == ["a", "a"]
        async with server.turn(None):
            assert engine.now == ["b", "b"]
        assert [(x.name, x.nbytes, x.active) for x in await server.list()] == [
            ("a", 20, False),
            ("b", 20, True),
        ]
        await server.unload("b")
        assert engine.now == [None, None]
        assert not server.has("b")

    run(tmp_path, body)


@pytest.mark.parametrize("verb", ["check", "activate"])
@pytest.mark.parametrize("answer", [{"refused": "moved"}, {"error": "out of memory"}])
def test_a_failure_of_one_process_is_undone_on_all(tmp_path, verb, answer):
    async def body(server, engine):
        await server.activate("a")
        with pytest.raises((SubsetError, RuntimeError), match=r"moved|out of memory"):
            await server.activate("b")
        assert engine.now == ["a", "a"]
        assert engine.version == "a"
        if verb == "check":
            assert ("activate", "b") not in engine.log
        assert not engine.paused
        async with server.turn(None):
            assert engine.now == ["a", "a"]
        await server.activate(None)
        assert engine.now == [None, None]

    run(tmp_path, body, fail=lambda i, v, args: answer if (i, v, args) == (1, verb, ("b",)) else None)


def test_a_failure_that_cannot_be_undone_closes_the_server(tmp_path):
    broken = []

    def fail(i, verb, args):
        if i == 1 and verb == "activate" and (broken or args == ("b",)):
            broken.append(i)
            return {"error": "gone"}
        return None

    async def body(server, engine):
        await server.activate("a")
        with pytest.raises(BrokenServerError, match="restart"):
            await server.activate("b")
        assert engine.paused
        for attempt in (server.activate("a"), server.activate(None, "keep"), server.unload("a")):
            with pytest.raises(BrokenServerError):
                await attempt
        with pytest.raises(BrokenServerError):
            async with server.turn(None):
                raise AssertionError

    run(tmp_path, body, fail=fail)


class State:
    """What a request finds at its application."""

    def __init__(self, server):
        self.state = self
        self.dst_subsets = server


def test_loaded_subsets_are_among_the_models(tmp_path):
    base = {"id": "base", "object": "model", "max_model_len": 64, "parent": None}

    async def app(scope, receive, send):
        status = 200 if scope["path"] == "/v1/models" else 404
        content = json.dumps({"object": "list", "data": [base]}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content[:5], "more_body": True})
        await send({"type": "http.response.body", "body": content[5:]})

    async def get(server, path):
        messages = []

        async def send(message):
            messages.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "app": State(server)}
        await _AmongModels(app)(scope, None, send)
        content = b"".join(m.get("body", b"") for m in messages)
        assert int(dict(messages[0]["headers"])[b"content-length"]) == len(content)
        return [(model["id"], model["parent"]) for model in json.loads(content)["data"]]

    async def body(server, engine):
        assert await get(server, "/v1/models") == [("base", None), ("a", "base"), ("b", "base")]
        await server.unload("a")
        assert await get(server, "/v1/models") == [("base", None), ("b", "base")]
        assert await get(server, "/v1/other") == [("base", None)]

    run(tmp_path, body)


def test_a_refusal_waits_for_the_pause(tmp_path):
    """Or the engine would be resumed first and paused for ever."""

    async def body(server, engine):
        pause = engine.pause

        async def slow(mode):
            await asyncio.sleep(0.01)
            await pause(mode)

        engine.pause = slow
        with pytest.raises(SubsetError, match="moved"):
            await server.activate("a")
        await asyncio.sleep(0.02)
        assert not engine.paused

    run(tmp_path, body, fail=lambda i, verb, args: {"refused": "moved"} if verb == "check" else None)


def test_switches_at_once_are_serialised(tmp_path):
    async def body(server, engine):
        await asyncio.gather(*(server.activate(name) for name in ["a", "b", None] * 10))
        paused = False
        for verb, *_ in engine.log:
            assert not (verb == "pause" and paused)
            paused = verb == "pause" or (paused and verb != "resume")
        assert engine.now == [None, None]

    run(tmp_path, body)


@pytest.mark.parametrize("mode", ["wait", "abort", "keep"])
def test_what_happens_to_running_requests(tmp_path, mode):
    async def body(server, engine):
        ended = asyncio.Event()

        async def request():
            async with server.turn(None):
                seen = [engine.now[0]]
                await ended.wait()
                return [*seen, engine.now[0]]

        running = asyncio.ensure_future(request())
        await asyncio.sleep(0)
        switch = asyncio.ensure_future(server.activate("a", mode))
        await asyncio.sleep(0.01)
        assert switch.done() == (mode == "keep")
        if mode == "abort":
            assert ("pause", "abort") in engine.log  # which ends the request
        ended.set()
        assert await running == [None, "a" if mode == "keep" else None]
        await switch
        assert engine.now == ["a", "a"]

    run(tmp_path, body)


def test_only_known_names_and_modes(tmp_path):
    async def body(server, engine):
        for attempt in (server.activate("c"), server.unload("c"), server.activate("c", "keep")):
            with pytest.raises(UnknownSubsetError, match="'c'"):
                await attempt
        with pytest.raises(UnknownSubsetError):
            async with server.turn("c"):
                raise AssertionError
        with pytest.raises(SubsetError, match="mode"):
            await server.activate("a", "now")
        with pytest.raises(SubsetError, match="in use"):
            await server.load("a", "a")
        assert server.has("a")
        with pytest.raises(SubsetError, match="not allowed"):
            await server.load("../a", "a")

    run(tmp_path, body)


def test_loads_stay_below_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "fine", outside, root / "linked_file"):
        directory.mkdir(parents=True)
    (root / "linked").symlink_to(outside)
    (root / "linked_file" / "subset.safetensors").symlink_to(outside / "x")

    async def body(server, engine):
        server = await started(root, engine, names=())
        for directory in (
            "..",
            "../outside",
            str(outside),
            "linked",
            "linked_file",
            "fine/../../outside",
            "a\0b",
            3,
        ):
            with pytest.raises(SubsetError, match="root"):
                await server.load("x", directory)
        assert ("load", "x", str(root / "fine")) not in engine.log
        await server.load("x", "fine")
        with pytest.raises(SubsetError, match="none is configured"):
            await SubsetServer(engine, None).load("y", "fine")

    run(tmp_path, body)


def test_a_load_that_one_process_refuses_is_forgotten_by_all(tmp_path):
    async def body(server, engine):
        with pytest.raises(SubsetError, match="damaged"):
            await server.load("c", "c")
        assert [rank["loaded"] for rank in engine.ranks] == [["a", "b"], ["a", "b"]]
        assert not server.has("c")

    run(
        tmp_path,
        body,
        fail=lambda i, v, args: {"refused": "damaged"} if (i, v, args[:1]) == (1, "load", ("c",)) else None,
    )


def test_entries_that_no_process_has_a_place_for_are_refused(tmp_path):
    async def body(server, engine):
        first, second = np.array([1, 0, 1, 0], bool), np.array([0, 1, 1, 0], bool)
        engine.missed = [{"w": np.packbits(first).tobytes()}, {"w": np.packbits(~first).tobytes()}]
        await server.load("split", "split")
        engine.missed = [{"w": np.packbits(x).tobytes()} for x in (first, second)]
        with pytest.raises(SubsetError, match=r"'w': the engine does not load 1 of"):
            await server.load("lost", "lost")
        assert not server.has("lost")
        engine.missed = [{"w": np.packbits(first).tobytes()}, {}]
        await server.load("one", "one")

    run(tmp_path, body)


@pytest.mark.parametrize("ticks", range(0, 12))
def test_unloading_waits_for_a_switch_that_has_begun(tmp_path, ticks):
    async def body(server, engine):
        async def request():
            async with server.turn("a"):
                return list(engine.now)

        asked = asyncio.ensure_future(request())
        for _ in range(ticks):
            await asyncio.sleep(0)
        await server.unload("a")
        with contextlib.suppress(UnknownSubsetError):
            assert await asked == ["a", "a"]
        assert engine.now == [None, None]
        await server.load("a", "a")
        assert await request() == ["a", "a"]

    run(tmp_path, body)


def test_unloading_refuses_those_who_wait_for_it(tmp_path):
    async def body(server, engine):
        async def request(name, seconds=0.0):
            async with server.turn(name):
                await asyncio.sleep(seconds)

        running = asyncio.ensure_future(request("a", 0.02))
        while engine.now != ["a", "a"]:
            await asyncio.sleep(0)
        waiting = asyncio.ensure_future(request("b"))
        await asyncio.sleep(0.001)
        await server.unload("b")
        await running
        with pytest.raises(UnknownSubsetError):
            await waiting
        await request("a")

    run(tmp_path, body)
