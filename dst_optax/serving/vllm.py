"""Subsets on vLLM: plugins that add routes to its server, and :class:`SubsetLLM` for offline use.

``VLLM_PLUGINS=dst_subset DST_SUBSET_ROOT=/subsets vllm serve MODEL`` serves these routes behind the server's
API key, and every subset under its name as a model of the OpenAI API, listed by ``GET /v1/models``:

  ===============================  =============================================
  ``POST /v1/subsets/load``        ``{"name": "cb", "directory": "cb"}``, below the root
  ``POST /v1/subsets/activate``    ``{"name": "cb", "mode": "wait"}``: what the base model's name means now
  ``POST /v1/subsets/deactivate``  ``{"mode": "wait"}``
  ``POST /v1/subsets/unload``      ``{"name": "cb"}``
  ``GET /v1/subsets``              what is loaded, whose values the model has, what the base name means
  ===============================  =============================================

``DST_SUBSET_PATIENCE`` is the number of seconds, 0.5 by default, after which a waiting request keeps requests
for other subsets from being let in before it. On a CPU, naming the plugin in ``VLLM_PLUGINS`` keeps vLLM from
packing weights, which costs some speed: a packed copy would not see a subset's values.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import contextlib
import json
import os
import pathlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dst_optax.serving.server import (
    BrokenServerError,
    Mode,
    SubsetServer,
    UnknownSubsetError,
    check_placed,
    results,
)
from dst_optax.serving.store import Listed, check_name
from dst_optax.subset import SubsetError

PLUGIN = "dst_subset"
ROUTES = "/v1/subsets"
# what needs no weights; all else waits for its turn
_NO_TURN = re.compile(
    r"/(de)?tokenize|/abort_requests|/(start|stop)_profile|/ping|/v1/messages/count_tokens"
    r"|.*/(cancel|render|derender)"
)
_POLICY_VIOLATION = 1008  # of a websocket


def register() -> None:
    """Adds the workers' side to vLLM; the entry point in ``vllm.general_plugins``."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.dst_subset = _on_worker
    if current_platform.is_cpu() and PLUGIN in (envs.VLLM_PLUGINS or []):
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm = _keep_unpacked(utils.dispatch_cpu_unquantized_gemm)


def _keep_unpacked(dispatch: Callable[..., None]) -> Callable[..., None]:
    import torch

    def unpacked(layer: Any, *args: Any, **kwargs: Any) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch(layer, *args, **kwargs)

    return unpacked


def _on_worker(worker: Any, verb: str, *args: Any) -> dict[str, Any]:
    """Errors are answers, so that one worker's does not stop the engine."""
    from dst_optax.serving import routing

    try:
        if verb == "prepare":
            if not hasattr(worker, "dst_subsets"):
                worker.dst_subsets = _new_store(worker)
            return {"result": None}
        return {"result": routing.answer(worker.dst_subsets, verb, *args)}
    except SubsetError as e:
        return {"refused": str(e)}
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


def _new_store(worker: Any) -> Any:
    from vllm.config import set_current_vllm_config

    from dst_optax.serving.routing import RoutedStore
    from dst_optax.subset import models

    model = worker.get_model()
    _check_servable(worker, model)
    with set_current_vllm_config(worker.vllm_config):
        return RoutedStore(model, models.open_model(_checkpoint(worker.model_config, worker.load_config)))


def _check_servable(worker: Any, model: Any) -> None:
    """Raises a SubsetError that names what keeps subsets from being served on a model."""
    import torch

    if worker.model_config.quantization is not None:
        raise SubsetError(f"the model is quantised ({worker.model_config.quantization}); subsets are exact.")
    if worker.lora_config is not None:
        raise SubsetError("LoRA is enabled, which wraps the layers; start the server without --enable-lora.")
    for name, module in model.named_modules():
        if getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear:
            raise SubsetError(
                f"{name!r} computes with a packed copy of its weight; start vLLM with VLLM_PLUGINS={PLUGIN}."
            )
        if hasattr(module, "W_UK_T") or hasattr(module, "W_UV"):
            raise SubsetError(f"{name!r} computes with absorbed weights (multi-head latent attention).")


def _checkpoint(model_config: Any, load_config: Any) -> pathlib.Path:
    """The directory that the model was loaded from."""
    if load_config.load_format not in ("auto", "hf", "safetensors"):
        raise SubsetError(f"the load format is {load_config.load_format!r}; subsets are of safetensors.")
    if os.path.isdir(model_config.model):
        return pathlib.Path(model_config.model)
    from huggingface_hub import snapshot_download

    return pathlib.Path(
        snapshot_download(
            model_config.model,
            revision=model_config.revision,
            cache_dir=load_config.download_dir,
            allow_patterns=["*.safetensors", "*.json"],
            local_files_only=True,
        )
    )


class SubsetLLM:
    """Named subsets on an offline ``vllm.LLM``, switched between calls of ``generate``.

    Start Python with ``VLLM_PLUGINS=dst_subset``. Example::

        llm = vllm.LLM("HuggingFaceTB/SmolLM2-135M")
        subsets = SubsetLLM(llm)
        subsets.load("cb", "runs/cb/subset_hf")
        subsets.activate("cb")
        llm.generate(...)
    """

    def __init__(self, llm: Any) -> None:
        """Takes over an LLM that holds the seed.

        Args:
          llm: a ``vllm.LLM``.

        Raises:
          SubsetError: subsets cannot be served on this model.
        """
        self._llm = llm
        self._call("prepare")

    @property
    def active(self) -> str | None:
        """Name of the active subset."""
        return next((x.name for x in self.list() if x.active), None)

    def load(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Loads a subset; see :meth:`SubsetServer.load`. The directory may be any."""
        check_name(name)
        if any(x.name == name for x in self.list()):
            raise SubsetError(f"the name {name!r} is in use; unload it first.")
        try:
            check_placed(self._call("load", name, os.path.abspath(directory)))
        except BaseException as error:
            try:
                self._call("discard", name)
            except Exception as again:
                error.add_note(f"Some processes still keep it: {again}")
            raise

    def activate(self, name: str | None) -> None:
        """Gives the model the values of a subset, or the seed's for None."""
        before = self.active
        self._call("check", name)
        try:
            self._call("activate", name)
        except BaseException:
            self._call("activate", before)
            raise
        finally:
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.reset_mm_cache()
            self._llm.llm_engine.reset_encoder_cache()

    def deactivate(self) -> None:
        """Gives the model the seed's values back, bit for bit."""
        self.activate(None)

    def unload(self, name: str) -> None:
        """Forgets a subset; an active one is deactivated."""
        if name not in (names := [x.name for x in self.list()]):
            raise SubsetError(f"no subset {str(name)[:128]!r} is loaded; loaded are {names[:8]}.")
        if self.active == name:
            self.deactivate()
        self._call("discard", name)

    def list(self) -> list[Listed]:
        """What is loaded, least recently used first; bytes are the first worker's."""
        return [Listed(*row) for row in self._call("list")[0]]

    def _call(self, verb: str, *args: Any) -> Sequence[Any]:
        return results(self._llm.collective_rpc("dst_subset", args=(verb, *args)))


class SubsetEndpoints:
    """Adds the routes to vLLM's server; the entry point in ``vllm.endpoint_plugins``."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Called by vLLM while it builds the server."""
        app.include_router(_router())
        app.add_middleware(_ByName)  # vLLM adds its own after these, so the API key is checked before
        app.add_middleware(_AmongModels)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called by vLLM when the engine is up."""
        parallel = engine_client.vllm_config.parallel_config
        if parallel.data_parallel_size > 1 or (getattr(args, "api_server_count", None) or 1) > 1:
            raise SubsetError("subsets need one engine and one API server: no data parallelism.")
        root, patience = os.environ.get("DST_SUBSET_ROOT"), os.environ.get("DST_SUBSET_PATIENCE", "0.5")
        state.dst_subsets = SubsetServer(_Engine(engine_client), root, float(patience), _served(args))
        await state.dst_subsets.start()


class _Engine:
    """vLLM's asynchronous engine as the server knows engines."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, verb: str, *args: Any) -> list[dict[str, Any]]:
        return await self._client.collective_rpc("dst_subset", args=(verb, *args))

    async def pause(self, mode: Mode) -> None:
        await self._client.pause_generation(mode=mode, clear_cache=True)

    async def resume(self) -> None:
        await self._client.resume_generation()

    async def set_version(self, version: str) -> None:
        await self._client.update_weight_version(version)


def _router() -> Any:
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse

    router = APIRouter(prefix=ROUTES)

    def route(verb: Callable[[SubsetServer, dict[str, Any]], Awaitable[Any]]) -> Any:
        async def respond(request: Request) -> JSONResponse:
            server: SubsetServer = request.app.state.dst_subsets
            try:
                body = _parsed(await request.body())
                await verb(server, body)
                loaded = [x._asdict() for x in await server.list()]
                return JSONResponse({"subsets": loaded, "default": server.default})
            except Exception as e:
                return _refusal(e)

        return respond

    router.get("")(route(_nothing))
    router.post("/load")(route(lambda s, b: s.load(_get(b, "name"), b.get("directory", b["name"]))))
    router.post("/activate")(route(lambda s, b: s.activate(_get(b, "name"), b.get("mode", "wait"))))
    router.post("/deactivate")(route(lambda s, b: s.activate(None, b.get("mode", "wait"))))
    router.post("/unload")(route(lambda s, b: s.unload(_get(b, "name"))))
    return router


async def _nothing(server: SubsetServer, body: dict[str, Any]) -> None:
    """What a GET asks for."""


def _get(body: dict[str, Any], key: str) -> str:
    if not isinstance(body.get(key), str):
        raise SubsetError(f'expected a JSON object with the string "{key}".')
    return body[key]


def _parsed(content: bytes) -> dict[str, Any]:
    """A JSON object, empty where there is none."""
    try:
        body = json.loads(content or b"{}")
    except (ValueError, RecursionError) as e:
        raise SubsetError("the body is no JSON.") from e
    if not isinstance(body, dict):
        raise SubsetError("the body is no JSON object.")
    return body


def _refusal(error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    kinds = ((UnknownSubsetError, 404), (SubsetError, 400), (BrokenServerError, 503))
    code = next((code for kind, code in kinds if isinstance(error, kind)), 500)
    content = {"message": str(error), "type": type(error).__name__, "code": code}
    return JSONResponse({"error": content}, status_code=code)


class _ByName:
    """Has each request wait for the turn of the subset that it names as its model."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            reason = "a session could outlive its turn: the model may be switched meanwhile"
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
            return
        path = _path(scope)
        if scope["type"] != "http" or scope["method"] != "POST" or path.startswith(f"{ROUTES}/"):
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        entered = False
        try:
            name, content = _without_name(await _content(receive), state)
            scope = {**scope, "headers": _sized(scope["headers"], content)}
            turn = contextlib.nullcontext() if _NO_TURN.fullmatch(path) else state.dst_subsets.turn(name)
            async with turn:
                entered = True
                await self._app(scope, _replayed(content, receive), send)
        except (SubsetError, BrokenServerError, RuntimeError) as e:
            if entered:
                raise
            await _refusal(e)(scope, receive, send)


class _AmongModels:
    """Lists the loaded subsets in ``GET /v1/models``, each as a model whose parent is the served one."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or (scope["method"], _path(scope)) != ("GET", "/v1/models"):
            await self._app(scope, receive, send)
            return
        start, parts = {}, []

        async def collect(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, collect)
        content = b"".join(parts)
        if start["status"] == 200:
            content = _with_models(content, scope["app"].state.dst_subsets.names)
        await send({**start, "headers": _sized(start["headers"], content)})
        await send({"type": "http.response.body", "body": content})


def _with_models(content: bytes, names: Sequence[str]) -> bytes:
    """A list of models with one more for each name, like the first of them but for ``id`` and ``parent``."""
    listing = json.loads(content)
    base = listing["data"][0]
    listing["data"] += [{**base, "id": name, "parent": base["id"]} for name in names]
    return json.dumps(listing).encode()


def _path(scope: Any) -> str:
    """The path below the one that a proxy keeps (``--root-path``)."""
    return scope.get("path", "").removeprefix(scope.get("root_path", ""))


def _sized(headers: Sequence[tuple[bytes, bytes]], content: bytes) -> list[tuple[bytes, bytes]]:
    others = [(key, value) for key, value in headers if key.lower() != b"content-length"]
    return [*others, (b"content-length", str(len(content)).encode())]


async def _content(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _without_name(content: bytes, state: Any) -> tuple[str | None, bytes]:
    """The subset that a request names as its model, and the request with the served model's name instead.

    Raises:
      SubsetError: it is to be answered in the background, after its turn.
    """
    try:
        body = _parsed(content)
    except SubsetError:
        return None, content
    if body.get("background") is True:
        raise SubsetError('"background" is not possible beside subsets: the model may be switched meanwhile.')
    name = body.get("model")
    if not state.dst_subsets.has(name):
        return None, content
    body["model"] = _served(state.args)[0]
    return name, json.dumps(body).encode()


def _served(args: Any) -> list[str]:
    """The names of the seed model."""
    names = args.served_model_name
    return [names] if isinstance(names, str) else list(names or [args.model])


def _replayed(content: bytes, receive: Any) -> Callable[[], Awaitable[dict[str, Any]]]:
    sent = False

    async def replay() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return replay
