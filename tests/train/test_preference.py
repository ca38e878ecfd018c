"""Preference training equals the plain formula over PEFT, and what belongs together stays together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from puna.errors import ParameterError
from puna.model.lora_config import LoraConfig
from puna.train.train_config import TrainConfig
from puna.train.trainer import EvalMetrics, StepMetrics, Trainer
from puna.train.training_plan import make_plan
from training_data import tiny_config, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers and PEFT
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def dpo_config(folder: Path, **changes: Any) -> TrainConfig:
    settings = {"objective": "dpo", "beta": 0.3, "lora": LORA, "learning_rate": 1e-2, **changes}
    return tiny_config(folder, data=str(write_pairs(folder)), **settings)


def answer(model: Any, ids: list[int], first: int) -> Tensor:
    """Return the log-probability of all from `first` on."""
    rows = functional.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=-1)
    total: Tensor = rows.gather(1, torch.tensor(ids[1:])[:, None])[first - 1 :].sum()
    return total


def test_training_is_that_of_the_plain_formula(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    seen: list[StepMetrics] = []
    trainer = Trainer(dpo_config(tmp_path), on_step=seen.append)
    trainer.train()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.manual_seed(trainer.config.seed)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, settings)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    steps = trainer.plan.total_steps
    scheduler = transformers.get_scheduler("linear", optimizer, trainer.plan.warmup_steps, steps)
    losses = []
    for step in range(steps):
        gains = []
        for batch in trainer.plan.micro_batches(step):
            wanted = (batch.select + 1).tolist()
            for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                first = next(place for place in wanted if start <= place < end) - start
                ids = batch.input_ids[start:end].tolist()
                with torch.no_grad(), theirs.disable_adapter():
                    before = answer(theirs, ids, first)
                gains.append(answer(theirs, ids, first) - before)
        pairs = zip(gains[0::2], gains[1::2], strict=True)
        loss = torch.stack(
            [-functional.logsigmoid(0.3 * (chosen - rejected)) for chosen, rejected in pairs]
        ).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [m.loss for m in seen] == pytest.approx(losses, abs=1e-5)
    assert seen[0].loss == pytest.approx(0.693147, abs=1e-6)
    assert seen[0].margin == pytest.approx(0, abs=1e-5)
    assert seen[-1].loss < 0.6 and seen[-1].accuracy == 1


def test_pairs_stay_together(tmp_path: Path) -> None:
    plan = make_plan(dpo_config(tmp_path))
    assert len(plan.examples) == 18 and plan.num_rows == 9
    for members in plan.packs:
        assert all(b == a + 1 and a % 2 == 0 for a, b in zip(members[0::2], members[1::2], strict=True))
        assert sum(len(plan.examples[index].ids) for index in members) <= 2 * 96
    assert sorted(index for members in plan.packs for index in members) == list(range(18))


def test_held_out_pairs_are_measured_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    measured: list[EvalMetrics] = []
    config = dpo_config(tmp_path, eval_split=0.3, max_steps=4, save_steps=2)
    straight = Trainer(config, on_eval=measured.append).train()
    assert [m.step for m in measured] == [2, 4]
    assert all(m.eval_perplexity is None and m.eval_accuracy is not None for m in measured)
    assert straight.best_loss == min(m.eval_loss for m in measured)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="pairs .* are for objective 'dpo'"):
        make_plan(dpo_config(tmp_path, objective="sft", beta=0.1))
    with pytest.raises(ParameterError, match="'split' is not for pairs"):
        make_plan(dpo_config(tmp_path, overlong="split"))
    with pytest.raises(ParameterError, match=r"chats-0.jsonl:1: objective 'dpo' needs pairs"):
        make_plan(tiny_config(tmp_path, objective="dpo"))
