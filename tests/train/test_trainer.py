"""Training equals a plain loop of Transformers and PEFT, and does not depend on how it is cut up."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from puna.errors import ParameterError, UnsupportedError
from puna.model.attention import PackedAttention
from puna.model.lora_config import LoraConfig
from puna.peft_model import PeftModel
from puna.text.tokenizer import load_tokenizer
from puna.train.checkpoints import list_checkpoints
from puna.train.encoding import Example
from puna.train.losses import batch_loss
from puna.train.objectives import TrainedModel
from puna.train.packing import Batch
from puna.train.trainer import EvalMetrics, StepMetrics, Trainer
from puna.weights.loader import load_model
from training_data import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Transformers and PEFT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def run(place: Path, tmp_path: Path, **changes: Any) -> tuple[Trainer, list[StepMetrics]]:
    seen: list[StepMetrics] = []
    trainer = Trainer(tiny_config(place, output=str(tmp_path / "out"), **changes), on_step=seen.append)
    result = trainer.train()
    assert result.is_finished and result.step == trainer.plan.total_steps == len(seen)
    return trainer, seen


def examples_of_step(trainer: Trainer, step: int) -> list[Example]:
    """Cut the batches of a step into examples again."""
    found = []
    for batch in trainer.plan.micro_batches(step):
        wanted = set((batch.select + 1).tolist())
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            ids = batch.input_ids[start:end].tolist()
            found.append(Example(place="", ids=ids, trained=[i in wanted for i in range(start, end)]))
    return found


def plain_loop(
    trainer: Trainer, logits: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], decays: float = 0.0
) -> list[float]:
    """Train in the plainest way there is, row by row; return the losses."""
    import transformers

    config, steps = trainer.config, trainer.plan.total_steps
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": decays},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.rate)
    scheduler = transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, trainer.plan.warmup_steps, steps
    )
    losses = []
    for step in range(steps):
        examples = examples_of_step(trainer, step)
        total = torch.zeros(())
        for example in examples:
            labels = torch.tensor(
                [t if trained else -100 for t, trained in zip(example.ids, example.trained, strict=True)]
            )
            rows = logits(torch.tensor([list(example.ids)]))[0, :-1]
            total = total + functional.cross_entropy(rows, labels[1:], ignore_index=-100, reduction="sum")
        loss = total / sum(example.num_trained for example in examples)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_full_training_is_that_of_a_plain_loop(place: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    trainer, seen = run(
        place, tmp_path, method="full", learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="cosine"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    losses = plain_loop(trainer, lambda ids: theirs(ids).logits, dict(theirs.named_parameters()), decays=0.1)
    assert [m.loss for m in seen] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.5
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = load_model(tmp_path / "out")
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(written.get_parameter(name), parameter, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(ours.get_parameter(name), written.get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize(("use_dora", "steps"), [(False, 100), (True, 30)])
def test_lora_training_is_that_of_peft(place: Path, tmp_path: Path, use_dora: bool, steps: int) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=use_dora, task_type="CAUSAL_LM"
    )
    trainer, seen = run(place, tmp_path, lora=lora, learning_rate=3e-3, num_train_epochs=steps / 5)
    assert len(seen) == steps
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    torch.manual_seed(trainer.config.seed)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=use_dora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, settings)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    losses = plain_loop(trainer, lambda ids: theirs(ids).logits, trained)
    assert [m.loss for m in seen] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    again = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    read = peft.PeftModel.from_pretrained(again, tmp_path / "out")
    for name, parameter in trained.items():
        torch.testing.assert_close(read.get_parameter(name), parameter, atol=2e-4, rtol=1e-3)


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_eight_batches_of_one_are_one_batch_of_eight(place: Path, tmp_path: Path, method: str) -> None:
    """Rows of several lengths: a mean of the batches' means would be another loss."""
    found = []
    for size, count in ((1, 8), (8, 1)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        folder = tmp_path / f"{size}x{count}"
        changes = {"lora": LORA, "method": method, "packing": False, "learning_rate": 1e-2, **sizes}
        trainer, seen = run(place, folder, **changes)
        batches = trainer.plan.micro_batches(0)
        assert (len(batches), batches[0].num_examples) == (count, size)
        found.append(([m.loss for m in seen], [m.grad_norm for m in seen], result_of(folder / "out")))
    (losses, norms, ours), (their_losses, their_norms, theirs) = found
    assert losses == pytest.approx(their_losses, rel=1e-5)
    assert norms == pytest.approx(their_norms, rel=1e-3)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def result_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that a training left."""
    path = next(p for p in (folder / "adapter_model.safetensors", folder / "model.safetensors") if p.exists())
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def test_an_adapter_that_is_disabled_leaves_the_base(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, lora=replace(LORA, use_dora=True), learning_rate=1e-2)
    ids, places = torch.arange(9), torch.arange(9)
    base = load_model(place / "model")(ids, places, PackedAttention([0, 9]))
    adapted = PeftModel.from_pretrained(load_model(place / "model"), tmp_path / "out")
    assert not torch.allclose(adapted.network(ids, places, PackedAttention([0, 9])), base, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(adapted.network(ids, places, PackedAttention([0, 9])), base)


def test_gradient_checkpointing_changes_no_bit(place: Path, tmp_path: Path) -> None:
    lora = replace(LORA, lora_dropout=0.2)
    _, expected = run(place, tmp_path / "a", lora=lora, learning_rate=1e-2)
    _, found = run(place, tmp_path / "b", lora=lora, learning_rate=1e-2, gradient_checkpointing=False)
    assert [(m.loss, m.grad_norm) for m in found] == [(m.loss, m.grad_norm) for m in expected]


def test_adapters_over_gguf_and_meta_files(stories: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "Once upon a time there was a llama in Puno."}\n' * 2)
    losses = []
    for source in ("gguf/stories260k-f32.gguf", "meta", "hf"):
        changes = {"model": str(stories / source), "data": str(data), "learning_rate": 5e-3, "max_steps": 4}
        _, seen = run(tmp_path, tmp_path / source, **changes)
        losses.append([m.loss for m in seen])
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] < losses[0][0] - 0.3


def test_one_step_over_all_rows_is_the_same_packed_and_not(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 50, "learning_rate": 1e-2}
    packed, expected = run(place, tmp_path / "a", **settings)
    plain, found = run(place, tmp_path / "b", packing=False, **settings)
    assert len(packed.plan.packs) < len(plain.plan.packs) == 12
    assert [m.loss for m in found] == pytest.approx([m.loss for m in expected], rel=1e-5)
    assert [m.trained_tokens for m in found] == [m.trained_tokens for m in expected]


def test_qlora_trains_over_four_bits(place: Path, tmp_path: Path) -> None:
    trainer, seen = run(place, tmp_path, method="qlora", lora=LORA, learning_rate=2e-2, num_train_epochs=4)
    assert seen[-1].loss < seen[0].loss - 0.5
    network = load_model(place / "model")
    adapted = PeftModel.from_pretrained(network, tmp_path / "out")
    assert len([n for n, _ in adapted.named_modules() if n.endswith("lora_A.default")]) == 14
    assert trainer.plan.memory["weights"] > 0


def test_a_merged_model_computes_as_the_adapter(place: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    run(place, tmp_path, lora=LORA, learning_rate=1e-2, merge=True)
    ids = torch.tensor([[3, 14, 15, 92]])
    adapted = PeftModel.from_pretrained(load_model(place / "model"), tmp_path / "out").network
    expected = adapted(ids[0], torch.arange(4), PackedAttention([0, 4])).detach()
    for folder in (tmp_path / "out" / "merged",):
        ours = load_model(folder)(ids[0], torch.arange(4), PackedAttention([0, 4]))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.detach(), expected, atol=1e-4, rtol=1e-4)


def test_metrics_are_a_line_a_step(place: Path, tmp_path: Path) -> None:
    trainer, seen = run(place, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(seen) + 1))
    assert [line["loss"] for line in lines] == [m.loss for m in seen]
    assert lines[-1]["epoch"] == 2.0
    assert sum(line["trained_tokens"] for line in lines) == 2 * trainer.plan.num_trained
    assert [line["learning_rate"] for line in lines[:3]] == pytest.approx([0.0, 1e-4, 2e-4])


def test_the_best_checkpoint_can_be_the_result(place: Path, tmp_path: Path) -> None:
    """Train until the rows that are held out are measured worse again."""
    measured: list[EvalMetrics] = []
    config = tiny_config(
        place, output=str(tmp_path), lora=LORA, learning_rate=5e-2, num_train_epochs=8, eval_split=0.3,
        save_steps=2, save_total_limit=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(config, on_eval=measured.append)
    result = trainer.train()
    losses = {m.step: m.eval_loss for m in measured}
    best = min(losses, key=lambda step: losses[step])
    assert (result.best_step, result.best_loss) == (best, losses[best]) and best < result.step
    assert [m.eval_perplexity for m in measured] == pytest.approx([math.exp(x) for x in losses.values()])
    assert [step for step, _ in list_checkpoints(tmp_path)] == [best, result.step]
    assert len(trainer.plan.eval_examples) == 4 and trainer.plan.num_rows == 8
    network = PeftModel.from_pretrained(load_model(place / "model"), tmp_path).network
    batches = [Batch.of([example]) for example in trainer.plan.eval_examples]
    with torch.no_grad():
        total = sum(batch_loss(network, batch).item() for batch in batches)
    assert total / sum(batch.num_trained for batch in batches) == pytest.approx(losses[best], rel=1e-5)


def test_gradients_that_are_not_finite_stop(place: Path, tmp_path: Path) -> None:
    """A loss may be finite where its gradient is not; the parameters shall not become NaN."""
    trainer = Trainer(tiny_config(place, output=str(tmp_path), lora=LORA, learning_rate=1e-2))
    load = trainer._load

    def poisoned() -> TrainedModel:
        model = load()
        for name, parameter in model.network.named_parameters():
            if "layers.0.mlp.down_proj.lora_B" in name:
                parameter.register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
        return model

    trainer._load = poisoned  # type: ignore[method-assign]
    with pytest.raises(ParameterError, match=r"the gradient of step 1 is (nan|inf): try a lower"):
        trainer.train()
    assert not list_checkpoints(tmp_path)


def test_weights_of_sixteen_bits_train_as_wide_ones(place: Path, tmp_path: Path) -> None:
    """On processors that do not multiply bfloat16, weights stay so and activations are float32."""
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        shutil.copytree(place / "model", folder)
        theirs.to(dtype).save_pretrained(folder)  # the same values
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        changes = {
            "model": str(tmp_path / str(dtype)),
            "lora": replace(LORA, target_modules=["q_proj", "lm_head"]),
        }
        trainer, seen = run(place, tmp_path / f"out-{dtype}", learning_rate=1e-2, max_steps=4, **changes)
        assert trainer.plan.dtype == dtype
        found.append([m.loss for m in seen])
        if trainer.plan.compute_dtype != torch.float32:
            pytest.skip("this processor multiplies bfloat16")
    # The first values of adapters are rounded to the dtype of the base, as PEFT does.
    assert found[0] == pytest.approx(found[1], rel=2e-4)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)


def test_a_loss_that_is_not_finite_stops(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"the loss of step \d is (nan|inf): try a lower"):
        run(place, tmp_path, method="full", learning_rate=1e30, warmup_steps=0, max_grad_norm=0)


def test_a_template_that_is_not_the_models_own_is_left_beside_the_adapter(
    place: Path, tmp_path: Path
) -> None:
    turn = "{{ bos_token if loop.first }}{{ message.content }}{{ eos_token }}"
    template = "{% for message in messages %}" + turn + "{% endfor %}"
    own, _ = run(place, tmp_path / "own", max_steps=1)
    assert not (own.output / "chat_template.jinja").exists()
    other, _ = run(place, tmp_path / "other", max_steps=1, chat_template=template, merge=True)
    assert (other.output / "chat_template.jinja").read_text() == template
    assert load_tokenizer(other.output / "merged").chat_template == template
    whole, _ = run(place, tmp_path / "whole", max_steps=1, chat_template=template, method="full")
    assert load_tokenizer(whole.output).chat_template == template


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_scheduler_kwargs": {"foo": 1}}, "foo"),
        ({"lora": LoraConfig(target_modules=["nothing_proj"], task_type="CAUSAL_LM")}, "nothing_proj"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    place: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises((ParameterError, UnsupportedError), match=named):
        Trainer(tiny_config(place, output=str(tmp_path / "out"), **changes))
