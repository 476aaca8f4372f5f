"""Who gets a row and when, what comes of those who leave, and of a model that breaks."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
import torch

from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.generate.text import Row
from moe_lm.tools.serve import endpoints, scheduler
from moe_lm.tools.serve.errors import ApiError
from moe_lm.tools.serve.metrics import Metrics
from moe_lm.tools.serve.scheduler import Job, Scheduler, Ticket
from tests.texts import text_of
from tests.tools.serve.conftest import MODEL, Serve, Served, connect, head

NEVER_END = {"logit_bias": {str(token): -100 for token in range(8)}}  # no token that ends a text


def ticket(session: Session, rows: int, tokens: int = 6, settings: Settings | None = None) -> Ticket:
    settings = settings or Settings(tokens, GREEDY)
    return Ticket([Job(Row(index, session.tokenizer.decode), [5, 6], settings, ()) for index in range(rows)])


async def finished(asked: Ticket, order: list[str], name: str) -> None:
    while news := await asked.next():
        order += [f"{name}{delta.row}" for delta in news if delta.finish]


@asynccontextmanager
async def working(scheduler: Scheduler, *tickets: Ticket) -> AsyncIterator[None]:
    """The scheduler at work; the tickets are there from the start."""
    for one in tickets:
        scheduler.submit(one)
    scheduler.start(asyncio.get_running_loop())
    yield
    scheduler.close()


async def refused(asked: Ticket, status: int) -> ApiError:
    """The error that ends a ticket."""
    with pytest.raises(ApiError) as error:
        await finished(asked, [], "")
    assert error.value.status_code == status
    return error.value


def run(session: Session, slots: int, asked: dict[str, Ticket]) -> list[str]:
    """The order in which the texts of tickets end that are all there from the start."""

    async def main() -> list[str]:
        scheduler, order = Scheduler(session, slots, 64, 1000, Metrics()), list[str]()
        async with working(scheduler, *asked.values()):
            await asyncio.gather(*(finished(one, order, name) for name, one in asked.items()))
            assert scheduler.running == scheduler.queued == 0
        return order

    return asyncio.run(main())


def test_single_requests_are_served_in_the_order_in_which_they_came(session: Session) -> None:
    names = [f"r{number}-" for number in range(20)]
    assert run(session, 3, {name: ticket(session, 1) for name in names}) == [f"{name}0" for name in names]


def test_a_request_for_many_texts_leaves_room_for_those_behind_it(session: Session) -> None:
    """It has both rows while it is alone; then each who waits gets a row of the two, and it keeps the other."""

    async def main() -> list[str]:
        scheduler, order = Scheduler(session, 2, 64, 100, Metrics()), list[str]()
        many, single = ticket(session, 10), [ticket(session, 1), ticket(session, 1)]
        async with working(scheduler, many):
            ends = [asyncio.create_task(finished(many, order, "many"))]
            while not order:
                await asyncio.sleep(0)
            for name, one in zip("ab", single, strict=True):
                scheduler.submit(one)
                ends.append(asyncio.create_task(finished(one, order, name)))
            await asyncio.gather(*ends)
        return order

    order = asyncio.run(main())
    assert order[:2] == ["many0", "many1"]
    assert order.index("a0") < order.index("b0") < 10
    assert [name for name in order if name.startswith("many")] == [f"many{index}" for index in range(10)]


def test_a_queue_that_is_there_is_shared_row_by_row(session: Session) -> None:
    order = run(session, 2, {"many": ticket(session, 6), "a": ticket(session, 1), "b": ticket(session, 1)})
    assert order == ["many0", "a0", "many1", "b0", "many2", "many3", "many4", "many5"]


def test_of_two_that_want_many_texts_each_has_half_of_the_rows(session: Session) -> None:
    order = run(session, 4, {"a": ticket(session, 12), "b": ticket(session, 12)})
    for half in (order[:12], order[12:]):
        assert sum(name.startswith("b") for name in half) == 6


def test_a_text_without_any_token_left_ends_alone(session: Session) -> None:
    every = tuple((token, float("-inf")) for token in range(1024) if token != 70)
    once = Settings(9, Sampling(temperature=0.0, no_repeat_ngram=1, logit_bias=every))

    async def main() -> None:
        short, long = ticket(session, 1, settings=once), ticket(session, 1, tokens=9)
        async with working(Scheduler(session, 2, 64, 10, Metrics()), short, long):
            deltas = []
            while news := await short.next():
                deltas += news
            assert [(delta.step.token, delta.finish) for delta in deltas] == [(70, None), (None, "exhausted")]
            tokens = 0
            while news := await long.next():
                tokens += len(news)
            assert tokens == 9

    asyncio.run(main())


def test_a_full_queue_is_said_at_once(serve: Serve, session: Session) -> None:
    """One row and two that wait: there is room for three texts, and a fourth is refused until one of them has ended."""

    async def main() -> None:
        asked = Scheduler(session, 1, 64, 2, Metrics())
        three, fourth = ticket(session, 3), ticket(session, 1)
        asked.submit(three)
        with pytest.raises(ApiError, match=r"queue is full \(3 texts wait, at most 2 may\); try again later") as error:
            asked.submit(fourth)
        answer = error.value.response()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert (error.value.body["error"]["code"], error.value.body["error"]["type"]) == (
            "queue_full", "rate_limit_error",
        )  # fmt: skip
        async with working(asked):
            await finished(three, [], "")
            asked.submit(fourth)
            await finished(fourth, [], "")

    asyncio.run(main())
    answer = serve(slots=1, max_queue=2).post("completions", prompt="x", n=4)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_texts"


def test_100_clients_at_once_lose_nothing(served: Served, session: Session) -> None:
    """Four rows, streams and whole answers, of one text and of three, and each gets what it would get alone."""
    draw = random.Random(1)
    asked = [
        {"prompt": "import os"[: draw.randrange(9)], "max_tokens": draw.randrange(1, 25), "seed": number}
        | {"stream": bool(number % 2), "n": 3 if number % 10 == 0 else 1}
        for number in range(100)
    ]
    every = httpx.Limits(max_connections=100)
    with httpx.Client(base_url=served.url, timeout=120, limits=every) as client, ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda body: client.post("/v1/completions", json=body), asked))
    for body, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200
        texts = [""] * body["n"]
        if body["stream"]:
            assert answer.text.endswith("data: [DONE]\n\n")
            for line in answer.text.split("\n\n")[:-2]:
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[choice["index"]] += choice["text"]
        else:
            texts = [choice["text"] for choice in answer.json()["choices"]]
        for index, text in enumerate(texts):
            settings = Settings(body["max_tokens"], Sampling(temperature=1.0), seed=body["seed"] + index)
            assert text == text_of(session.complete(body["prompt"], settings))
    assert served.scheduler.running == served.scheduler.queued == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(serve: Serve, stream: bool) -> None:
    """One that is being written, and one that waits behind it."""
    served = serve(slots=1)
    body = json.dumps({"prompt": "x", "max_tokens": 120, "n": 100, "stream": stream} | NEVER_END)
    first, second = connect(served.url), connect(served.url)
    first.sendall(head(len(body)) + body.encode())
    served.wait(lambda: served.scheduler.running == 1)
    second.sendall(head(len(body)) + body.encode())
    served.wait(lambda: served.metric("moe_lm_queued_rows") > 150)
    second.close()
    served.wait(lambda: served.metric("moe_lm_queued_rows") < 100)
    first.close()
    served.wait(lambda: served.metric("moe_lm_queued_rows") == served.metric("moe_lm_running_rows") == 0)
    assert served.metric("moe_lm_generated_tokens_total") < 12000
    status = served.metric('moe_lm_requests_total{endpoint="/v1/completions",status="499"}')
    assert status == 2
    assert served.post("completions", prompt="x", max_tokens=3).status_code == 200


def test_a_client_that_does_not_read_is_dropped_before_its_answer_takes_memory(serve: Serve) -> None:
    """What it asks for comes to 15 MB; what the system's buffers do not take is 3 MB at most."""
    served = serve(slots=32, max_queue=200)
    body = json.dumps({"prompt": "x", "max_tokens": 120, "n": 128, "stream": True, "logprobs": 20} | NEVER_END)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = served.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(head(len(body)) + body.encode())
        served.wait(lambda: served.scheduler.running > 0)
        served.wait(lambda: served.scheduler.running + served.scheduler.queued == 0)
        assert served.metric("moe_lm_generated_tokens_total") < 128 * 120
        status = 'moe_lm_requests_total{endpoint="/v1/completions",status="499"}'
        served.wait(lambda: served.metric(status) == 1)


def test_a_client_that_does_not_read_is_dropped_when_its_time_is_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "LAST_WORDS", 0.1)
    monkeypatch.setattr(scheduler, "MOST_UNREAD", 1 << 40)
    served = serve(slots=32, max_queue=200, timeout=3.0)
    body = json.dumps({"prompt": "x", "max_tokens": 120, "n": 128, "stream": True, "logprobs": 20} | NEVER_END)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = served.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(head(len(body)) + body.encode())
        status = 'moe_lm_requests_total{endpoint="/v1/completions",status="504"}'
        served.wait(lambda: served.metric(status) == 1)


@pytest.fixture
def broken(serve: Serve, session: Session) -> Iterator[Served]:
    """A server whose model gives NaN after the token 7."""
    weight = session.model.model.embed_tokens.weight
    before = weight[7].clone()
    with torch.no_grad():
        weight[7] = float("nan")
    yield serve()
    with torch.no_grad():
        weight[7] = before


@pytest.mark.parametrize("stream", [False, True])
def test_broken_logits_end_what_runs_and_not_the_server(broken: Served, stream: bool) -> None:
    body = {"prompt": [5], "max_tokens": 100, **NEVER_END, "stream": True}
    ended = []

    def bystander() -> None:
        with pytest.raises(openai.APIError) as error:
            for _ in broken.openai.completions.create(model=MODEL, **body, n=100):
                pass
        ended.append(error.value)

    other = threading.Thread(target=bystander)
    other.start()
    broken.wait(lambda: broken.scheduler.running > 0)
    answer = broken.post("completions", prompt=[7], max_tokens=3, stream=stream)
    other.join()
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "model_error")
    assert "not numbers" in error["message"]
    assert "not numbers" in str(ended[0])
    assert broken.post("completions", prompt=[5], max_tokens=3, **NEVER_END).status_code == 200
    assert broken.http.get("/health").status_code == 200


def test_a_row_that_cannot_begin_fails_alone(session: Session) -> None:
    """What is wrong with it was not seen before; another text of its request has begun."""

    async def main() -> None:
        scheduler = Scheduler(session, 3, 64, 10, Metrics())
        other, wrong = ticket(session, 1, 9), ticket(session, 2, 50)
        wrong.waiting[1] = wrong.waiting[1]._replace(prompt=[])
        async with working(scheduler, other, wrong):
            assert "no token to start from" in (await refused(wrong, 500)).message
            order = list[str]()
            await finished(other, order, "other")
            assert order == ["other0"]
            scheduler.submit(later := ticket(session, 3))
            await finished(later, order, "later")
            assert order[1:] == ["later0", "later1", "later2"]

    asyncio.run(main())


def test_a_decoder_that_cannot_go_on_lets_nobody_wait(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a new cache after a step that failed: the thread ends, and all are told."""

    def no_memory() -> None:
        raise RuntimeError("out of memory")

    async def main() -> None:
        scheduler = Scheduler(session, 1, 64, 10, Metrics())
        monkeypatch.setattr(scheduler._decoder, "step", no_memory)
        monkeypatch.setattr(scheduler._decoder, "clear", no_memory)
        running, waiting = ticket(session, 1), ticket(session, 1)
        async with working(scheduler, running, waiting):
            await refused(running, 500)
            await refused(waiting, 503)
            assert not scheduler.healthy
            with pytest.raises(ApiError):
                scheduler.submit(ticket(session, 1))

    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)  # which prints the traceback
        asyncio.run(main())


def test_metrics(serve: Serve) -> None:
    served = serve()
    answer = served.post("completions", prompt=[5, 6, 7], max_tokens=10, n=2, **NEVER_END)
    assert answer.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    served.post("completions", prompt=5)
    served.http.get("/nothing")
    assert served.metric("moe_lm_generated_tokens_total") == 20
    assert served.metric("moe_lm_prompt_tokens_total") == 3
    for endpoint, status in (("/v1/completions", 200), ("/v1/completions", 400), ("other", 404)):
        assert served.metric(f'moe_lm_requests_total{{endpoint="{endpoint}",status="{status}"}}') == 1
    assert served.metric("moe_lm_time_to_first_token_seconds_count") == 1
    assert served.metric('moe_lm_request_seconds_count{endpoint="/v1/completions"}') == 2
    assert served.metric("moe_lm_tokens_per_second") == 2
    assert served.metric("moe_lm_slots") == 4


def test_an_engine_that_stops_ends_what_is_left(session: Session) -> None:
    async def main() -> None:
        scheduler = Scheduler(session, 1, 64, 10, Metrics())
        running, waiting = ticket(session, 1, 60), ticket(session, 1, 60)
        async with working(scheduler):
            scheduler.submit(running)
            scheduler.submit(waiting)
        await refused(running, 503)
        await refused(waiting, 503)
        with pytest.raises(ApiError):
            scheduler.submit(ticket(session, 1))

    asyncio.run(main())
