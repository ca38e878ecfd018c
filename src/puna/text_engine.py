"""The engine with a tokenizer: prompts in, text out. The doors `LLM`, `AsyncLLM` and `Session` share it.

It adds what the engine does not know: words as ids, stop strings, grammars over text, detokenising.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from puna.engine.llm_engine import EngineConfig, LLMEngine
from puna.engine.sampling import SamplingParams, StructuredOutputsParams
from puna.engine.speculative import Proposer
from puna.errors import ParameterError
from puna.model.llama import Llama
from puna.model.lora_serving import ServedAdapter
from puna.outputs import RequestOutputs
from puna.served_adapters import AdapterStore, LoRARequest
from puna.text.grammar import GrammarCompiler, TokenGrammar
from puna.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request as the engine takes it; it can be added once, for a grammar follows one answer."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    grammar: TokenGrammar | None
    lora_request: LoRARequest | None = None
    adapter: ServedAdapter | None = None


class TextEngine:
    """Run requests of text or ids on one model.

    Not safe to use from several threads at once, but for `prepare`.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        proposer: Proposer | None = None,
        adapters: AdapterStore | None = None,
    ) -> None:
        """Make the engine; with `adapters`, requests may name theirs."""
        self.tokenizer = tokenizer
        self.adapters = adapters
        ends = {*tokenizer.eos_token_ids, *model.config.eos_token_ids}
        self.end_ids = frozenset(i for i in ends if 0 <= i < model.config.vocab_size)
        self.engine = LLMEngine(
            model,
            config,
            end_ids=self.end_ids,
            proposer=proposer,
            num_token_ids=min(tokenizer.vocab_size, model.config.vocab_size),
        )
        self._special_ids = frozenset(tokenizer.special_tokens.values())
        self._requests: dict[str, RequestOutputs] = {}
        self._compiler: GrammarCompiler | None = None
        self._compiler_lock = threading.Lock()
        self._warned_of_bos = False

    @property
    def has_unfinished(self) -> bool:
        """Say whether `step` has anything to do."""
        return self.engine.has_unfinished

    def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        text: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> PreparedRequest:
        """Do what takes long before a request can be added: encode its texts, compile its grammar, read its
        adapter.

        Any thread may call it, also during a step. Raises ParameterError as `add` does.
        """
        params = dataclasses.replace(params)  # checked anew: fields may have been changed
        if not isinstance(prompt, Iterable):
            raise ParameterError(f"a prompt must be text or token ids, got {prompt!r}")
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if params.bad_words:
            params.bad_words_token_ids = [ids for word in params.bad_words for ids in self._word_ids(word)]
        self.engine.check(ids, params)
        wanted = params.structured_outputs
        grammar = None if wanted is None else self.compile_grammar(wanted)
        text = prompt if isinstance(prompt, str) else text
        return PreparedRequest(
            text=text,
            token_ids=ids,
            params=params,
            grammar=grammar,
            lora_request=lora_request,
            adapter=self.adapter_of(lora_request),
        )

    def adapter_of(self, request: LoRARequest | None) -> ServedAdapter | None:
        """Return the adapter that a request names, read if it must be; None for the model alone."""
        if request is None:
            return None
        if not isinstance(request, LoRARequest):
            raise ParameterError(f"lora_request must be a LoRARequest, got {request!r}")
        if self.adapters is None:
            raise ParameterError(f"lora_request {request.lora_name!r} needs LLM(enable_lora=True)")
        return self.adapters.load(request)

    def add(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        continues: bool | None = None,
        text: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> RequestOutputs:
        """Queue a request; text gets the tokenizer's BOS. Raises ParameterError if it can never run.

        `text` is what the outputs show as the prompt where ids are given.
        `continues` says whether the answer goes on in the middle of a text; by default it does where the
        prompt holds more than special tokens.
        """
        prepared = self.prepare(prompt, params, text=text, lora_request=lora_request)
        return self.add_prepared(request_id, prepared, priority=priority, salt=salt, continues=continues)

    def add_prepared(
        self,
        request_id: str,
        request: PreparedRequest,
        *,
        priority: int = 0,
        salt: bytes = b"",
        continues: bool | None = None,
    ) -> RequestOutputs:
        """Queue what `prepare` returned; see `add`."""
        ids, params = request.token_ids, request.params
        self.engine.add(
            request_id,
            ids,
            params,
            priority=priority,
            salt=salt,
            grammar=request.grammar,
            adapter=request.adapter,
        )
        if continues is None:
            continues = not self._special_ids.issuperset(ids)
        outputs = RequestOutputs(
            request_id,
            request.text,
            self.tokenizer,
            params,
            continues=continues,
            lora_request=request.lora_request,
        )
        self._requests[request_id] = outputs
        return outputs

    def encode(self, text: str, *, parse_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a prompt; warn once if its text already begins with the BOS that is added."""
        bos = self.tokenizer.bos_token_id
        if add_special_tokens and self.tokenizer.add_bos and bos is not None and not self._warned_of_bos:
            name = self.tokenizer.id_to_token(bos)
            if text.startswith(name):
                self._warned_of_bos = True
                logger.warning(
                    "a prompt begins with %s, and the tokenizer puts another before it: "
                    "give a rendered chat as ids, or without it",
                    name,
                )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)

    def abort(self, request_id: str) -> None:
        """End a request and give its blocks back at once."""
        self.engine.abort(request_id)
        self._requests.pop(request_id, None)

    def step(self) -> list[RequestOutputs]:
        """Compute one batch and return the requests that got on and want an output now."""
        touched: dict[str, RequestOutputs] = {}
        for output in self.engine.step():
            sequence = output.sequence
            request = self._requests[sequence.request_id]
            found = request.text_of(sequence).update()
            if found is not None:
                was_running = sequence.finish_reason is None
                if was_running:
                    self.engine.finish(sequence, "stop", found)
                sequence.finish_reason, sequence.stop_reason = "stop", found
            touched[sequence.request_id] = request
        for request in touched.values():
            if request.finished:
                del self._requests[request.request_id]
        return [request for request in touched.values() if request.is_due]

    def _word_ids(self, word: str) -> list[list[int]]:
        """Return the ids of a word alone and behind a space, where the space does not change its length."""
        plain = self.tokenizer.encode(word.strip(), add_special_tokens=False)
        spaced = self.tokenizer.encode(" " + word.strip(), add_special_tokens=False)
        if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
            return [plain, spaced]
        return [plain] if plain else []

    def compile_grammar(self, wanted: StructuredOutputsParams) -> TokenGrammar:
        """Return a grammar at its beginning; raise ParameterError that says what is wrong with it."""
        with self._compiler_lock:
            if self._compiler is None:
                vocab_size = self.engine.model.config.vocab_size
                self._compiler = GrammarCompiler(self.tokenizer, self.end_ids, vocab_size)
        arguments: dict[str, Any] = {
            "json_schema": {"type": "object"} if wanted.json_object else wanted.json,
            "regex": wanted.regex,
            "choice": wanted.choice,
            "grammar": wanted.grammar,
            "any_whitespace": not wanted.disable_any_whitespace,
            "additional_properties": not wanted.disable_additional_properties,
            "whitespace_pattern": wanted.whitespace_pattern,
            "structural_tag": wanted.structural_tag,
        }
        return self._compiler.compile(**arguments)
