"""`puna bench`: metrics by value, request sets, the engine's commands, and the client against a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from puna.cli.app import app
from puna.cli.measure.http_client import Address
from puna.cli.measure.load_client import arrival_times
from puna.cli.measure.request_sets import (
    RandomSet,
    dataset_requests,
    random_id_requests,
    random_text_requests,
)
from puna.cli.measure.timelines import Timeline, details, summarise, table
from puna.cria import FOLDER as CRIA
from puna.errors import ParameterError, PunaError
from puna.text.tokenizer import load_tokenizer

# ------------------------------------------------------------------------------------------------ metrics

TIMELINES = [
    Timeline(prompt_len=10, output_len=3, sent=5.0, chunk_times=(5.1, 5.2, 5.4)),
    Timeline(prompt_len=20, output_len=5, sent=5.0, chunk_times=(5.3, 5.5), text="ab"),  # two at once
    Timeline(prompt_len=30, output_len=1, sent=5.45, chunk_times=(6.25,)),
    Timeline(prompt_len=40, output_len=2, sent=5.0, chunk_times=(5.1,), error="HTTP 500"),
]


def test_metrics_of_a_timeline_made_by_hand() -> None:
    result = summarise(
        TIMELINES,
        2.0,
        metrics=["ttft", "tpot", "itl", "e2el"],
        percentiles=[50, 99.5],
        goodput={"ttft": 350, "tpot": 100},
    )
    expected = {
        "duration": 2.0,
        "completed": 3,
        "failed": 1,
        "total_input_tokens": 60,
        "total_output_tokens": 9,
        "request_throughput": 1.5,
        "request_goodput": 0.5,  # the first takes 150 ms a token, the third 800 ms to its first
        "output_throughput": 4.5,
        "total_token_throughput": 34.5,
        "max_output_tokens_per_s": 8.0,
        "max_concurrent_requests": 2,
        "mean_ttft_ms": 400.0,
        "median_ttft_ms": 300.0,
        "std_ttft_ms": (260_000 / 3) ** 0.5,
        "p50_ttft_ms": 300.0,
        "p99.5_ttft_ms": 795.0,
        "mean_tpot_ms": 100.0,  # 150 and 50
        "median_tpot_ms": 100.0,
        "std_tpot_ms": 50.0,
        "p50_tpot_ms": 100.0,
        "p99.5_tpot_ms": 149.5,
        "mean_itl_ms": 500 / 3,  # 100, 200, 200
        "median_itl_ms": 200.0,
        "std_itl_ms": (20_000 / 9) ** 0.5,
        "p50_itl_ms": 200.0,
        "p99.5_itl_ms": 200.0,
        "mean_e2el_ms": 1700 / 3,  # 400, 500, 800
        "median_e2el_ms": 500.0,
        "std_e2el_ms": (260_000 / 9) ** 0.5,
        "p50_e2el_ms": 500.0,
        "p99.5_e2el_ms": 797.0,
    }
    assert result == {name: pytest.approx(value) for name, value in expected.items()}


def test_metrics_when_every_request_failed() -> None:
    result = summarise(TIMELINES[3:], 1.0)
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 1, 0.0)
    assert result["output_throughput"] == result["max_concurrent_requests"] == 0


def test_a_request_that_ends_as_another_begins_makes_room() -> None:
    one = Timeline(prompt_len=1, output_len=1, sent=0.0, chunk_times=(1.0,))
    two = Timeline(prompt_len=1, output_len=1, sent=1.0, chunk_times=(2.0,))
    assert summarise([one, two], 2.0)["max_concurrent_requests"] == 1


def test_details_and_table() -> None:
    found = details(TIMELINES)
    assert found["input_lens"] == [10, 20, 30, 40]
    assert found["itls"][:2] == [pytest.approx([0.1, 0.2]), pytest.approx([0.2])]
    assert (found["generated_texts"][1], found["errors"]) == ("ab", ["", "", "", "HTTP 500"])
    lines = [line.split() for line in table(summarise(TIMELINES, 2.0))]
    assert ["Output", "tokens/s", "4.50"] in lines
    assert ["median", "300.00"] in lines


# ----------------------------------------------------------------------------------------------- requests


def test_the_seed_makes_the_set() -> None:
    def made(seed: int) -> list[Any]:
        wanted = RandomSet(
            num_prompts=40, input_len=10, output_len=20, range_ratio=0.5, prefix_len=3, seed=seed
        )
        return random_id_requests(wanted, range(100, 110))

    assert made(1) == made(1) != made(2)
    prompts = [request.prompt for request in made(1)]
    assert {tuple(prompt[:3]) for prompt in prompts} == {tuple(prompts[0][:3])}
    assert {len(prompt) - 3 for prompt in prompts} == set(range(5, 16))  # 10 * (1 - 0.5) to 10 * (1 + 0.5)
    assert {request.output_len for request in made(1)} <= set(range(10, 31))
    assert {i for prompt in prompts for i in prompt} == set(range(100, 110))


def test_random_text_has_the_length_that_it_says() -> None:
    tokenizer = load_tokenizer(CRIA)
    for request in random_text_requests(RandomSet(num_prompts=5, input_len=30, output_len=4), tokenizer):
        assert len(tokenizer.encode(str(request.prompt))) == request.prompt_len
        assert request.prompt_len == 31  # with BOS
    (words,) = random_text_requests(RandomSet(num_prompts=1, input_len=30, output_len=4), None)
    assert len(str(words.prompt).split()) == words.prompt_len == 30


def test_a_file_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one two"}\n\n{"prompt": "three", "output_tokens": 3}\n')
    found = dataset_requests(file, None, 7, None)
    assert [(r.prompt, r.prompt_len, r.output_len) for r in found] == [("one two", 2, 7), ("three", 1, 3)]
    assert len(dataset_requests(file, 1, 7, None)) == 1
    with pytest.raises(PunaError, match="holds 2 prompts, and 3 are wanted"):
        dataset_requests(file, 3, 7, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompt 1: is not JSON"),
        ('{"text": "a"}', "must be an object with a text 'prompt'"),
        ('{"prompt": "a", "system": "b"}', "unknown key 'system'"),
        ('{"prompt": "a", "output_tokens": true}', "output_tokens must be a whole number"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(PunaError, match=message):
        dataset_requests(tmp_path / "p.jsonl", None, 7, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"range_ratio": 1.0}, "range_ratio must be in"),
        ({"prefix_len": -1}, "prefix_len must not be negative"),
    ],
)
def test_bad_sizes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        RandomSet(**{"num_prompts": 1, "input_len": 1, "output_len": 1, **values})


def test_arrivals() -> None:
    assert list(islice(arrival_times(float("inf"), 1.0, 0), 3)) == [0.0, 0.0, 0.0]
    times = list(islice(arrival_times(4.0, 1.0, 0), 4001))
    assert times == list(islice(arrival_times(4.0, 1.0, 0), 4001))
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)  # Poisson


# --------------------------------------------------------------------------------------- the two commands


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="puna")


@pytest.mark.parametrize("mode", [[], ["--async-engine"]])
def test_throughput(tmp_path: Path, mode: list[str]) -> None:
    out = tmp_path / "out.json"
    sizes = ["--num-prompts", 3, "--input-len", 5, "--output-len", 4, "--max-model-len", 64]
    result = bench("throughput", "--model", "cria", *sizes, *mode, "--output-json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["num_requests"], found["total_num_tokens"], found["completed"]) == (3, 27, 3)
    assert found["requests_per_second"] == pytest.approx(3 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(27 / found["elapsed_time"])
    assert found["max_concurrent_requests"] == 3
    assert 0 < found["median_ttft_ms"] <= found["elapsed_time"] * 1000
    assert found["p99_itl_ms"] > 0
    assert "Output tokens/s" in result.stdout


def test_throughput_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Who are you?", "output_tokens": 2}\n')
    out = tmp_path / "out.json"
    assert bench("throughput", "--dataset-path", file, "--output-json", out).exit_code == 0
    prompt_len = len(load_tokenizer(CRIA).encode("Who are you?"))
    assert json.loads(out.read_text())["total_num_tokens"] == prompt_len + 2


def test_what_does_not_fit_is_refused() -> None:
    result = bench(
        "throughput", "--num-prompts", 1, "--input-len", 60, "--output-len", 5, "--max-model-len", 64
    )
    assert isinstance(result.exception, ParameterError)
    assert "60 prompt tokens and 5 output tokens do not fit into max_model_len 64" in str(result.exception)


def test_latency(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    rounds = ["--num-iters-warmup", 1, "--num-iters", 3, "--output-json", out]
    sizes = ["--batch-size", 2, "--input-len", 4, "--output-len", 3, "--max-model-len", 32]
    assert bench("latency", *sizes, *rounds).exit_code == 0
    found = json.loads(out.read_text())
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]


# --------------------------------------------------------------------------------------------- the client


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-style server; the model's name says what it does."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict[str, Any]] = []
    keys: list[str | None] = []

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self._send_json(200, {"object": "list", "data": [{"id": "fine"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        self.keys.append(self.headers.get("Authorization"))
        model = body["model"]
        if model == "refuses" or (model == "sometimes" and len(self.bodies) % 2):
            self._send_json(400, {"error": {"message": "max_tokens is too large"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in self._chat() if "messages" in body else self._completion(model):
            self._chunk(line)
        if model == "breaks":
            self.close_connection = True
        else:
            self._chunk("")

    def _completion(self, model: str) -> Iterator[str]:
        yield ": keep-alive\n\n"
        yield _event({"choices": [{"text": "a", "finish_reason": None}]})
        yield 'data: {"choices": [{"te'  # an event in two pieces, and lines that end in CRLF
        yield 'xt": "\u00e9", "finish_reason": null}]}\r\n\r\n'
        if model == "errs":
            yield _event({"error": {"message": "out of blocks"}})
        if model in ("breaks", "ends early", "errs"):
            return
        yield _event({"choices": [{"text": "", "finish_reason": "length"}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 4}})
        yield "data: [DONE]\n\n"

    def _chat(self) -> Iterator[str]:
        yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        yield _event({"choices": [{"delta": {"content": "x"}, "finish_reason": None}]})
        yield _event({"choices": [{"delta": {"content": "y"}, "finish_reason": "stop"}]})
        yield "data: [DONE]\n\n"

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def _send_json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of a running `Handler`, which has seen nothing yet."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(Handler, "bodies", [])
    monkeypatch.setattr(Handler, "keys", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def serve(url: str, *arguments: object) -> Result:
    sizes = ["--num-prompts", 4, "--input-len", 6, "--output-len", 4]
    return bench("serve", "--base-url", url, *sizes, *arguments)


def test_serve(server: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = serve(server, "--max-concurrency", 2, "--save-detailed", "--output-json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["model_id"]) == (4, 0, "fine")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (44, 16)  # as the server counts
    assert found["generated_texts"] == ["a\u00e9"] * 4
    assert [len(gaps) for gaps in found["itls"]] == [1] * 4
    assert found["request_rate"] == "inf"
    assert 1 <= found["max_concurrent_requests"] <= 2
    assert all(ttft > 0 for ttft in found["ttfts"])
    body = Handler.bodies[0]
    assert len(body.pop("prompt").split()) == 6
    assert body == {
        "model": "fine",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert Handler.keys == [None] * 4


def test_serve_puts_in_what_it_is_given(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = ["--temperature", 0.5, "--ignore-eos", "--extra-body", '{"top_k": 3}', "--num-warmups", 2]
    assert serve(server, "--model", "mine", "--tokenizer", "cria", *options).exit_code == 0
    assert len(Handler.bodies) == 6
    assert Handler.bodies[0]["prompt"] == Handler.bodies[1]["prompt"]
    assert {key: Handler.bodies[-1][key] for key in ("model", "temperature", "ignore_eos", "top_k")} == {
        "model": "mine",
        "temperature": 0.5,
        "ignore_eos": True,
        "top_k": 3,
    }
    assert set(Handler.keys) == {"Bearer secret"}


def test_serve_chats(server: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = serve(server, "--backend", "openai-chat", "--save-detailed", "--output-json", out)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert found["generated_texts"] == ["xy"] * 4
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (
        24,
        8,
    )  # there is no usage
    assert Handler.bodies[0]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("refuses", 'HTTP 400 Bad Request: {"error": {"message": "max_tokens is too large"}}'),
        ("breaks", "the server closed the connection in the middle of the answer"),
        ("ends early", "the stream broke off: it ended before its answer did"),
        ("errs", 'the stream holds an error: {"error": {"message": "out of blocks"}}'),
    ],
)
def test_failures_are_counted_and_shown(server: str, tmp_path: Path, model: str, message: str) -> None:
    out = tmp_path / "out.json"
    result = serve(server, "--model", model, "--output-json", out)
    assert result.exit_code == 1
    assert f"Failed, 4 of 4: {message}" in result.stderr
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (0, 4, 0)


def test_some_failures_are_no_failure_of_the_run(server: str, tmp_path: Path) -> None:
    result = serve(
        server, "--model", "sometimes", "--max-concurrency", 1, "--save-result", "--result-dir", tmp_path
    )
    assert result.exit_code == 0
    assert "Failed, 2 of 4" in result.stderr
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("openai-infqps-concurrency1-sometimes-2")
    assert json.loads(file.read_text())["failed"] == 2


def test_no_server() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    result = serve(url)
    assert isinstance(result.exception, PunaError)
    assert str(result.exception) == f"cannot connect to {url}: Connection refused"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request-rate", "0"], "request_rate and burstiness must be above 0"),
        (["--max-concurrency", "0"], "max_concurrency must be at least 1"),
        (["--percentile-metrics", "tft"], "percentile_metrics: no 'tft'"),
        (["--metric-percentiles", "101"], "metric_percentiles must be from 0 to 100"),
        (["--goodput", "itl:3"], "goodput: no 'itl'"),
        (["--extra-body", "[]"], "extra_body must be a JSON object"),
    ],
)
def test_bad_options_are_named(server: str, arguments: list[str], message: str) -> None:
    result = serve(server, *arguments)
    assert isinstance(result.exception, ParameterError)
    assert message in str(result.exception)
    assert Handler.bodies == []


def test_addresses() -> None:
    assert str(Address.from_url("http://[::1]:8000/api/")) == "http://[::1]:8000/api"
    assert Address.from_url("https://example.org").port == 443
    for wrong in ("127.0.0.1:8000", "ftp://a", "http://a:b"):
        with pytest.raises(ParameterError, match="base_url"):
            Address.from_url(wrong)
