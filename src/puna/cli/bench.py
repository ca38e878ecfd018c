"""`puna bench throughput` and `puna bench latency`: measure the engine in this process.

Options, results and metrics have the names of `vllm bench` (0.33), so that both can be run from one script;
`puna bench serve`, which measures a server, is in `bench_serve.py`.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puna.cli.bench_serve import serve
from puna.cli.run import MODEL_HELP, Dtype

if TYPE_CHECKING:
    from puna.cli.bench_requests import BenchRequest
    from puna.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)

bench = typer.Typer(
    name="bench", help="Measure the engine, or a server.", no_args_is_help=True, rich_markup_mode=None
)

Model = Annotated[str | None, typer.Option(metavar="MODEL", help=MODEL_HELP)]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed makes the same requests.")]
OutputJson = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to FILE too.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: the likeliest token, always.")]
NoText = Annotated[bool, typer.Option("--disable-detokenize", help="Leave out turning ids into text.")]
DtypeOption = Annotated[Dtype, typer.Option(metavar="TYPE", help="Compute in float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="Compute on cpu, cuda, cuda:1, ...")]
MaxModelLen = Annotated[int | None, typer.Option(metavar="N", help="Longest prompt with its answer.")]
MaxSeqs = Annotated[int, typer.Option(metavar="N", help="Most requests computed at once.")]
MaxBatched = Annotated[int, typer.Option(metavar="N", help="Most tokens computed in one step.")]
MemoryShare = Annotated[
    float | None, typer.Option(metavar="P", help="Share of the memory that weights and cache may take.")
]
PrefixCaching = Annotated[
    bool, typer.Option("--enable-prefix-caching", help="Compute beginnings that prompts share only once.")
]


@bench.command()
def throughput(
    model: Model = None,
    dataset_path: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Prompts as JSONL, {"prompt": TEXT} a line; else random ids.'),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Requests; 1000, or all that the file holds.")
    ] = None,
    input_len: Annotated[int, typer.Option(metavar="N", help="Tokens of a random prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(metavar="N", help="Tokens to generate for each.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(metavar="R", help="Vary lengths from 1-R to 1+R times these.")
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(metavar="N", help="Tokens put in front that all prompts share.")
    ] = 0,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    async_engine: Annotated[
        bool, typer.Option("--async-engine", help="Go through the engine's thread, as a server does.")
    ] = False,
    disable_detokenize: NoText = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "cpu",
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
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
    )
    from puna.cli.bench_engine import check_lengths, full_length, run_async, run_offline
    from puna.cli.bench_metrics import summarise, table, write_json
    from puna.cli.bench_requests import dataset_requests

    if dataset_path is None:
        count = 1000 if num_prompts is None else num_prompts
        requests = _random(
            llm,
            num_prompts=count,
            input_len=input_len,
            output_len=output_len,
            range_ratio=random_range_ratio,
            prefix_len=random_prefix_len,
            seed=seed,
        )
    else:
        requests = dataset_requests(dataset_path, num_prompts, output_len, llm.get_tokenizer())
    check_lengths(requests, llm.text_engine.engine.max_model_len)
    params = [full_length(request, temperature, detokenize=not disable_detokenize) for request in requests]
    if async_engine:
        timelines, elapsed = asyncio.run(_through_thread(llm, run_async, requests, params))
    else:
        timelines, elapsed = run_offline(llm.text_engine, requests, params)
    found = summarise(timelines, elapsed)
    result = {
        "elapsed_time": elapsed,
        "num_requests": len(requests),
        "total_num_tokens": found["total_input_tokens"] + found["total_output_tokens"],
        "requests_per_second": found["request_throughput"],
        "tokens_per_second": found["total_token_throughput"],
        "load_time": seconds,
        **found,
    }
    typer.echo("\n".join([f"{'Loading (s)':<38}{seconds:>12.2f}", *table(found)]))
    write_json(output_json, result)


@bench.command()
def latency(
    model: Model = None,
    input_len: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(metavar="N", help="Tokens to generate for each.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Requests answered together.")] = 8,
    num_iters_warmup: Annotated[
        int, typer.Option(min=0, metavar="N", help="Rounds before the clock counts.")
    ] = 10,
    num_iters: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds that are measured.")] = 30,
    seed: Seed = 0,
    temperature: Temperature = 1.0,
    disable_detokenize: NoText = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "cpu",
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
        max_model_len=max_model_len,
        max_num_seqs=batch_size,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
    )
    import numpy as np

    from puna.cli.bench_engine import check_lengths, full_length, time_batches
    from puna.cli.bench_metrics import write_json

    requests = _random(llm, num_prompts=batch_size, input_len=input_len, output_len=output_len, seed=seed)
    check_lengths(requests, llm.text_engine.engine.max_model_len)
    params = [full_length(request, temperature, detokenize=not disable_detokenize) for request in requests]
    latencies = time_batches(llm, requests, params, warmups=num_iters_warmup, rounds=num_iters)
    average = float(np.mean(latencies))
    percentiles = {str(share): float(np.percentile(latencies, share)) for share in PERCENTILES}
    rows = [("Loading (s)", seconds), ("Average latency (s)", average)]
    rows += [(f"  p{share}", value) for share, value in percentiles.items()]
    typer.echo("\n".join(f"{name:<38}{value:>12.4f}" for name, value in rows))
    write_json(output_json, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles})


bench.command()(serve)


def _load(model: str | None, **options: Any) -> tuple[LLM, float]:
    """Return the model, loaded, and the seconds that it took with all imports."""
    from puna.cli.terminal import Terminal
    from puna.locate import find_model

    path = find_model(model)
    began = time.perf_counter()
    with Terminal.standard().busy(f"loading {path.name}"):
        from puna.llm import LLM

        llm = LLM(path, **options)
    return llm, time.perf_counter() - began


def _random(llm: LLM, **wanted: Any) -> list[BenchRequest]:
    from puna.cli.bench_requests import RandomSet, plain_ids, random_id_requests

    vocab_size = llm.text_engine.engine.model.config.vocab_size
    return random_id_requests(RandomSet(**wanted), plain_ids(llm.get_tokenizer(), vocab_size))


async def _through_thread(llm: LLM, run: Any, requests: Any, params: Any) -> Any:
    from puna.async_llm import AsyncLLM

    engine = AsyncLLM(llm.text_engine)
    try:
        return await run(engine, requests, params)
    finally:
        engine.shutdown()
