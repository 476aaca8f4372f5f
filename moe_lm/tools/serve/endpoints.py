"""The endpoints that write text: from a request's body to its answer."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from moe_lm.common.errors import UsageError
from moe_lm.generate.session import Session
from moe_lm.generate.text import Delta, Row
from moe_lm.tools.serve.answers import Answer, ChatAnswer, CompletionAnswer, dumps, written
from moe_lm.tools.serve.errors import GONE, ApiError, no_such_model
from moe_lm.tools.serve.limits import Limits
from moe_lm.tools.serve.metrics import Metrics
from moe_lm.tools.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from moe_lm.tools.serve.scheduler import Job, Scheduler, Ticket

MOST_VALUES = 1 << 20  # log-probabilities and experts of a whole answer: about 25 MB
LAST_WORDS = 5.0  # seconds that a client has to read why its answer ends


class PromptIds(NamedTuple):
    ids: Sequence[int]
    echo: str = ""  # comes before the text


class Endpoints:
    """Both endpoints of a server whose clients call it `model`."""

    def __init__(self, session: Session, scheduler: Scheduler, limits: Limits, metrics: Metrics, model: str) -> None:
        self.session, self.scheduler, self.limits, self.metrics, self.model = session, scheduler, limits, metrics, model
        self.name = functools.cache(lambda token: session.tokenizer.decode([token], skip_special=False))

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self._check(body, len(body.prompt))
        return await self._answer(request, body, await run_in_threadpool(self._prompts, body), CompletionAnswer)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check(body, 1)
        return await self._answer(request, body, await run_in_threadpool(self._chat_prompt, body), ChatAnswer)

    def _check(self, body: GenerationRequest, prompts: int) -> None:
        if body.model not in (None, self.model):
            raise no_such_model(body.model, self.model)
        most = self.limits.max_tokens
        for name in ("max_tokens", "max_completion_tokens"):
            wanted = getattr(body, name) if name in body.model_fields_set else None
            if most is not None and wanted is not None and wanted > most:
                raise ApiError(400, f"{name}={wanted} is more than this server gives; at most {most}", name)
        if prompts * body.n > self.scheduler.most:
            raise ApiError(
                400,
                f"the request asks for {prompts * body.n} texts, prompts times n, and this server takes "
                f"{self.scheduler.most} at a time; ask for fewer",
                "n",
                "too_many_texts",
            )
        for token, _ in body.logit_bias:
            if token >= self.session.tokenizer.vocab_size:
                message = f"logit_bias names the token {token}; the ids end at {self.session.tokenizer.vocab_size - 1}"
                raise ApiError(400, message, "logit_bias")

    def _prompts(self, body: CompletionRequest) -> list[PromptIds]:
        """The prompts of a body; a text begins with the token that begins a document."""
        tokenizer = self.session.tokenizer
        texts = [item for item in body.prompt if isinstance(item, str)]
        try:
            of_texts = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(texts)] if texts else []
        except UsageError as error:
            raise ApiError(400, str(error), "prompt") from error
        prompts = of_texts or [item for item in body.prompt if isinstance(item, list)]
        for ids in prompts:
            self._check_prompt(ids, "prompt")
        if not body.echo:
            return [PromptIds(ids) for ids in prompts]
        return [PromptIds(*both) for both in zip(prompts, texts or map(tokenizer.decode, prompts), strict=True)]

    def _chat_prompt(self, body: ChatRequest) -> list[PromptIds]:
        messages = [message.for_template() for message in body.messages]
        try:
            ids, _ = self.session.tokenizer.encode_chat(messages, add_generation_prompt=True)
        except UsageError as error:
            raise ApiError(400, str(error), "messages") from error
        self._check_prompt(ids, "messages")
        return [PromptIds(ids)]

    def _check_prompt(self, ids: Sequence[int], param: str) -> None:
        if len(ids) > self.scheduler.capacity:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, more than the context's {self.scheduler.capacity}; shorten it",
                param,
                "context_length_exceeded",
            )
        if min(ids) < 0 or max(ids) >= self.session.tokenizer.vocab_size:
            last = self.session.tokenizer.vocab_size - 1
            raise ApiError(400, f"the prompt has ids from {min(ids)} to {max(ids)}; expected 0 to {last}", param)

    async def _answer(
        self, request: Request, body: GenerationRequest, prompts: Sequence[PromptIds], kind: type[Answer]
    ) -> Response:
        capacity = self.scheduler.capacity
        max_tokens = min(body.most_tokens or capacity, self.limits.max_tokens or capacity)
        longest = min(max_tokens, capacity - min(len(prompt.ids) for prompt in prompts) + 1)
        values = len(prompts) * body.n * longest * self._values(body)
        if values > MOST_VALUES and not body.stream:
            raise ApiError(
                400,
                f"the answer could have {values} log-probabilities and experts, more than {MOST_VALUES}; ask for fewer "
                "texts, tokens or logprobs, or for a stream",
                code="answer_too_large",
            )
        ticket = Ticket(self._jobs(body, prompts, max_tokens))
        answer = kind(body, self.model, self.name, sum(len(prompt.ids) for prompt in prompts))
        if body.stream:
            return await self._stream(request, ticket, answer)
        deltas: list[Delta] = []
        async with self._served(request, ticket):
            news = await self._first(ticket, answer)
            while news:
                deltas += news
                news = await ticket.next()
        return await run_in_threadpool(lambda: Response(answer.whole(deltas), media_type="application/json"))

    def _values(self, body: GenerationRequest) -> int:
        """The number of values that a token has beside its text."""
        experts = len(self.session.model.moe_layers) * self.session.model.config.num_experts_per_tok
        return (0 if body.alternatives is None else 1 + body.alternatives) + (experts if body.routing else 0)

    async def _stream(self, request: Request, ticket: Ticket, answer: Answer) -> Response:
        """Server-sent events. An error before the first token still has its own status."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._served(request, ticket))
            news = await self._first(ticket, answer)
            events = self._events(request, ticket, answer, news, stack.pop_all())
        return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _events(
        self, request: Request, ticket: Ticket, answer: Answer, news: list[Delta], served: AsyncExitStack
    ) -> AsyncIterator[str]:
        tokens, opening = 0, _events_of(answer.opening(ticket.rows))
        async with served:
            try:
                while news:
                    tokens += written(news)
                    if text := opening + await run_in_threadpool(_news, answer, news):
                        yield text
                    opening, news = "", await ticket.next()
            except ApiError as error:
                request.scope["moe_lm.status"] = error.status_code
                yield _events_of([error.body])
                return
        if answer.include_usage:
            yield _events_of([answer.usage_chunk(tokens)])
        yield "data: [DONE]\n\n"

    @asynccontextmanager
    async def _served(self, request: Request, ticket: Ticket) -> AsyncIterator[None]:
        """Keep a ticket in the scheduler until the client goes away, does not read, or the time is up."""
        loop, close = asyncio.get_running_loop(), request.scope.get("state", {}).get("close", lambda: None)
        timers: list[asyncio.TimerHandle] = []

        def end(error: ApiError) -> None:
            ticket.put(error)
            self.scheduler.leave(ticket)

        async def end_when_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            end(ApiError(GONE, "the client went away"))

        def end_unread() -> None:
            end(ApiError(GONE, "the client does not read its answer"))
            close()

        def end_late() -> None:
            end(late)
            timers.append(loop.call_later(LAST_WORDS, close))  # a client that does not read would stay for ever

        limit = self.limits.timeout
        late = ApiError(504, f"the answer was not ready within the server's {limit:g} s; ask for less", code="timeout")
        ticket.overflow = end_unread
        self.scheduler.submit(ticket)
        timers.append(loop.call_later(limit, end_late))
        watch = asyncio.create_task(end_when_gone())
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            watch.cancel()
            self.scheduler.leave(ticket)

    async def _first(self, ticket: Ticket, answer: Answer) -> list[Delta]:
        waited = time.monotonic()
        news = await ticket.next()
        self.metrics.first_token_seconds.observe(time.monotonic() - waited)
        self.metrics.prompt_tokens.inc(answer.prompt_tokens)
        return news

    def _jobs(self, body: GenerationRequest, prompts: Sequence[PromptIds], max_tokens: int) -> list[Job]:
        """Text j of prompt i draws with `seed + i * n + j`, as in `moe-lm sample --num`."""
        tokenizer, settings, jobs = self.session.tokenizer, body.settings(max_tokens), []
        for index in range(len(prompts) * body.n):
            prompt = prompts[index // body.n]
            row = Row(index, tokenizer.decode, body.stop, prefix=prompt.echo)
            jobs.append(Job(row, prompt.ids, settings.of_row(index), tokenizer.stop_ids))
        return jobs


def _news(answer: Answer, deltas: Sequence[Delta]) -> str:
    """The events of deltas; there are many when a client reads slowly."""
    return _events_of(answer.chunks(deltas))


def _events_of(chunks: Sequence[dict[str, Any]]) -> str:
    return "".join(f"data: {dumps(chunk)}\n\n" for chunk in chunks)
