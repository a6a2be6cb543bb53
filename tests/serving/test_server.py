"""All processes switch or none does, one at a time; a server that cannot promise it answers no more."""

import argparse
import asyncio
import contextlib
import json

import numpy as np
import pytest

from dst_optax.serving.server import BrokenServerError, SubsetServer, UnknownSubsetError
from dst_optax.serving.vllm import _AmongModels, _ByName
from dst_optax.subset import SubsetError


class Fake:
    """An engine of two processes, each of which is the subset that it was last told to be."""

    def __init__(self, fail=None):
        self.ranks = [{"loaded": [], "now": None} for _ in range(2)]
        self.fail = fail or (lambda rank, verb, args: None)
        self.paused, self.log, self.version, self.missed = False, [], "default", [{}, {}]
        self.digests = ["d", "d"]

    async def call(self, verb, *args):
        await asyncio.sleep(0)
        return [self.one(i, rank, verb, args) for i, rank in enumerate(self.ranks)]

    def one(self, i, rank, verb, args):
        self.log.append((verb, *args))
        if error := self.fail(i, verb, args):
            return error
        if verb == "load":
            rank["loaded"].append(args[0])
            return {"result": (self.digests[i], self.missed[i])}
        if verb == "activate":
            assert self.paused
            rank["now"] = args[0]
        if verb == "discard" and args[0] in rank["loaded"]:
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


def test_loading_and_unloading_do_not_wait_for_an_activation(tmp_path):
    async def body(server, engine):
        ended = asyncio.Event()

        async def request():
            async with server.turn("a"):
                await ended.wait()

        running = asyncio.ensure_future(request())
        await asyncio.sleep(0.001)
        activation = asyncio.ensure_future(server.activate("b"))
        await asyncio.sleep(0.001)
        await server.load("c", "c")
        await server.unload("b")
        assert not activation.done()
        ended.set()
        await running
        with pytest.raises(UnknownSubsetError, match="'b'"):
            await activation
        assert server.default is None

    run(tmp_path, body)


def test_processes_that_read_different_subsets_are_noticed(tmp_path):
    async def body(server, engine):
        engine.digests = ["old", "new"]
        with pytest.raises(SubsetError, match="read different subsets"):
            await server.load("c", "c")
        assert [rank["loaded"] for rank in engine.ranks] == [["a", "b"], ["a", "b"]]

    run(tmp_path, body)


@pytest.mark.parametrize("name", ["base", "default"])
def test_no_subset_takes_the_seed_models_name(tmp_path, name):
    async def body(server, engine):
        server = SubsetServer(engine, tmp_path, reserved=["base", "other"])
        with pytest.raises(SubsetError, match="is the seed model's"):
            await server.load(name, "a")

    run(tmp_path, body)


def test_a_failed_unload_keeps_the_default_and_can_be_repeated(tmp_path):
    failures = [{"error": "gone"}]

    def fail(i, verb, args):
        return failures.pop() if failures and (i, verb, args) == (1, "discard", ("a",)) else None

    async def body(server, engine):
        await server.activate("a")
        with pytest.raises(RuntimeError, match="gone"):
            await server.unload("a")
        assert server.has("a")
        assert server.default == "a"
        await server.unload("a")
        assert [rank["loaded"] for rank in engine.ranks] == [["b"], ["b"]]
        assert server.default is None

    run(tmp_path, body, fail=fail)


def test_a_load_that_cannot_be_undone_says_so_and_is_not_listed(tmp_path):
    def fail(i, verb, args):
        if args[:1] == ("c",):
            return {("load", 1): {"refused": "damaged"}, ("discard", 0): {"error": "oom"}}.get((verb, i))
        return None

    async def body(server, engine):
        with pytest.raises(SubsetError, match="damaged") as error:
            await server.load("c", "c")
        assert "oom" in error.value.__notes__[0]
        assert [x.name for x in await server.list()] == ["a", "b"]

    run(tmp_path, body, fail=fail)


def test_an_engine_that_does_not_go_on_is_not_used(tmp_path):
    async def body(server, engine):
        async def request(name):
            async with server.turn(name):
                raise AssertionError

        resume, engine.resume = engine.resume, failing
        waiting = [asyncio.ensure_future(request(name)) for name in ("b", "b", "a")]
        for attempt in waiting:
            with pytest.raises(BrokenServerError, match="did not go on"):
                await attempt
        engine.resume = resume
        for attempt in (request("b"), server.load("c", "c"), server.activate(None)):
            with pytest.raises(BrokenServerError):
                await attempt

    async def failing():
        raise RuntimeError("no answer")

    run(tmp_path, body)


def test_those_who_wait_when_the_server_breaks_are_not_let_in(tmp_path):
    def fail(i, verb, args):
        return {"error": "gone"} if i == 1 and verb == "activate" and args in (("b",), ("a",)) else None

    async def body(server, engine):
        async def request(name):
            async with server.turn(name):
                raise AssertionError

        waiting = [asyncio.ensure_future(request(name)) for name in ("b", "a", "b")]
        for attempt in waiting:
            with pytest.raises((BrokenServerError, RuntimeError)):
                await attempt
        assert ("activate", "a") not in engine.log

    async def main():
        engine = Fake(
            fail=lambda i, v, a: (
                fail(i, v, a) or ({"error": "x"} if (v, a) == ("activate", (None,)) else None)
            )
        )
        await body(await started(tmp_path, engine), engine)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_those_who_wait_for_the_model_as_it_was_are_not_let_in_either(tmp_path):
    def fail(i, verb, args):
        if i == 1 and verb == "activate" and ("activate", "b") in engines[0].log:
            return {"error": "gone"}
        return None

    engines = []

    async def body(server, engine):
        engines.append(engine)
        await server.activate("a")

        async def request(name):
            async with server.turn(name):
                raise AssertionError

        other = asyncio.ensure_future(request("b"))
        while not engine.paused:
            await asyncio.sleep(0)
        same = asyncio.ensure_future(request("a"))
        for attempt in (other, same):
            with pytest.raises(BrokenServerError):
                await attempt

    run(tmp_path, body, fail=lambda *given: fail(*given) if engines else None)


class Application:
    """The part of vLLM's server that the middleware is in front of: what it was asked, and by whom."""

    def __init__(self, server, **args):
        self.state = self
        self.dst_subsets = server
        self.args = argparse.Namespace(served_model_name=["base"], model="/models/base", **args)
        self.requests = []

    async def __call__(self, scope, receive, send):
        content = (await receive())["body"]
        self.requests.append(
            (scope["path"], json.loads(content)["model"], list(self.dst_subsets._engine.now))
        )
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def post(self, path, body, root_path=""):
        sent = []

        async def receive():
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": root_path + path, "root_path": root_path}
        await _ByName(self)({**scope, "headers": [], "app": self}, receive, send)
        return sent[0]["status"]


def test_requests_get_the_subset_that_they_name(tmp_path):
    async def body(server, engine):
        app = Application(server)
        for name in ("a", "base", "b"):
            assert await app.post("/v1/completions", {"model": name}) == 200
        assert app.requests == [("/v1/completions", "base", [now, now]) for now in ("a", None, "b")]

    run(tmp_path, body)


def test_no_session_outlives_its_turn(tmp_path):
    async def body(server, engine):
        sent, app = [], Application(server)

        async def send(message):
            sent.append(message)

        await _ByName(app)({"type": "websocket", "path": "/v1/realtime", "app": app}, None, send)
        assert [(m["type"], m["code"]) for m in sent] == [("websocket.close", 1008)]
        assert app.requests == []

    run(tmp_path, body)


def test_no_request_outlives_its_turn(tmp_path):
    pytest.importorskip("fastapi", reason="vLLM's server brings it")

    async def body(server, engine):
        app = Application(server)
        assert await app.post("/v1/responses", {"model": "a", "background": True}) == 400
        assert app.requests == []

    run(tmp_path, body)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/responses/1/cancel", "/v1/chat/completions/render"])
def test_what_needs_no_weights_takes_no_turn(tmp_path, path):
    async def body(server, engine):
        app = Application(server)
        async with server.turn("b"):
            assert await app.post(path, {"model": "a"}) == 200
        assert app.requests == [(path, "base", ["b", "b"])]

    run(tmp_path, body)


def test_routes_below_a_proxys_path(tmp_path):
    """The routes of subsets must not wait for a turn themselves."""

    async def body(server, engine):
        app = Application(server)
        async with server.turn("b"):
            assert await app.post("/v1/subsets/activate", {"model": "a"}, root_path="/api") == 200
        assert app.requests == [("/api/v1/subsets/activate", "a", ["b", "b"])]

    run(tmp_path, body)
