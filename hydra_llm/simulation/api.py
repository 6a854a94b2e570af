"""
Ollama's HTTP endpoints, without HTTP: a request goes in, an answer or an exchange comes out.

An `Exchange` is an answer that a model has to work on; it comes with the ticket that the
server model gave for it.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hydra_llm.simulation import anthropic, listings, openai, responses
from hydra_llm.simulation import asked as asking
from hydra_llm.simulation.answers import Question, answer
from hydra_llm.simulation.asked import Asked
from hydra_llm.simulation.catalog import ModelName, SimulatedModel
from hydra_llm.simulation.embed import Embedding, texts_of
from hydra_llm.simulation.exchange import (
    ChatExchange,
    Context,
    Exchange,
    FixedExchange,
    GenerateExchange,
    Writer,
)
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.records import Job, LoadTrouble, Ticket
from hydra_llm.simulation.schema import Hints, UnusableSchemaError, value_for
from hydra_llm.simulation.settings import NodeSettings
from hydra_llm.simulation.templates import render
from hydra_llm.simulation.text import as_prompt, rng_of
from hydra_llm.simulation.wire import (
    JSON,
    PLAIN_JSON,
    Reply,
    RequestError,
    date_text,
    error_body,
    go_json,
    json_reply,
    text_reply,
)

__all__ = ["Arranged", "OllamaApi"]

_METHODS = {
    "/": "GET, HEAD",
    "/api/version": "GET, HEAD",
    "/api/status": "GET",
    "/api/tags": "GET, HEAD",
    "/api/ps": "GET",
    "/api/show": "POST",
    "/api/generate": "POST",
    "/api/chat": "POST",
    "/api/embed": "POST",
    "/api/embeddings": "POST",
    "/api/delete": "DELETE",
    "/api/copy": "POST",
    "/api/pull": "POST",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/messages": "POST",
    "/v1/responses": "POST",
}


_Translation = Callable[[Mapping[str, Any]], dict[str, Any]]
_V1_CHATS: dict[str, tuple[_Translation, type[Writer]]] = {
    "/v1/chat/completions": (openai.chat_body, openai.OpenAIChatExchange),
    "/v1/messages": (anthropic.messages_body, anthropic.MessagesExchange),
    "/v1/responses": (responses.responses_body, responses.ResponsesExchange),
}
_PADDING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """What was arranged for one request."""

    watch: bool = False
    """Make every token an event, also of an answer that is not streamed."""
    repeats: str | None = None
    """What the model says again and again, instead of an answer."""
    load: LoadTrouble = field(default_factory=LoadTrouble)
    """What goes wrong with its load."""


_NOTHING = Arranged()


class OllamaApi:
    """
    The endpoints of one node: its catalogue, and the doors to its server model.

    Args:
        server: what schedules and computes.
        models: what is installed.
        wall_at: turns the server model's time into seconds since 1970.
        wall_clock: seconds since 1970 now.
        speed: simulated seconds in a second of the client's clock.
    """

    def __init__(
        self,
        server: OllamaServer,
        models: Mapping[str, SimulatedModel],
        *,
        wall_at: Callable[[float], float],
        wall_clock: Callable[[], float] = time.time,
        speed: float = 1.0,
    ) -> None:
        self.server = server
        self.models = dict(models)
        self._wall_at = wall_at
        self._wall_clock = wall_clock
        self._speed = speed
        self._number = 0
        self._arranged = _NOTHING

    @property
    def settings(self) -> NodeSettings:
        """The node's hardware and set-up."""
        return self.server.settings

    # ------------------------------------------------------------------ doors

    def handle(
        self,
        method: str,
        path: str,
        body: bytes,
        now: float,
        *,
        host: str = "localhost",
        arranged: Arranged = _NOTHING,
    ) -> Reply | Exchange:
        """Answer a request, or start it."""
        self._arranged = arranged
        path = path.split("?", 1)[0]
        if not _is_local(host):
            return Reply(403, content_type=None)
        is_v1 = path.startswith("/v1/")
        known = "/v1/models" if path.startswith("/v1/models/") else path
        allowed = _METHODS.get(known)
        if allowed is None:
            return text_reply("404 page not found", 404)
        if method not in allowed.split(", "):
            reply = text_reply("405 method not allowed", 405)
            return replace(reply, headers=(("Allow", allowed),))
        try:
            if method in {"GET", "HEAD"}:
                return self._get(path, now)
            return self._post(path, body, now)
        except RequestError as exc:
            plain = is_v1 and not exc.in_binding
            text = error_body(exc.status, exc.text, is_v1=is_v1)
            return json_reply(text, exc.status, PLAIN_JSON if plain else JSON)

    def _get(self, path: str, now: float) -> Reply:
        modern = self.settings.is_modern
        if path == "/":
            return text_reply("Ollama is running", content_type="text/plain; charset=utf-8")
        if path == "/api/version":
            return json_reply({"version": self.settings.version})
        if path == "/api/status":
            return json_reply({"cloud": {"disabled": True, "source": "env"}})
        if path == "/api/tags":
            tags = [listings.tag_entry(model, is_modern=modern) for model in self._by_date()]
            return json_reply({"models": tags})
        if path == "/api/ps":
            running = self.server.running(now)
            entries = [listings.ps_entry(one, wall_at=self._wall_at) for one in running]
            return json_reply({"models": entries})
        if path == "/v1/models":
            data = [listings.v1_model(model) for model in self._by_date()]
            return json_reply({"object": "list", "data": data}, content_type=PLAIN_JSON)
        name = path.removeprefix("/v1/models/")
        found = listings.v1_model(self._find(name), name=name)
        return json_reply(found, content_type=PLAIN_JSON)

    def _post(self, path: str, raw: bytes, now: float) -> Reply | Exchange:
        body = asking.read_json(raw)
        if path == "/api/chat":
            return self._chat(asking.read_asked(body, "ChatRequest"), now)
        if path == "/api/generate":
            return self._generate(asking.read_asked(body, "GenerateRequest"), now)
        if path in {"/api/embed", "/api/embeddings"}:
            return self._embed(asking.read_asked(body, "EmbedRequest"), path, now)
        if path in _V1_CHATS:
            translate, writer = _V1_CHATS[path]
            asked = asking.read_asked(translate(body), "ChatCompletionRequest")
            return self._chat(asked, now, writer)
        if path == "/v1/completions":
            asked = asking.read_asked(openai.completion_body(body), "CompletionRequest")
            return self._generate(asked, now, openai.OpenAICompletionExchange)
        if path == "/v1/embeddings":
            native = openai.embed_body(body) | {"encoding_format": body.get("encoding_format")}
            return self._embed(asking.read_asked(native, "EmbedRequest"), path, now)
        return self._manage(path, body, now)

    def _manage(self, path: str, body: Mapping[str, Any], now: float) -> Reply:
        name = str(body.get("model") or body.get("name") or body.get("source") or "")
        if path == "/api/show":
            long = ModelName.parse(name)
            shown = long.short if long is not None and self.settings.is_modern else name
            model = self._find(name, shown=shown)
            verbose = bool(body.get("verbose"))
            return json_reply(
                listings.show(model, is_modern=self.settings.is_modern, verbose=verbose)
            )
        if path == "/api/delete":
            model = self._find(name)
            self.server.unload(model, now)
            del self.models[model.parsed.key]
            return Reply(200, content_type=None)
        if path == "/api/copy":
            model = self._find(name)
            copy = replace(
                model,
                name=str(body.get("destination", "")),
                digest=model.manifest_digest,
                weights=model.weights_digest,
            )
            self.models[copy.parsed.key] = copy
            return Reply(200, content_type=None)
        # Nothing is ever fetched from anywhere.
        self._find(name, text="pull model manifest: file does not exist", status=500)
        return Reply(200, go_json({"status": "success"}).encode() + b"\n")

    # ------------------------------------------------------------------ chat and generate

    def _chat(
        self, asked: Asked, now: float, writer: type[Writer] = ChatExchange
    ) -> Reply | Exchange:
        if not asked.model:
            raise RequestError(400, "model is required")
        model = self._speaker(asked.model)
        empty = {"message": {"role": "assistant", "content": ""}}
        if not asked.messages and asked.keep_alive == 0:
            return self._unload(model, asked, empty, now)
        self._check_capabilities(model, asked, "chat")
        asking.check_options(asked.options)
        if not asked.messages:
            return self._load(model, asked, empty, now)
        leaves_open, repeats, native = self._prefill(model, asked)
        go_token = model.behaviour.go_token
        last = asked.messages[-1]
        messages = list(asked.messages)
        if native and last.get("role") == "assistant":
            # The runner's template opens the answer, then puts the given text.
            text = str(last.get("content") or "")
            messages[-1] = {**last, "content": text and go_token + text}
            # A continued answer is not held to a format.
            asked = replace(asked, format=None)
        rendered = render(
            messages,
            system=model.system,
            tools=asked.tools,
            leaves_open=leaves_open,
            go_token=go_token,
        )
        if asked.body.get("_debug_render_only"):
            debug = {"rendered_template": rendered}
            blank = {"message": {"role": "", "content": ""}}
            return self._load(model, asked, blank, now, end={"done": False, "_debug_info": debug})
        continues = leaves_open and last.get("role") == "assistant"
        question = self._question(
            model,
            asked,
            rendered=rendered,
            messages=asked.messages,
            prefill=str(last.get("content") or "") if continues else None,
            repeats_prefill=repeats,
            is_native=native,
        )
        return self._start(question, asked, now, writer)

    def _generate(
        self, asked: Asked, now: float, writer: type[Writer] = GenerateExchange
    ) -> Reply | Exchange:
        model = self._speaker(asked.model)
        if not asked.prompt and asked.keep_alive == 0:
            return self._unload(model, asked, {"response": ""}, now)
        self._check_capabilities(model, asked, "generate")
        asking.check_options(asked.options)
        if not asked.prompt:
            return self._load(model, asked, {"response": ""}, now)
        message = {"role": "user", "content": asked.prompt, "images": asked.body.get("images")}
        rendered = asked.prompt
        if not asked.body.get("raw"):
            rendered = render(
                [message],
                system=str(asked.body.get("system") or model.system),
                leaves_open=False,
                go_token=model.behaviour.go_token,
            )
        if asked.body.get("_debug_render_only"):
            debug = {"rendered_template": rendered}
            end = {"done": False, "_debug_info": debug}
            return self._load(model, asked, {"response": ""}, now, end=end)
        question = self._question(model, asked, rendered=rendered, messages=[message])
        return self._start(question, asked, now, writer)

    def _question(
        self, model: SimulatedModel, asked: Asked, *, rendered: str, **more: Any
    ) -> Question:
        can = self._capabilities(model)
        return Question(
            model=model,
            rendered=rendered,
            tools=asked.tools,
            format=asked.format,
            thinks="thinking" in can and asked.think is not False,
            seed=asked.options.get("seed"),
            num_predict=asked.num_predict,
            stop=asked.stop or model.stop,
            token_output=self.settings.token_output,
            **more,
        )

    def _start(
        self,
        question: Question,
        asked: Asked,
        now: float,
        writer: type[Writer],
    ) -> Exchange:
        model = question.model
        prompt = as_prompt(question.rendered)
        num_ctx = self._num_ctx(model, asked)
        no_shift = asked.body.get("shift") is False
        if no_shift and self.settings.is_modern:
            # llama-server rounds a context up, and without shifting it is used to its end.
            num_ctx = -(-num_ctx // _PADDING) * _PADDING
        if len(prompt) > num_ctx:
            if asked.body.get("truncate") is False and no_shift:
                raise self._too_long(len(prompt), num_ctx)
            # The end is kept, with room to answer.
            prompt = prompt[-max(1, num_ctx // 2) :]
        # Without a limit the server sets one of its own: ten times the context.
        room = num_ctx - len(prompt) if no_shift else 10 * num_ctx
        said = answer(replace(question, room=max(1, room)))
        self._number += 1
        context = Context(
            asked=asked,
            answer=said,
            rendered=question.rendered,
            prompt_tokens=len(prompt),
            is_modern=self.settings.is_modern,
            number=self._number,
            wall=self._wall_clock,
            speed=self._speed,
        )
        exchange = writer(context)
        job = Job(
            model=model,
            prompt=prompt,
            answer_tokens=len(said.tokens),
            answer=as_prompt(said.text),
            options=asked.runner_options,
            keep_alive=asked.keep_alive,
            each_token=asked.stream or self._arranged.watch,
        )
        exchange.ticket = self._submit(job, now)
        return exchange

    def _submit(self, job: Job, now: float) -> Ticket:
        return self.server.submit(replace(job, trouble=self._arranged.load), now)

    def _prefill(self, model: SimulatedModel, asked: Asked) -> tuple[bool, bool, bool]:
        """Say whether a last assistant message is continued, repeated, and by the runner."""
        native = self._is_native(model)
        roles = [message.get("role") for message in asked.messages[-2:]]
        if native and roles == ["assistant", "assistant"]:
            raise _nested(400, "Cannot have 2 or more assistant messages at the end of the list.")
        return native or model.template == "open", native, native

    def _is_native(self, model: SimulatedModel) -> bool:
        modern = self.settings.is_modern
        return modern and (model.template == "native" or not self.settings.go_template)

    def _capabilities(self, model: SimulatedModel) -> tuple[str, ...]:
        if self._is_native(model) and model.native_capabilities is not None:
            return model.native_capabilities
        return model.capabilities

    def _check_capabilities(self, model: SimulatedModel, asked: Asked, verb: str) -> None:
        can, modern = self._capabilities(model), self.settings.is_modern
        if "completion" not in can:
            raise RequestError(400, f'"{asked.model}" does not support {verb}')
        if asked.tools and "tools" not in can:
            raise RequestError(400, f"{model.parsed.long} does not support tools")
        if asked.think and "thinking" not in can:
            raise RequestError(400, f'"{asked.model}" does not support thinking')
        if asked.has_images and "vision" not in can and modern:
            text = "Multimodal data provided, but model does not support multimodal requests."
            raise _nested(400, text)
        self._check_format(asked.format)

    def _check_format(self, form: object) -> None:
        if form is None or form == "json":
            return
        if not isinstance(form, dict):
            raw = go_json(go_json(form))
            text = f'invalid format: {raw}; expected "json" or a valid JSON Schema object'
            raise RequestError(500, text)
        try:
            value_for(form, Hints(""), rng_of("check"))
        except UnusableSchemaError as exc:
            if not self.settings.is_modern:
                raise RequestError(500, "invalid JSON schema in format") from exc
            text = (
                "Field 'json_schema': \"json_schema\": JSON schema conversion failed:\n"
                f"Unrecognized schema: {go_json(exc.part)}"
            )
            raise _nested(400, text) from exc

    def _too_long(self, tokens: int, num_ctx: int) -> RequestError:
        if not self.settings.is_modern:
            return RequestError(400, "the input length exceeds the context length")
        text = (
            f"request ({tokens} tokens) exceeds the available context size "
            f"({num_ctx} tokens), try increasing it"
        )
        more = {"n_prompt_tokens": tokens, "n_ctx": num_ctx}
        return _nested(400, text, kind="exceed_context_size_error", **more)

    def _num_ctx(self, model: SimulatedModel, asked: Asked) -> int:
        train = model.context_length
        given = asked.runner_options.num_ctx
        return min(given, train) if given else self.settings.automatic_num_ctx(train)

    # ------------------------------------------------------------------ load and unload

    def _load(
        self,
        model: SimulatedModel,
        asked: Asked,
        empty: Mapping[str, Any],
        now: float,
        *,
        end: Mapping[str, Any] | None = None,
    ) -> Exchange:
        ending = {"done": True, "done_reason": "load"} if end is None else end

        def build(_: Ticket) -> object:
            return {**self._head(asked), **empty, **ending}

        exchange = FixedExchange(build)
        job = Job(
            model=model,
            kind="load",
            options=asked.runner_options,
            keep_alive=asked.keep_alive,
        )
        exchange.ticket = self._submit(job, now)
        return exchange

    def _unload(
        self, model: SimulatedModel, asked: Asked, empty: Mapping[str, Any], now: float
    ) -> Reply:
        self.server.unload(model, now)
        ending = {"done": True, "done_reason": "unload"}
        return json_reply({**self._head(asked), **empty, **ending})

    def _head(self, asked: Asked) -> dict[str, Any]:
        return {"model": asked.model, "created_at": date_text(self._wall_clock())}

    # ------------------------------------------------------------------ embeddings

    def _embed(self, asked: Asked, path: str, now: float) -> Reply | Exchange:
        texts = texts_of(asked, path)
        missing = f'model "{asked.model}" not found, try pulling it first'
        model = self._find(asked.model, text=missing)
        asking.check_options(asked.options)
        if not texts:
            return json_reply({"model": asked.model, "embeddings": []})
        if not model.is_embedding and self.settings.is_modern:
            text = "This server does not support embeddings. Start it with `--embeddings`"
            raise RequestError(501, text)
        num_ctx = self._num_ctx(model, asked)
        wanted = Embedding(path, asked, model, texts, num_ctx, self._speed)
        if wanted.is_too_long and asked.body.get("truncate") is False:
            raise RequestError(400, "the input length exceeds the context length")
        self._number += 1
        job = Job(
            model=model,
            kind="embed",
            prompt=((("embed", self._number), wanted.token_count),),
            options=asked.runner_options,
            keep_alive=asked.keep_alive,
        )
        exchange = FixedExchange(wanted.document, is_v1=path.startswith("/v1/"))
        exchange.ticket = self._submit(job, now)
        return exchange

    # ------------------------------------------------------------------ catalogue

    def _find(
        self, name: str, *, shown: str | None = None, text: str | None = None, status: int = 404
    ) -> SimulatedModel:
        parsed = ModelName.parse(name) if name else None
        if name and parsed is None:
            raise RequestError(400, "invalid model name")
        model = self.models.get(parsed.key) if parsed else None
        if model is None:
            missing = f"model '{name if shown is None else shown}' not found"
            raise RequestError(status, text or missing)
        return model

    def _speaker(self, name: str) -> SimulatedModel:
        """Give the model that is to say something, as it was arranged to speak."""
        model, text = self._find(name), self._arranged.repeats
        if text is None:
            return model
        return replace(model, behaviour=replace(model.behaviour, kind="loop", tokens=(text,)))

    def _by_date(self) -> list[SimulatedModel]:
        return sorted(self.models.values(), key=lambda model: model.modified_at, reverse=True)


def _nested(status: int, message: str, kind: str = "invalid_request_error", **more: int
            ) -> RequestError:  # fmt: skip
    """Give an error of the runner: its JSON comes as text inside the server's."""
    inner = {"error": {"code": status, "message": message, "type": kind, **more}}
    return RequestError(status, go_json(inner))


def _is_local(host: str) -> bool:
    """Whether a server bound to loopback answers this ``Host`` header."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]").rstrip(".").lower()
    if name in {"", "localhost"} or name.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_private
