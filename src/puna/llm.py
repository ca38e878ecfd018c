"""vLLM's offline door: `LLM(model).generate(prompts, params)`, with its names, defaults and result shapes.

An argument of vLLM's that Puna does not have is refused by name. Requests all go into one engine and come
back in the order of the prompts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from puna.engine.beam_search import beam_search
from puna.engine.llm_engine import EngineConfig
from puna.engine.pooling import Pooling, PoolingParams, pool
from puna.engine.sampling import BeamSearchParams, RequestOutputKind, SamplingParams
from puna.errors import ParameterError, UnsupportedError
from puna.llm_arguments import (
    check_quantization,
    check_structured_outputs,
    dtype_of,
    make_adapters,
    make_proposer,
    pooling_of,
    refuse_unknown,
    sampling_defaults,
    speculative_of,
)
from puna.locate import find_model
from puna.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    name_logprobs,
)
from puna.prompts import Prompt, cache_salt, list_prompts, read_prompt
from puna.served_adapters import LoRARequest
from puna.text.chat import encode_chat
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.text_engine import TextEngine
from puna.weights.loader import load_model

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
UseTqdm = bool | Callable[..., Any]  # a callable makes the bar
ManyParams = SamplingParams | Sequence[SamplingParams] | None
ManyAdapters = LoRARequest | Sequence[LoRARequest | None] | None


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
        kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"] = "auto",
        block_size: int = 16,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_logprobs: int = 20,
        enable_prefix_caching: bool = True,
        scheduling_policy: Literal["fcfs", "priority"] = "fcfs",
        speculative_config: Mapping[str, Any] | None = None,
        spec_method: str | None = None,
        spec_model: str | None = None,
        spec_tokens: int | None = None,
        structured_outputs_config: Mapping[str, Any] | None = None,
        pooler_config: Mapping[str, Any] | None = None,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        max_cpu_loras: int | None = None,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        """Load a model. `gpu_memory_utilization` is the share of the GPU, or of the free RAM on the CPU.

        `quantization` ("q4_k_m", "q8_0", ...) quantises weights while they are loaded. `max_model_len` is the
        model's context by default, or with -1, and lowered to what the cache holds.
        With `enable_lora` requests may name adapters: `max_loras` different ones in a batch, of at most
        `max_lora_rank`; of those that no request uses `max_cpu_loras` stay in memory (default: max_loras).
        `others` are arguments of vLLM's that may only say what Puna does anyway (`llm_arguments`); raises
        UnsupportedError naming one that it does not have.
        """
        refuse_unknown(others)
        check_structured_outputs(structured_outputs_config)
        self._pooling, self._normalize = pooling_of(pooler_config)
        began = time.monotonic()
        path = find_model(str(model))
        quantize = check_quantization(quantization, path)
        self._defaults = sampling_defaults(path, generation_config, override_generation_config)
        self.get_default_sampling_params()  # raises for a wrong value, before the weights are read
        on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = load_model(path, dtype=dtype_of(dtype), device=on, quantize=quantize)
        loaded = time.monotonic()
        self._tokenizer = load_tokenizer(path if tokenizer is None else find_model(str(tokenizer)))
        config = EngineConfig(
            max_model_len=None if max_model_len == -1 else max_model_len,
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
            max_loras=max_loras if enable_lora else None,
        )
        adapters = make_adapters(network, enable_lora, max_loras, max_lora_rank, max_cpu_loras)
        speculative = speculative_of(speculative_config, spec_method, spec_model, spec_tokens)
        proposer = make_proposer(speculative, network, on)
        self.text_engine = TextEngine(network, self._tokenizer, config, proposer=proposer, adapters=adapters)
        if self._defaults:
            logger.info("sampling defaults of the model: %s", self._defaults)
        self._chat_template = chat_template
        self._count = 0
        logger.info("weights %.1f s, engine %.1f s", loaded - began, time.monotonic() - loaded)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ManyParams = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: ManyAdapters = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer prompts: text, ids, dicts of `prompt` or `prompt_token_ids`, one or a list of these.

        Without params the model's own are used (`get_default_sampling_params`). Text gets a BOS, and the
        names of special tokens in it become these tokens; `tokenization_kwargs` may say otherwise
        (`add_special_tokens`, `split_special_tokens`, `truncate_prompt_tokens`). `lora_request` is the
        adapter of all prompts, or a list with the adapter of each, None for the model alone.
        """
        _refuse(mm_processor_kwargs=mm_processor_kwargs)
        listed = list_prompts(prompts)
        params = self._params_for(sampling_params, len(listed))
        urgencies = [0] * len(listed) if priority is None else list(priority)
        if len(urgencies) != len(listed):
            raise ParameterError(f"{len(urgencies)} priorities do not fit {len(listed)} prompts")
        if priority is not None and self.text_engine.engine.config.policy != "priority":
            raise ParameterError("priority needs LLM(scheduling_policy='priority')")
        adapters = self._adapters_for(lora_request, len(listed))
        ids: list[str] = []
        try:
            for one in zip(listed, params, urgencies, adapters, strict=True):
                ids.append(self._add(*one, tokenization_kwargs))
            return self._run(ids, use_tqdm)
        finally:
            for request_id in ids:
                self.text_engine.abort(request_id)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: ManyParams = None,
        use_tqdm: UseTqdm = True,
        lora_request: ManyAdapters = None,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered by the model's chat template.

        The template makes the special tokens, so of `tokenization_kwargs` there is `truncate_prompt_tokens`.
        """
        if chat_template_content_format != "auto":
            raise UnsupportedError(
                f"chat_template_content_format={chat_template_content_format!r}: only 'auto'"
            )
        for name in tokenization_kwargs or {}:
            if name != "truncate_prompt_tokens":
                raise UnsupportedError(f"chat has no tokenization_kwargs {name!r}: the template says it all")
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ParameterError(f"messages must be a list of messages, or of such lists, not {messages!r}")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        for conversation in conversations:
            ids = encode_chat(
                self._tokenizer,
                conversation,  # type: ignore[arg-type]
                tools=tools,
                template=chat_template or self._chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            prompts.append({"prompt_token_ids": ids, "prompt": self._tokenizer.decode(ids)})
        return self.generate(
            prompts,
            sampling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
        priority: None = None,
    ) -> list[BeamSearchOutput]:
        """Find the likeliest continuations of each prompt, best first.

        One prompt is searched at a time, which is within every `concurrency_limit`.
        """
        _refuse(priority=priority)
        if not isinstance(params, BeamSearchParams):
            raise ParameterError(f"beam_search takes BeamSearchParams, not {type(params).__name__}")
        if concurrency_limit is not None and concurrency_limit < 1:
            raise ParameterError(f"concurrency_limit must be at least 1, got {concurrency_limit}")
        outputs: list[BeamSearchOutput] = []
        listed = list_prompts(prompts)
        with _bar(use_tqdm, total=len(listed), desc="Beam search") as bar:
            for prompt in listed:
                outputs.append(BeamSearchOutput(self._beams(prompt, params, lora_request)))
                bar.update()
        return outputs

    def _beams(
        self, prompt: Prompt, params: BeamSearchParams, lora_request: LoRARequest | None
    ) -> list[BeamSearchSequence]:
        adapter = self.text_engine.adapter_of(lora_request)
        _, ids = read_prompt(self.text_engine, prompt)
        wanted = params.structured_outputs
        grammar = None if wanted is None else self.text_engine.compile_grammar(wanted)
        engine = self.text_engine.engine
        size = min(self._tokenizer.vocab_size, engine.model.config.vocab_size)
        return [
            BeamSearchSequence(
                tokens=beam.token_ids,
                logprobs=[name_logprobs(found, self._tokenizer) for found in beam.logprobs],
                cum_logprob=beam.logprob,
                text=self._tokenizer.decode(beam.token_ids, skip_special_tokens=params.skip_special_tokens),
                finish_reason=beam.finish_reason,
                stop_reason=beam.stop_id,
                lora_request=lora_request,
            )
            for beam in beam_search(engine, ids, params, grammar=grammar, num_token_ids=size, adapter=adapter)
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: LoRARequest | None = None,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Return hidden states: a vector of each prompt ("embed"), or one of each token ("token_embed")."""
        params = pooling_params or PoolingParams()
        task = PoolingParams(task=pooling_task or params.task).task
        if task is None:
            raise ParameterError("encode needs pooling_task='embed' or 'token_embed'")
        pooling: Pooling = "all" if task == "token_embed" else self._pooling
        listed = [read_prompt(self.text_engine, p, tokenization_kwargs)[1] for p in list_prompts(prompts)]
        normalize = self._normalize if params.use_activation is None else params.normalize
        return self._pool(listed, pooling, normalize, use_tqdm, lora_request)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        pooling: Literal["last", "mean"] | None = None,
        normalize: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Return a vector for each prompt: the final hidden state of its last token, or the mean of all.

        `pooling` and `normalize` go before `pooling_params` and the `pooler_config` of the constructor.
        """
        params = pooling_params or PoolingParams()
        if params.task not in (None, "embed"):
            raise ParameterError(f"embed does not do the task {params.task!r}: use encode")
        if normalize is None:
            normalize = self._normalize if params.use_activation is None else params.normalize
        listed = [read_prompt(self.text_engine, p, tokenization_kwargs)[1] for p in list_prompts(prompts)]
        return [
            EmbeddingRequestOutput(
                found.request_id, EmbeddingOutput(found.outputs.data.tolist()), found.prompt_token_ids
            )
            for found in self._pool(listed, pooling or self._pooling, normalize, use_tqdm, lora_request)
        ]

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        /,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: None = None,
    ) -> list[ScoringRequestOutput]:
        """Return the cosine similarity of pairs of prompts; one against many is allowed."""
        _refuse(chat_template=chat_template)
        if pooling_params is not None and pooling_params.use_activation is not None:
            raise UnsupportedError("use_activation: a score is the cosine of two vectors in any case")
        left, right = list_prompts(data_1), list_prompts(data_2)
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise ParameterError(f"{len(left)} and {len(right)} texts do not pair: give one or as many")
        found = self.embed(
            [*left, *right],
            use_tqdm=use_tqdm,
            tokenization_kwargs=tokenization_kwargs,
            normalize=True,
            lora_request=lora_request,
        )
        outputs: list[ScoringRequestOutput] = []
        for one, other in zip(found[: len(left)], found[len(left) :], strict=True):
            pairs = zip(one.outputs.embedding, other.outputs.embedding, strict=True)
            ids = [*one.prompt_token_ids, *other.prompt_token_ids]
            score = ScoringOutput(sum(a * b for a, b in pairs))
            outputs.append(ScoringRequestOutput(str(len(outputs)), score, ids))
        return outputs

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

    def get_world_size(self, include_dp: bool = True) -> int:
        """Return on how many devices the model runs."""
        return 1

    def _params_for(self, params: ManyParams, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        listed = list(params) if isinstance(params, Sequence) else [params]
        for one in listed:
            if not isinstance(one, SamplingParams):
                raise ParameterError(f"sampling_params must be SamplingParams or a list of them, got {one!r}")
        if isinstance(params, SamplingParams):
            return listed * count
        if len(listed) != count:
            raise ParameterError(f"{len(listed)} sampling params do not fit {count} prompts")
        return listed

    def _adapters_for(self, requests: ManyAdapters, count: int) -> list[LoRARequest | None]:
        """Return the adapter of each prompt; one that is to be read again is read once for all of them."""
        if requests is None or isinstance(requests, LoRARequest):
            requests = [requests] * count
        if not isinstance(requests, Sequence) or isinstance(requests, str):
            raise ParameterError(f"lora_request must be a LoRARequest or a list of them, got {requests!r}")
        if len(requests) != count:
            raise ParameterError(f"{len(requests)} lora requests do not fit {count} prompts")
        read = dict.fromkeys(one for one in requests if one is not None)
        for one in read:
            self.text_engine.adapter_of(one)
        return [None if one is None else replace(one, load_inplace=False) for one in requests]

    def _pool(
        self,
        listed: list[list[int]],
        pooling: Pooling,
        normalize: bool,
        use_tqdm: UseTqdm,
        lora_request: LoRARequest | None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        engine, adapter = self.text_engine.engine, self.text_engine.adapter_of(lora_request)
        outputs: list[PoolingRequestOutput[PoolingOutput]] = []
        with _bar(use_tqdm, total=len(listed), desc="Pool") as bar:
            for ids in listed:
                with engine.runner.adapted([adapter], [len(ids)]):
                    data = pool(engine.model, ids, pooling, normalize=normalize, max_len=engine.max_model_len)
                outputs.append(PoolingRequestOutput(str(len(outputs)), PoolingOutput(data), ids))
                bar.update()
        return outputs

    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        lora_request: LoRARequest | None,
        options: Mapping[str, Any] | None,
    ) -> str:
        request_id = str(self._count)
        text, ids = read_prompt(self.text_engine, prompt, options)
        self.text_engine.add(
            request_id,
            ids,
            params,
            priority=priority,
            salt=cache_salt(prompt),
            text=text,
            lora_request=lora_request,
        )
        self._count += 1
        return request_id

    def _run(self, request_ids: list[str], use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Step until all have ended; return them, whole, in the order of the ids."""
        done: dict[str, RequestOutput] = {}
        began, tokens = time.monotonic(), 0
        with _bar(use_tqdm, total=len(request_ids), desc="Generate", unit="req") as bar:
            while self.text_engine.has_unfinished:
                for request in self.text_engine.step():
                    if not request.finished:
                        continue
                    output = request.snapshot(RequestOutputKind.FINAL_ONLY)
                    done[request.request_id] = output
                    tokens += sum(len(answer.token_ids) for answer in output.outputs)
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.1f} tok/s")
                    bar.update()
        return [done[request_id] for request_id in request_ids]


def _refuse(**arguments: Any) -> None:
    """Raise UnsupportedError naming the first argument that was given."""
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedError(f"{name}={value!r} is not supported")


def _bar(use_tqdm: UseTqdm, **options: Any) -> Any:
    if callable(use_tqdm):
        return use_tqdm(**options)
    return tqdm(disable=not use_tqdm, **options)
