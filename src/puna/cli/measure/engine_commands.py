"""`puna bench throughput` and `puna bench latency`: measure the engine in this process.

All prompts are there from the start, and each is answered to its full length. What is heavy to import waits
until a model is named.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli.run import MODEL_HELP, Dtype
from puna.cli.threads import Threads, use_threads

if TYPE_CHECKING:
    from puna.cli.measure.request_sets import BenchRequest
    from puna.cli.measure.timelines import Timeline
    from puna.engine.sampling import SamplingParams
    from puna.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)

# The options of both commands.
Model = Annotated[str | None, typer.Option(metavar="MODEL", help=MODEL_HELP)]
OutputLen = Annotated[int, typer.Option(metavar="N", help="Tokens to generate for each.")]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed makes the same requests.")]
OutputJson = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to FILE too.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: the likeliest token, always.")]
NoText = Annotated[bool, typer.Option("--disable-detokenize", help="Leave out turning ids into text.")]
DtypeOption = Annotated[Dtype, typer.Option(metavar="TYPE", help="Compute in float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Compute on cpu, cuda, cuda:1, ...")]
MaxModelLen = Annotated[int | None, typer.Option(metavar="N", help="Longest prompt with its answer.")]
MaxBatched = Annotated[int, typer.Option(metavar="N", help="Most tokens computed in one step.")]
MemoryShare = Annotated[
    float | None, typer.Option(metavar="P", help="Share of the memory that weights and cache may take.")
]
PrefixCaching = Annotated[
    bool, typer.Option("--enable-prefix-caching", help="Compute beginnings that prompts share only once.")
]

# Those of throughput.
DatasetPath = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help='Prompts as JSONL, {"prompt": TEXT} a line; else random ids.'),
]
NumPrompts = Annotated[
    int | None, typer.Option(metavar="N", help="Requests; 1000, or all that the file holds.")
]
InputLen = Annotated[int, typer.Option(metavar="N", help="Tokens of a random prompt.")]
RangeRatio = Annotated[float, typer.Option(metavar="R", help="Vary lengths from 1-R to 1+R times these.")]
PrefixLen = Annotated[int, typer.Option(metavar="N", help="Tokens put in front that all prompts share.")]
AsyncEngine = Annotated[
    bool, typer.Option("--async-engine", help="Go through the engine's thread, as a server does.")
]
MaxSeqs = Annotated[int, typer.Option(metavar="N", help="Most requests computed at once.")]

# Those of latency.
PromptLen = Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Requests answered together.")]
Warmups = Annotated[int, typer.Option(min=0, metavar="N", help="Rounds before the clock counts.")]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Rounds that are measured.")]


def throughput(
    model: Model = None,
    dataset_path: DatasetPath = None,
    num_prompts: NumPrompts = None,
    input_len: InputLen = 1024,
    output_len: OutputLen = 128,
    random_range_ratio: RangeRatio = 0.0,
    random_prefix_len: PrefixLen = 0,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    async_engine: AsyncEngine = False,
    disable_detokenize: NoText = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "cpu",
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxSeqs = 256,
    max_num_batched_tokens: MaxBatched = 2048,
    gpu_memory_utilization: MemoryShare = None,
    enable_prefix_caching: PrefixCaching = False,
    output_json: OutputJson = None,
) -> None:
    """Measure how fast many requests are answered together.

    All are there from the start; each is generated to its full length, whatever end the model would choose.
    """
    llm, seconds = _load(
        model,
        dtype=dtype.value,
        device=device,
        threads=threads,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
    )
    from puna.cli.measure.request_sets import dataset_requests

    if dataset_path is None:
        requests = _random(
            llm,
            num_prompts=1000 if num_prompts is None else num_prompts,
            input_len=input_len,
            output_len=output_len,
            range_ratio=random_range_ratio,
            prefix_len=random_prefix_len,
            seed=seed,
        )
    else:
        requests = dataset_requests(dataset_path, num_prompts, output_len, llm.get_tokenizer())
    params = _params(llm, requests, temperature, detokenize=not disable_detokenize)
    _report_throughput(*_run(llm, requests, params, async_engine), seconds, output_json)


def latency(
    model: Model = None,
    input_len: PromptLen = 32,
    output_len: OutputLen = 128,
    batch_size: BatchSize = 8,
    num_iters_warmup: Warmups = 10,
    num_iters: Rounds = 30,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    disable_detokenize: NoText = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "cpu",
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    max_num_batched_tokens: MaxBatched = 2048,
    gpu_memory_utilization: MemoryShare = None,
    enable_prefix_caching: PrefixCaching = False,
    output_json: OutputJson = None,
) -> None:
    """Measure how long one batch of fixed size takes, from its prompts to its last token."""
    llm, seconds = _load(
        model,
        dtype=dtype.value,
        device=device,
        threads=threads,
        max_model_len=max_model_len,
        max_num_seqs=batch_size,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
    )
    import numpy as np

    from puna.cli.measure.engine_runs import time_batches
    from puna.cli.measure.timelines import write_json

    requests = _random(llm, num_prompts=batch_size, input_len=input_len, output_len=output_len, seed=seed)
    params = _params(llm, requests, temperature, detokenize=not disable_detokenize)
    latencies = time_batches(llm, requests, params, warmups=num_iters_warmup, rounds=num_iters)
    average = float(np.mean(latencies))
    percentiles = {str(share): float(np.percentile(latencies, share)) for share in PERCENTILES}
    rows = [("Loading (s)", seconds), ("Average latency (s)", average)]
    rows += [(f"  p{share}", value) for share, value in percentiles.items()]
    typer.echo("\n".join(f"{name:<38}{value:>12.4f}" for name, value in rows))
    write_json(output_json, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles})


def _load(model: str | None, *, threads: int | None, **options: Any) -> tuple[LLM, float]:
    """Return the model, loaded, and the seconds that it took with all imports."""
    from puna.cli.terminal import Terminal
    from puna.locate import find_model

    path = find_model(model)
    began = time.perf_counter()
    with Terminal.standard().busy(f"loading {path.name}"):
        from puna.llm import LLM

        use_threads(threads)
        llm = LLM(path, **options)
    return llm, time.perf_counter() - began


def _random(llm: LLM, **wanted: Any) -> list[BenchRequest]:
    from puna.cli.measure.request_sets import RandomSet, plain_ids, random_id_requests

    vocab_size = llm.text_engine.engine.model.config.vocab_size
    return random_id_requests(RandomSet(**wanted), plain_ids(llm.get_tokenizer(), vocab_size))


def _params(
    llm: LLM, requests: Sequence[BenchRequest], temperature: float, *, detokenize: bool
) -> list[SamplingParams]:
    """Return the settings of each request. Raises ParameterError for one that would be cut short."""
    from puna.cli.measure.engine_runs import check_lengths, full_length

    check_lengths(requests, llm.text_engine.engine.max_model_len)
    return [full_length(request, temperature, detokenize=detokenize) for request in requests]


def _run(
    llm: LLM, requests: list[BenchRequest], params: list[SamplingParams], async_engine: bool
) -> tuple[list[Timeline], float]:
    from puna.async_llm import AsyncLLM
    from puna.cli.measure.engine_runs import run_async, run_offline

    if not async_engine:
        return run_offline(llm.text_engine, requests, params)
    engine = AsyncLLM(llm.text_engine)
    try:
        return asyncio.run(run_async(engine, requests, params))
    finally:
        engine.shutdown()


def _report_throughput(
    timelines: list[Timeline], elapsed: float, load_time: float, output_json: Path | None
) -> None:
    """Print the metrics, and write them under the names of `vllm bench throughput` and `serve`."""
    from puna.cli.measure.timelines import summarise, table, write_json

    found = summarise(timelines, elapsed)
    result = {
        "elapsed_time": elapsed,
        "num_requests": len(timelines),
        "total_num_tokens": found["total_input_tokens"] + found["total_output_tokens"],
        "requests_per_second": found["request_throughput"],
        "tokens_per_second": found["total_token_throughput"],
        "load_time": load_time,
        **found,
    }
    typer.echo("\n".join([f"{'Loading (s)':<38}{load_time:>12.2f}", *table(found)]))
    write_json(output_json, result)
