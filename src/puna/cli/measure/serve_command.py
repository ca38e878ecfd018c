"""`puna bench serve`: measure a server that speaks OpenAI's API, Puna's or any other.

Options, results and metrics have the names of `vllm bench serve` (0.33). Nothing here loads a model, so that
the client takes little from a server on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.errors import ParameterError, PunaError

if TYPE_CHECKING:
    from puna.cli.measure.load_client import Client
    from puna.cli.measure.request_sets import BenchRequest
    from puna.cli.measure.timelines import Timeline


class BackendName(StrEnum):
    """Name what is spoken: completions or chat completions."""

    openai = "openai"
    openai_chat = "openai-chat"


# The options, in the order of the help.
BaseUrl = Annotated[str, typer.Option(metavar="URL", help="Where the server is.")]
Backend = Annotated[
    BackendName, typer.Option(metavar="NAME", help="openai: completions; openai-chat: chats.")
]
Endpoint = Annotated[str | None, typer.Option(metavar="PATH", help="Route, where it is not the usual one.")]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name for the server; else the first that it lists.")
]
TokenizerOf = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Make prompts of exact lengths with it; else of common words."),
]
DatasetPath = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help='Prompts as JSONL, {"prompt": TEXT} a line; else random text.'),
]
NumPrompts = Annotated[
    int | None, typer.Option(metavar="N", help="Requests; 1000, or all that the file holds.")
]
InputLen = Annotated[int, typer.Option(metavar="N", help="Tokens of a random prompt.")]
OutputLen = Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")]
RangeRatio = Annotated[float, typer.Option(metavar="R", help="Vary lengths from 1-R to 1+R times these.")]
PrefixLen = Annotated[int, typer.Option(metavar="N", help="Tokens put in front that all prompts share.")]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed makes the same requests and arrivals.")]
RequestRate = Annotated[
    float, typer.Option(metavar="R", help="Requests that arrive in a second; inf: all at once.")
]
Burstiness = Annotated[
    float, typer.Option(metavar="X", help="1: arrivals are random; less: in bursts; more: even.")
]
MaxConcurrency = Annotated[int | None, typer.Option(metavar="N", help="Most requests that run at once.")]
NumWarmups = Annotated[
    int, typer.Option(min=0, metavar="N", help="Requests sent before, which do not count.")
]
Temperature = Annotated[float | None, typer.Option(metavar="T", help="Not given: the server decides.")]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Ask for full lengths (vLLM, Puna; OpenAI refuses it).")
]
ExtraBody = Annotated[
    str | None, typer.Option(metavar="JSON", help="An object of more fields for each request.")
]
PercentileMetrics = Annotated[
    str, typer.Option(metavar="NAMES", help="Which to print: ttft, tpot, itl, e2el.")
]
MetricPercentiles = Annotated[str, typer.Option(metavar="PS", help="Percentiles of these, such as 50,99.")]
Goodput = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME:MS", help="Count requests within this limit; can be repeated."),
]
Timeout = Annotated[float, typer.Option(metavar="S", help="Seconds after which a request failed.")]
OutputJson = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to FILE too.")]
SaveResult = Annotated[
    bool, typer.Option("--save-result", help="Write them to a file named after what was measured.")
]
SaveDetailed = Annotated[bool, typer.Option("--save-detailed", help="Write what each request did, too.")]
ResultDir = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for --save-result.")]


def serve(
    base_url: BaseUrl = "http://127.0.0.1:8000",
    backend: Backend = BackendName.openai,
    endpoint: Endpoint = None,
    model: Model = None,
    tokenizer: TokenizerOf = None,
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = None,
    input_len: InputLen = 1024,
    output_len: OutputLen = 128,
    random_range_ratio: RangeRatio = 0.0,
    random_prefix_len: PrefixLen = 0,
    seed: Seed = 0,
    request_rate: RequestRate = math.inf,
    burstiness: Burstiness = 1.0,
    max_concurrency: MaxConcurrency = None,
    num_warmups: NumWarmups = 0,
    temperature: Temperature = None,
    ignore_eos: IgnoreEos = False,
    extra_body: ExtraBody = None,
    percentile_metrics: PercentileMetrics = "ttft,tpot,itl",
    metric_percentiles: MetricPercentiles = "99",
    goodput: Goodput = None,
    timeout: Timeout = 3600,
    output_json: OutputJson = None,
    save_result: SaveResult = False,
    save_detailed: SaveDetailed = False,
    result_dir: ResultDir = Path("."),
) -> None:
    """Measure a server that speaks OpenAI's API.

    Requests are streamed, and tokens counted as the server counts them. OPENAI_API_KEY is sent where it is
    set. Ends with 1 when every request failed.
    """
    shown: dict[str, Any] = {
        "metrics": _metrics(percentile_metrics),
        "percentiles": _percentiles(metric_percentiles),
        "goodput": _goodput(goodput or []),
    }
    extra = _extra(extra_body, temperature=temperature, ignore_eos=ignore_eos)
    lengths = (input_len, output_len, random_range_ratio, random_prefix_len)
    requests = _requests(tokenizer, dataset_path, num_prompts, lengths, seed)
    arrivals: dict[str, Any] = {
        "request_rate": request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
    }
    server = {"base_url": base_url, "backend": backend.value, "endpoint": endpoint, "model": model}
    settings = {"extra": extra, "timeout": timeout}
    measured = asyncio.run(_measure(requests, server, settings, num_warmups, seed=seed, **arrivals))
    found, result = _result(*measured, tokenizer, shown, arrivals, save_detailed)
    _report(measured[1], found, result, output_json, result_dir if save_result else None)


async def _measure(
    requests: Sequence[BenchRequest],
    server: Mapping[str, Any],
    settings: Mapping[str, Any],
    num_warmups: int,
    **arrivals: Any,
) -> tuple[Client, list[Timeline], float]:
    """Find the model, warm up, then send all requests."""
    from puna.cli.measure.http_client import Address, connect
    from puna.cli.measure.load_client import ENDPOINTS, Client, first_model, send_all

    address = Address.from_url(server["base_url"])
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    await connect(address)
    client = Client(
        address=address,
        backend=server["backend"],
        endpoint=server["endpoint"] or ENDPOINTS[server["backend"]],
        model=server["model"] or await first_model(address, headers),
        headers=headers,
        **settings,
    )
    _allow_sockets(len(requests))
    if num_warmups:
        await send_all([requests[0]] * num_warmups, client.send)
    return client, *await send_all(requests, client.send, **arrivals)


def _requests(
    tokenizer: str | None,
    dataset_path: Path | None,
    num_prompts: int | None,
    lengths: tuple[int, int, float, int],
    seed: int,
) -> list[BenchRequest]:
    """Read or make the requests; `lengths` are those of prompt and answer, their ratio, and the prefix's."""
    from puna.cli.measure.request_sets import RandomSet, dataset_requests, random_text_requests

    input_len, output_len, range_ratio, prefix_len = lengths
    random_set = RandomSet(
        num_prompts=1000 if num_prompts is None else num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        prefix_len=prefix_len,
        seed=seed,
    )
    loaded = None
    if tokenizer is not None:
        from puna.locate import find_model
        from puna.text.tokenizer import load_tokenizer

        loaded = load_tokenizer(find_model(tokenizer))
    if dataset_path is not None:
        return dataset_requests(dataset_path, num_prompts, output_len, loaded)
    return random_text_requests(random_set, loaded)


def _result(
    client: Client,
    timelines: list[Timeline],
    duration: float,
    tokenizer: str | None,
    shown: Mapping[str, Any],
    arrivals: Mapping[str, Any],
    save_detailed: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics, and all that `vllm bench serve` writes into its file."""
    from puna.cli.measure.timelines import details, summarise

    found = summarise(timelines, duration, **shown)
    rate = arrivals["request_rate"]
    result = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": client.backend,
        "backend": client.backend,
        "label": None,
        "model_id": client.model,
        "tokenizer_id": tokenizer,
        "num_prompts": len(timelines),
        **arrivals,
        "request_rate": rate if math.isfinite(rate) else "inf",
        **found,
        **(details(timelines) if save_detailed else {}),
    }
    return found, result


def _report(
    timelines: Sequence[Timeline],
    found: Mapping[str, Any],
    result: Mapping[str, Any],
    output_json: Path | None,
    result_dir: Path | None,
) -> None:
    """Print the metrics, and write the result where it is wanted. Exits with 1 when every request failed."""
    from puna.cli.measure.timelines import table, write_json

    _print_failures(timelines)
    typer.echo("\n".join(table(found)))
    write_json(output_json, result)
    if result_dir is not None:
        write_json(result_dir / _file_name(result), result)
    if not found["completed"]:
        raise typer.Exit(1)


def _metrics(text: str) -> list[str]:
    from puna.cli.measure.timelines import METRICS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise ParameterError(f"percentile_metrics: no {name!r} (there are {', '.join(METRICS)})")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ParameterError(f"metric_percentiles must be numbers, such as 50,99, got {text!r}") from None
    if not all(0 <= value <= 100 for value in values):
        raise ParameterError(f"metric_percentiles must be from 0 to 100, got {text!r}")
    return values


def _goodput(limits: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for limit in limits:
        name, _, milliseconds = limit.partition(":")
        try:
            found[name] = float(milliseconds)
        except ValueError:
            raise ParameterError(f"goodput must be NAME:MILLISECONDS, got {limit!r}") from None
        if name not in ("ttft", "tpot", "e2el"):
            raise ParameterError(f"goodput: no {name!r} (there are ttft, tpot, e2el)")
    return found


def _extra(extra_body: str | None, *, temperature: float | None, ignore_eos: bool) -> dict[str, Any]:
    extra: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if ignore_eos:
        extra["ignore_eos"] = True
    if extra_body is None:
        return extra
    try:
        given = json.loads(extra_body)
    except ValueError as error:
        raise ParameterError(f"extra_body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ParameterError("extra_body must be a JSON object")
    return extra | given


def _print_failures(timelines: Sequence[Timeline]) -> None:
    """Print each way in which requests failed, the commonest first."""
    failures = Counter(timeline.error for timeline in timelines if timeline.error is not None)
    for error, count in failures.most_common(5):
        typer.echo(f"Failed, {count} of {len(timelines)}: {error}", err=True)
    if len(failures) > 5:
        typer.echo(f"... and in {len(failures) - 5} more ways", err=True)


def _file_name(result: Mapping[str, Any]) -> str:
    most = result["max_concurrency"]
    concurrency = "" if most is None else f"-concurrency{most}"
    model = str(result["model_id"]).rpartition("/")[2]
    rate = result["request_rate"]
    return f"{result['backend']}-{rate}qps{concurrency}-{model}-{result['date']}.json"


def _allow_sockets(wanted: int) -> None:
    """Raise the limit of open files as far as the system lets us, one for each request."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + 256
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError) as error:
        raise PunaError(f"{wanted} requests at once need more open files: {error}") from None
