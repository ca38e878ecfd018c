"""vLLM's offline door: `LLM(model).generate(prompts, params)`, with its names, defaults and result shapes.

An argument of vLLM's that Puna does not have is refused by name. Requests all go into one engine and come
back in the order of the prompts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from puna.engine.beam_search import beam_search
from puna.engine.llm_engine import EngineConfig
from puna.engine.pooling import Pooling, pool
from puna.engine.sampling import BeamSearchParams, SamplingParams
from puna.engine.speculative import DraftModelProposer, NgramProposer, Proposer
from puna.errors import ParameterError, UnsupportedError
from puna.locate import find_model, listed_sampling
from puna.model.llama import Llama
from puna.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text_engine import TextEngine
from puna.weights.loader import load_model

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

# Arguments of vLLM's that mean no more than what Puna always does, with the values that say so.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "quantization": (None,),  # quantised weights come in GGUF files, and say so themselves
    "trust_remote_code": (False,),
    "enable_chunked_prefill": (True, None),
    "disable_log_stats": (True, False),
    "tokenizer_mode": ("auto",),
    "runner": ("auto", "generate"),
    "pipeline_parallel_size": (1,),
    "load_format": ("auto",),
    "skip_tokenizer_init": (False,),
    "swap_space": (0,),
    "cpu_offload_gb": (0,),
    "enable_lora": (False,),
}


class LLM:
    """A model, its tokenizer and an engine, for prompts that are all known beforehand."""

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        seed: int | None = 0,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto",
        block_size: int = 16,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_logprobs: int = 20,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = True,  # always so: there are no captured graphs
        tensor_parallel_size: int = 1,
        scheduling_policy: Literal["fcfs", "priority"] = "fcfs",
        speculative_config: Mapping[str, Any] | None = None,
        generation_config: str = "auto",
        chat_template: str | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        """Load a model. `gpu_memory_utilization` is the share of the GPU, or of the free RAM on the CPU.

        Raises UnsupportedError naming an argument that Puna does not have.
        """
        _refuse_unknown(others | {"tensor_parallel_size": tensor_parallel_size, "quantization": quantization})
        if generation_config not in ("auto", "vllm"):
            raise ParameterError(f"generation_config must be 'auto' or 'vllm', got {generation_config!r}")
        began = time.monotonic()
        path = find_model(str(model))
        on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = load_model(path, dtype=_dtype_of(dtype), device=on)
        loaded = time.monotonic()
        self._tokenizer = load_tokenizer(path if tokenizer is None else find_model(str(tokenizer)))
        config = EngineConfig(
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            policy=scheduling_policy,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            kv_cache_dtype=kv_cache_dtype,
            max_logprobs=max_logprobs,
            seed=seed,
        )
        proposer = _proposer(speculative_config, network, on)
        self.text_engine = TextEngine(network, self._tokenizer, config, proposer=proposer)
        self._defaults = listed_sampling(path) if generation_config == "auto" else {}
        if self._defaults:
            logger.info("sampling defaults of the model: %s", self._defaults)
        self._chat_template = chat_template
        self._count = 0
        logger.info("weights %.1f s, engine %.1f s", loaded - began, time.monotonic() - loaded)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts: text, ids, dicts of `prompt` or `prompt_token_ids`, one or a list of these.

        Without params the model's own are used (`get_default_sampling_params`).
        """
        if lora_request is not None:
            raise UnsupportedError("lora_request: adapters are not served yet")
        listed = _as_list(prompts)
        params = self._params_for(sampling_params, len(listed))
        urgencies = [0] * len(listed) if priority is None else list(priority)
        if len(urgencies) != len(listed):
            raise ParameterError(f"{len(urgencies)} priorities do not fit {len(listed)} prompts")
        if priority is not None and self.text_engine.engine.config.policy != "priority":
            raise ParameterError("priority needs LLM(scheduling_policy='priority')")
        ids: list[str] = []
        try:
            for one in zip(listed, params, urgencies, strict=True):
                ids.append(self._add(*one))
            return self._run(ids, use_tqdm)
        finally:
            for request_id in ids:
                self.text_engine.abort(request_id)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered by the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            encode_chat(
                self._tokenizer,
                conversation,  # type: ignore[arg-type]
                tools=tools,
                template=chat_template or self._chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Find the likeliest continuations of each prompt, best first."""
        engine, outputs = self.text_engine.engine, []
        for prompt in tqdm(_as_list(prompts), disable=not use_tqdm, desc="Beam search"):
            ids = self._ids_of(prompt)
            found = []
            for beam in beam_search(engine, ids, params):
                text = self._tokenizer.decode(beam.output_ids, skip_special_tokens=True)
                found.append(BeamSearchSequence(beam.token_ids, beam.logprob, text, beam.finish_reason))
            outputs.append(BeamSearchOutput(found))
        return outputs

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling: Pooling = "last",
        normalize: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """Return a vector for each prompt: the final hidden state of its last token, or the mean of all."""
        listed = [self._ids_of(prompt) for prompt in _as_list(prompts)]
        engine = self.text_engine.engine
        outputs: list[EmbeddingRequestOutput] = []
        for ids in tqdm(listed, disable=not use_tqdm, desc="Embed"):
            vector = pool(engine.model, ids, pooling, normalize=normalize, max_len=engine.max_model_len)
            embedding = EmbeddingOutput(vector.tolist())
            outputs.append(EmbeddingRequestOutput(str(len(outputs)), embedding, ids))
        return outputs

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        /,
        *,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """Return the cosine similarity of pairs of prompts; one against many is allowed."""
        left, right = _as_list(data_1), _as_list(data_2)
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise ParameterError(f"{len(left)} and {len(right)} texts do not pair: give one or as many")
        vectors = [output.outputs.embedding for output in self.embed([*left, *right], use_tqdm=use_tqdm)]
        pairs = zip(vectors[: len(left)], vectors[len(left) :], strict=True)
        return [
            ScoringRequestOutput(str(i), ScoringOutput(sum(a * b for a, b in zip(*pair, strict=True))))
            for i, pair in enumerate(pairs)
        ]

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling settings of the model's generation_config.json."""
        return SamplingParams(**self._defaults)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests are running."""
        return self.text_engine.engine.pool.clear_cache()

    def get_metrics(self) -> dict[str, float]:
        """Return the engine's counters and gauges."""
        return self.text_engine.engine.snapshot()

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ParameterError(f"{len(params)} sampling params do not fit {count} prompts")
        return list(params)

    def _ids_of(self, prompt: Prompt) -> list[int]:
        content = _content(prompt)
        return self._tokenizer.encode(content) if isinstance(content, str) else list(content)

    def _add(self, prompt: Prompt, params: SamplingParams, priority: int) -> str:
        request_id = str(self._count)
        salt = prompt.get("cache_salt", "") if isinstance(prompt, Mapping) else ""
        self.text_engine.add(request_id, _content(prompt), params, priority=priority, salt=str(salt).encode())
        self._count += 1
        return request_id

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        """Step until all have ended; return them in the order of the ids."""
        done: dict[str, RequestOutput] = {}
        began, tokens = time.monotonic(), 0
        with tqdm(total=len(request_ids), disable=not use_tqdm, desc="Generate", unit="req") as bar:
            while self.text_engine.has_unfinished:
                for request in self.text_engine.step():
                    if not request.finished:
                        continue
                    output = request.snapshot()
                    done[request.request_id] = output
                    tokens += sum(len(answer.token_ids) for answer in output.outputs)
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.1f} tok/s")
                    bar.update()
        return [done[request_id] for request_id in request_ids]


def _refuse_unknown(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name not in _HARMLESS:
            raise UnsupportedError(f"LLM has no argument {name!r}")
        if value not in _HARMLESS[name]:
            raise UnsupportedError(f"{name}={value!r} is not supported")


def _dtype_of(dtype: str | torch.dtype) -> Any:
    names = {"half": torch.float16, "float": torch.float32}
    names |= {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in names:
        raise ParameterError(f"dtype must be 'auto' or one of {', '.join(names)}, got {dtype!r}")
    return names[dtype]


def _proposer(config: Mapping[str, Any] | None, model: Llama, device: str) -> Proposer | None:
    """Make what speculates, from vLLM's `speculative_config`."""
    if config is None:
        return None
    values = dict(config)
    count = values.pop("num_speculative_tokens", None)
    if not isinstance(count, int):
        raise ParameterError("speculative_config needs num_speculative_tokens")
    method = values.pop("method", "draft_model" if "model" in values else "ngram")
    if method == "ngram":
        longest = values.pop("prompt_lookup_max", None)
        shortest = values.pop("prompt_lookup_min", None)
        lookup_max = longest or shortest or 5
        made: Proposer = NgramProposer(count, lookup_min=shortest or lookup_max, lookup_max=lookup_max)
    elif method == "draft_model":
        draft = load_model(find_model(values.pop("model", None)), dtype="auto", device=device)
        made = DraftModelProposer(draft, count, vocab_size=model.config.vocab_size)
    else:
        raise UnsupportedError(f"speculative method {method!r}: 'ngram' and 'draft_model' are there")
    if values:
        raise UnsupportedError(f"speculative_config has no key {next(iter(values))!r}")
    return made


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _content(prompt: Prompt) -> str | Sequence[int]:
    """Return the text or the ids of a prompt in any of vLLM's forms."""
    if not isinstance(prompt, Mapping):
        return prompt
    unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown:
        raise UnsupportedError(f"a prompt has no key {sorted(unknown)[0]!r}")
    content = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if content is None:
        raise ParameterError("a prompt needs 'prompt' or 'prompt_token_ids'")
    return content  # type: ignore[no-any-return]
