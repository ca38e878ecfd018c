"""Preference objectives equal their plain formulas over PEFT, and do not depend on how a step is cut up."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puna.errors import ParameterError, UnsupportedError
from puna.model.lora_config import LoraConfig
from puna.train.encoding import Example
from puna.train.objectives import TrainedModel, batch_share, step_totals
from puna.train.packing import Batch, mismatched
from puna.train.train_config import TrainConfig
from puna.train.trainer import EvalMetrics, StepMetrics, Trainer
from puna.train.training_plan import make_plan
from training_data import WORDS, tiny_config, write_pairs

from tiny import hf_llama, puna_twin

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Transformers and PEFT
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def write_labelled(folder: Path, rows: int = 14) -> Path:
    draw = random.Random(3)
    path = folder / "labelled.jsonl"
    lines = [
        {
            "prompt": [{"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))}],
            "completion": [{"role": "assistant", "content": " ".join(draw.choices(WORDS, k=4))}],
            "label": index % 3 != 0,
        }
        for index in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def config_of(folder: Path, objective: str, **changes: Any) -> TrainConfig:
    data = write_labelled(folder) if objective == "kto" else write_pairs(folder)
    settings = {"objective": objective, "beta": 0.3, "lora": LORA, "learning_rate": 1e-2, **changes}
    return tiny_config(folder, data=str(data), **settings)


@dataclass
class PlainRow:
    ids: list[int]
    first: int  # of the answer
    label: bool | None


def plain_rows(batches: Sequence[Batch]) -> list[PlainRow]:
    rows = []
    for batch in batches:
        wanted = (batch.select + 1).tolist()
        borders = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False))
        labels: Sequence[bool | None] = batch.labels or [None] * len(borders)
        for (start, end), label in zip(borders, labels, strict=True):
            first = next(place for place in wanted if start <= place < end) - start
            rows.append(PlainRow(ids=batch.input_ids[start:end].tolist(), first=first, label=label))
    return rows


def token_log_probs(model: Any, ids: list[int]) -> Tensor:
    """Return the log-probability of each token but the first, (len(ids) - 1,)."""
    rows = functional.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def answer(model: Any, row: PlainRow) -> Tensor:
    return token_log_probs(model, row.ids)[row.first - 1 :].sum()


def plain_dpo(model: Any, reference: Any, rows: list[PlainRow], beta: float) -> Tensor:
    gains = [answer(model, row) - reference(row) for row in rows]
    pairs = zip(gains[0::2], gains[1::2], strict=True)
    return torch.stack([-functional.logsigmoid(beta * (good - bad)) for good, bad in pairs]).mean()


def plain_orpo(model: Any, reference: Any, rows: list[PlainRow], beta: float) -> Tensor:
    del reference
    every = torch.cat([token_log_probs(model, row.ids) for row in rows[0::2]])
    means = [token_log_probs(model, row.ids)[row.first - 1 :].mean() for row in rows]
    ratios = []
    for good, bad in zip(means[0::2], means[1::2], strict=True):
        odds = good.exp() / (1 - good.exp()) / (bad.exp() / (1 - bad.exp()))
        ratios.append(torch.log(torch.sigmoid(torch.log(odds))))
    return -every.mean() - beta * torch.stack(ratios).mean()


def plain_kto(model: Any, reference: Any, rows: list[PlainRow], beta: float) -> Tensor:
    moved = []
    for index, row in enumerate(rows):
        other = rows[index - 1]
        row = PlainRow(
            ids=(row.ids[: row.first] + other.ids[other.first :])[:96], first=row.first, label=None
        )
        with torch.no_grad():
            moved.append(answer(model, row) - reference(row))
    kl = torch.stack(moved).mean().clamp(min=0)
    losses = []
    for row in rows:
        gain = answer(model, row) - reference(row)
        value = gain - kl if row.label else kl - gain
        losses.append((1.5 if row.label else 0.5) * (1 - torch.sigmoid(beta * value)))
    return torch.stack(losses).mean()


PLAIN = {"dpo": plain_dpo, "orpo": plain_orpo, "kto": plain_kto}
WEIGHTS = {"kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5}}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_training_is_that_of_the_plain_formula(tmp_path: Path, objective: str, method: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    seen: list[StepMetrics] = []
    rate = 1e-2 if method == "lora" else 1e-3
    changes = {"method": method, "learning_rate": rate, "max_steps": 6, **WEIGHTS.get(objective, {})}
    trainer = Trainer(config_of(tmp_path, objective, **changes), on_step=seen.append)
    trainer.train()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = copy.deepcopy(theirs)
    if method == "lora":
        torch.manual_seed(trainer.config.seed)
        targets = ["q_proj", "down_proj"]
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(theirs, settings)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    scheduler = transformers.get_scheduler("linear", optimizer, trainer.plan.warmup_steps, 6)

    def reference(row: PlainRow) -> Tensor:
        with torch.no_grad():
            return answer(before, row)

    losses = []
    for step in range(6):
        rows = plain_rows(trainer.plan.micro_batches(step))
        loss = PLAIN[objective](theirs, reference, rows, 0.3)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [m.loss for m in seen] == pytest.approx(losses, abs=1e-5)
    assert seen[-1].loss < seen[0].loss - 0.003
    assert all((m.kl is None) == (objective != "kto") for m in seen)
    assert all((m.accuracy is None) == (objective == "kto") for m in seen)
    margin = seen[-1].margin
    assert margin is not None and (margin > 0 or objective == "orpo")  # ORPO's is not of gains


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_how_a_step_is_cut_into_batches_does_not_matter(tmp_path: Path, objective: str) -> None:
    found = []
    for sizes in ((4, 1), (1, 4)):
        seen: list[StepMetrics] = []
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        changes = dict(zip(names, sizes, strict=True))
        config = config_of(tmp_path, objective, output=str(tmp_path / str(sizes)), **changes)
        Trainer(config, on_step=seen.append).train()
        found.append([(m.loss, m.grad_norm, m.kl or 0.0) for m in seen])
    for whole, cut in zip(*found, strict=True):
        assert cut == pytest.approx(whole, rel=2e-4, abs=1e-6)


def test_answers_of_other_prompts_are_those_of_the_rows_before() -> None:
    def example(ids: list[int], first: int) -> Example:
        return Example(place="", ids=ids, trained=[i >= first for i in range(len(ids))], label=True)

    rows = [example([1, 2, 30, 31], 2), example([4, 50], 1), example([6, 7, 8, 90, 91], 3)]
    found = mismatched(rows, max_length=5)
    assert [list(e.ids) for e in found] == [[1, 2, 90, 91], [4, 30, 31], [6, 7, 8, 50]]
    assert [e.num_trained for e in found] == [2, 2, 1]
    assert [list(e.ids) for e in mismatched(rows, max_length=3)] == [[1, 2, 90], [4, 30, 31], [6, 7, 8]]


def test_pairs_are_two_labelled_answers_to_kto(tmp_path: Path) -> None:
    pairs = str(write_pairs(tmp_path))
    plan = make_plan(config_of(tmp_path, "kto", data_format=None))
    from_pairs = make_plan(tiny_config(tmp_path, data=pairs, objective="kto", lora=LORA))
    assert [e.label for e in plan.examples][:4] == [False, True, True, False]
    assert [e.label for e in from_pairs.examples] == [True, False] * 9
    assert plan.mismatched_batches(0) and not make_plan(config_of(tmp_path, "dpo")).mismatched_batches(0)


def test_labels_are_part_of_the_data(tmp_path: Path) -> None:
    config = config_of(tmp_path, "kto")
    before = make_plan(config).data_hash
    path = Path(config.data[0])
    path.write_text(path.read_text().replace('"label": false', '"label": true', 1))
    assert make_plan(config).data_hash != before


@pytest.mark.parametrize(("text", "label"), [("True", True), ("0", False)])
def test_labels_of_csv_files(tmp_path: Path, text: str, label: bool) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion,label\nhello,llama,{text}\n")
    config = tiny_config(tmp_path, data=str(path), objective="kto")
    assert [e.label for e in make_plan(config).examples] == [label]


def test_held_out_answers_are_measured(tmp_path: Path) -> None:
    measured: list[EvalMetrics] = []
    config = config_of(tmp_path, "kto", eval_split=0.3, max_steps=4, save_steps=2)
    result = Trainer(config, on_eval=measured.append).train()
    assert [m.step for m in measured] == [2, 4] and result.best_loss == min(m.eval_loss for m in measured)
    assert all(m.eval_perplexity is None and m.eval_accuracy is None for m in measured)


def test_the_odds_of_certain_answers_are_finite(tmp_path: Path) -> None:
    network = puna_twin(hf_llama()).requires_grad_()
    network.get_parameter("lm_head.weight").data *= 40  # answers that are all but certain, or impossible
    ids = torch.arange(8)
    examples = [
        Example(place="", ids=[*ids.tolist(), last], trained=[False] * 8 + [True]) for last in (9, 10)
    ]
    config = config_of(tmp_path, "orpo")
    model, batch = TrainedModel(network=network), Batch.of(examples)
    share = batch_share(model, config, batch, step_totals(model, config, [batch]))
    share.loss.backward()  # type: ignore[no-untyped-call]
    assert share.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="needs answers with labels"):
        make_plan(tiny_config(tmp_path, objective="kto"))
    with pytest.raises(
        ParameterError, match="labelled.jsonl:1: an answer with a label is for objective 'kto'"
    ):
        make_plan(tiny_config(tmp_path, data=str(write_labelled(tmp_path))))
    with pytest.raises(ParameterError, match="objective 'orpo' needs pairs"):
        make_plan(tiny_config(tmp_path, objective="orpo"))
    with pytest.raises(ParameterError, match="desirable_weight is for objective kto"):
        config_of(tmp_path, "dpo", desirable_weight=2.0)
    with pytest.raises(ParameterError, match="beta is for objective dpo and orpo and kto"):
        tiny_config(tmp_path, beta=0.2)
    with pytest.raises(UnsupportedError, match="'kto' needs lora bias 'none'"):
        config_of(tmp_path, "kto", lora=LoraConfig(bias="all"))
    with pytest.raises(ParameterError, match="'kto' needs at least two rows in a step"):
        config_of(tmp_path, "kto", packing=False, gradient_accumulation_steps=1)
    with pytest.raises(ParameterError, match="'split' is not for answers with labels"):
        config_of(tmp_path, "kto", overlong="split")
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": "good"}')
    with pytest.raises(ParameterError, match="label is 'good'; true or false is expected"):
        make_plan(tiny_config(tmp_path, data=str(path), objective="kto"))
