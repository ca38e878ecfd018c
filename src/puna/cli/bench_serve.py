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
    from puna.cli.bench_client import Client
    from puna.cli.bench_metrics import Timeline
    from puna.cli.bench_requests import BenchRequest


class BackendName(StrEnum):
    """Name what is spoken: completions or chat completions."""

    openai = "openai"
    openai_chat = "openai-chat"


def serve(
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="Where the server is.")
    ] = "http://127.0.0.1:8000",
    backend: Annotated[
        BackendName, typer.Option(metavar="NAME", help="openai: completions; openai-chat: chats.")
    ] = BackendName.openai,
    endpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="Route, where it is not the usual one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name for the server; else the first that it lists.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Make prompts of exact lengths with it; else of common words."),
    ] = None,
    dataset_path: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Prompts as JSONL, {"prompt": TEXT} a line; else random text.'),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Requests; 1000, or all that the file holds.")
    ] = None,
    input_len: Annotated[int, typer.Option(metavar="N", help="Tokens of a random prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(metavar="R", help="Vary lengths from 1-R to 1+R times these.")
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(metavar="N", help="Tokens put in front that all prompts share.")
    ] = 0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="The same seed makes the same requests and arrivals.")
    ] = 0,
    request_rate: Annotated[
        float, typer.Option(metavar="R", help="Requests that arrive in a second; inf: all at once.")
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(metavar="X", help="1: arrivals are random; less: in bursts; more: even.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Most requests that run at once.")
    ] = None,
    num_warmups: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests sent before, which do not count.")
    ] = 0,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Not given: the server decides.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for full lengths (vLLM, Puna; OpenAI refuses it).")
    ] = False,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="An object of more fields for each request.")
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(metavar="NAMES", help="Which to print: ttft, tpot, itl, e2el.")
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[
        str, typer.Option(metavar="PS", help="Percentiles of these, such as 50,99.")
    ] = "99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Count requests within this limit; can be repeated."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds after which a request failed.")] = 3600,
    output_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results to FILE too.")
    ] = None,
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write them to a file named after what was measured.")
    ] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Write what each request did, too.")
    ] = False,
    result_dir: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for --save-result.")] = Path("."),
) -> None:
    """Measure a server that speaks OpenAI's API.

    Requests are streamed, and tokens counted as the server counts them. OPENAI_API_KEY is sent where it is
    set. Ends with 1 when every request failed.
    """
    from puna.cli.bench_metrics import details, summarise, table, write_json
    from puna.cli.bench_requests import RandomSet

    metrics, percentiles = _metrics(percentile_metrics), _percentiles(metric_percentiles)
    limits = _goodput(goodput or [])
    extra = _extra(extra_body, temperature=temperature, ignore_eos=ignore_eos)
    random_set = RandomSet(
        num_prompts=1000 if num_prompts is None else num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        seed=seed,
    )
    requests = _requests(random_set, tokenizer, dataset_path, num_prompts)
    client, timelines, duration = asyncio.run(
        _measure(
            requests,
            {"base_url": base_url, "backend": backend.value, "endpoint": endpoint, "model": model},
            {"extra": extra, "timeout": timeout},
            num_warmups,
            request_rate=request_rate,
            burstiness=burstiness,
            max_concurrency=max_concurrency,
            seed=seed,
        )
    )
    found = summarise(timelines, duration, metrics=metrics, percentiles=percentiles, goodput=limits)
    result = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend.value,
        "backend": backend.value,
        "label": None,
        "model_id": client.model,
        "tokenizer_id": tokenizer,
        "num_prompts": len(requests),
        "request_rate": request_rate if math.isfinite(request_rate) else "inf",
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        **found,
        **(details(timelines) if save_detailed else {}),
    }
    _print_failures(timelines)
    typer.echo("\n".join(table(found)))
    write_json(output_json, result)
    if save_result:
        write_json(result_dir / _file_name(result), result)
    if not found["completed"]:
        raise typer.Exit(1)


async def _measure(
    requests: Sequence[BenchRequest],
    server: Mapping[str, Any],
    settings: Mapping[str, Any],
    num_warmups: int,
    **arrivals: Any,
) -> tuple[Client, list[Timeline], float]:
    """Find the model, warm up, then send all requests."""
    from puna.cli.bench_client import ENDPOINTS, Client, first_model, send_all
    from puna.cli.bench_http import Address, connect

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
    random_set: Any, tokenizer: str | None, dataset_path: Path | None, num_prompts: int | None
) -> list[BenchRequest]:
    from puna.cli.bench_requests import dataset_requests, random_text_requests

    loaded = None
    if tokenizer is not None:
        from puna.locate import find_model
        from puna.text.tokenizer import load_tokenizer

        loaded = load_tokenizer(find_model(tokenizer))
    if dataset_path is not None:
        return dataset_requests(dataset_path, num_prompts, random_set.output_len, loaded)
    return random_text_requests(random_set, loaded)


def _metrics(text: str) -> list[str]:
    from puna.cli.bench_metrics import METRICS

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
